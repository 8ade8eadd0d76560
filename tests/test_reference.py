"""The oracle against hand-worked numbers, exact fractions, finite differences and properties."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from numbabn import reference

LAYOUTS = [
    pytest.param((5, 3), 1, id="NC"),
    pytest.param((4, 1), 1, id="NC, C=1"),
    pytest.param((3, 2, 5), 1, id="NCL"),
    pytest.param((2, 3, 2, 3), 1, id="NCHW"),
    pytest.param((2, 2, 3, 3), -1, id="NHWC"),
    pytest.param((3, 4, 2), 0, id="CNL"),
    pytest.param((2, 1, 2, 3, 2), -2, id="axis -2 of 5"),
]

# Worked by hand with eps = 15: both invstd are powers of two, so every number below is exact.
X = [[1.0, 3.0], [3.0, 17.0]]
MEAN, M2, INVSTD, EPS = [2.0, 10.0], [2.0, 98.0], [0.25, 0.125], 15.0
WEIGHT, BIAS = [2.0, 8.0], [10.0, -1.0]
RESIDUAL = [[-20.0, 1.0], [0.0, 2.0]]
DY = [[1.0, 2.0], [3.0, -2.0]]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def operands(shape, axis):
    """Return x, dy, residual of `shape` and weight, bias, mean, var of ``(C,)``, all random."""
    C = shape[axis]
    full = [normal(*shape, seed=seed) for seed in (1, 2, 3)]
    return *full, *(normal(C, seed=seed) for seed in (4, 5, 6)), np.abs(normal(C, seed=7)) + 0.5


def others(ndim, axis):
    return tuple(i for i in range(ndim) if i != axis % ndim)


class TestByHand:
    def test_statistics(self):
        count, mean, m2 = reference.statistics(X)
        assert count == 2
        np.testing.assert_array_equal(mean, MEAN)
        np.testing.assert_array_equal(m2, M2)

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            ({}, [[-0.25, -0.875], [0.25, 0.875]]),
            ({"weight": WEIGHT}, [[-0.5, -7.0], [0.5, 7.0]]),
            ({"bias": BIAS}, [[9.75, -1.875], [10.25, -0.125]]),
            ({"weight": WEIGHT, "bias": BIAS}, [[9.5, -8.0], [10.5, 6.0]]),
            ({"weight": WEIGHT, "activation": "relu"}, [[0.0, 0.0], [0.5, 7.0]]),
            (
                {"weight": WEIGHT, "bias": BIAS, "residual": RESIDUAL, "activation": "relu"},
                [[0.0, 0.0], [10.5, 8.0]],
            ),
        ],
        ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
    )
    def test_forward_and_inference(self, arguments, expected):
        y, mean, invstd = reference.forward(X, eps=EPS, **arguments)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(mean, MEAN)
        np.testing.assert_array_equal(invstd, INVSTD)
        y = reference.inference(X, MEAN, [1.0, 49.0], eps=EPS, **arguments)
        np.testing.assert_array_equal(y, expected)

    @pytest.mark.parametrize(
        ("arguments", "dx", "dweight", "dbias", "dresidual"),
        [
            ({}, [[-0.46875, 0.46875], [0.46875, -0.46875]], [0.5, -3.5], [4.0, 0.0], DY),
            ({"training": False}, [[0.5, 2.0], [1.5, -2.0]], [0.5, -3.5], [4.0, 0.0], DY),
            (
                {"mask": [[False, True], [True, True]]},
                [[-0.703125, 0.46875], [0.703125, -0.46875]],
                [0.75, -3.5],
                [3.0, 0.0],
                [[0.0, 2.0], [3.0, -2.0]],
            ),
            (
                {"mask": [[True, True], [True, False]], "training": False},
                [[0.5, 2.0], [1.5, 0.0]],
                [0.5, -1.75],
                [4.0, 2.0],
                [[1.0, 2.0], [3.0, 0.0]],
            ),
        ],
        ids=["training", "eval", "training+mask", "eval+mask"],
    )
    def test_backward(self, arguments, dx, dweight, dbias, dresidual):
        got = reference.backward(DY, X, WEIGHT, MEAN, INVSTD, **arguments)
        for value, expected in zip(got, (dx, dweight, dbias, dresidual), strict=True):
            np.testing.assert_array_equal(value, expected)

    @pytest.mark.parametrize(("correction", "var"), [(1, [2.5, 1.25]), (0, [2.25, 1.125])])
    def test_running_update(self, correction, var):
        new = reference.running_update(
            [1.0, 0.0], [2.0, 1.0], 4, [5.0, -2.0], [12.0, 6.0], 0.25, correction=correction
        )
        np.testing.assert_array_equal(new, [[2.0, -0.5], var])

    def test_momentum_is_a_tenth_unless_given(self):
        new = reference.running_update([10.0], [20.0], 3, [20.0], [80.0])
        np.testing.assert_allclose(new, [[11.0], [22.0]], rtol=1e-15)

    @pytest.mark.parametrize(("conv_bias", "b"), [([3.0, 5.0], [11.0, 2.0]), (None, [9.5, -3.0])])
    def test_fold(self, conv_bias, b):
        kernel = np.reshape([[1.0, 2.0], [3.0, 4.0]], (2, 1, 1, 2))
        got = reference.fold(kernel, conv_bias, [1.0, 2.0], [1.0, 49.0], WEIGHT, BIAS, eps=EPS)
        np.testing.assert_array_equal(got[0], np.reshape([[0.5, 1.0], [3.0, 4.0]], kernel.shape))
        np.testing.assert_array_equal(got[1], b)

    @pytest.mark.parametrize(
        ("method", "mean", "var"),
        [("exact", [5.0, 2.0], [8.0, 1.6]), ("paper", [4.5, 2.0], [3.0, 4.0])],
    )
    def test_population_of_unequal_batches(self, method, mean, var):
        batches = [[[1.0, 0.0], [3.0, 4.0]], np.empty((0, 2)), [[5.0, 2.0], [7.0, 2.0], [9.0, 2.0]]]
        got = reference.population(iter(batches), method=method)
        np.testing.assert_array_equal(got, [mean, var])

    def test_relu_mask(self):
        z = [-np.inf, -1.0, -0.0, 0.0, 5e-324, np.inf, np.nan]
        np.testing.assert_array_equal(reference.relu_mask(z), [0, 0, 0, 0, 1, 1, 1])


class TestStatistics:
    @pytest.mark.parametrize(
        "values",
        [
            normal(37),
            1e8 + normal(37),
            -1e8 + 1e-7 * normal(38),
            np.append(1e16, normal(999)),
            np.repeat([1e8, np.nextafter(1e8, 2e8)], [3, 4]),
        ],
        ids=["small", "offset", "offset, few last bits", "outlier first", "one last bit"],
    )
    def test_exact_rational_arithmetic(self, values):
        exact = [Fraction(v) for v in values.tolist()]
        exact_mean = sum(exact) / len(exact)
        exact_m2 = sum((v - exact_mean) ** 2 for v in exact)
        count, mean, m2 = reference.statistics(values[:, None])
        assert count == len(exact)
        one_ulp = np.finfo(np.float64).eps * np.mean(np.abs(values))
        assert abs(Fraction(mean.item()) - exact_mean) <= one_ulp
        assert abs(Fraction(m2.item()) - exact_m2) <= Fraction(1, 10**14) * exact_m2

    @pytest.mark.parametrize("value", [0.0, 0.1, 1e10, -3.7, 1e-310, 1.7e308])
    @pytest.mark.parametrize("count", [1, 7, 1000])
    def test_constant_channel_is_exact(self, value, count):
        x = np.full((count, 2), value)
        np.testing.assert_array_equal(reference.statistics(x)[1:], [[value, value], [0.0, 0.0]])
        # The default eps keeps invstd finite.
        y, _, _ = reference.forward(x, [3.3, np.pi], [0.7, -1e5])
        np.testing.assert_array_equal(y, np.full_like(x, [0.7, -1e5]))

    @pytest.mark.parametrize(
        ("bad", "mean"),
        [
            ([np.nan], np.nan),
            ([np.inf], np.inf),
            ([-np.inf], -np.inf),
            ([np.inf, -np.inf], np.nan),
            ([np.inf, np.nan], np.nan),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("place", [0, 3])
    def test_not_finite(self, bad, mean, place):
        x = normal(6, 2)
        expected = reference.statistics(x)
        x[place : place + len(bad), 1] = bad
        _, got_mean, got_m2 = reference.statistics(x)
        np.testing.assert_array_equal(got_mean, [expected[1][0], mean])
        np.testing.assert_array_equal(got_m2, [expected[2][0], np.nan])

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32], ids=str)
    def test_narrow_dtypes_are_widened_first(self, dtype):
        x, dy, residual, weight, bias, mean, var = (
            a.astype(dtype) for a in operands((40, 3, 5), axis=1)
        )

        def everything(cast):
            invstd = np.array([0.5, 0.25, 2.0], dtype=dtype)
            return (
                *reference.statistics(cast(x))[1:],
                *reference.forward(cast(x), cast(weight), cast(bias), residual=cast(residual)),
                reference.inference(cast(x), cast(mean), cast(var), cast(weight)),
                *reference.backward(cast(dy), cast(x), cast(weight), cast(mean), cast(invstd)),
                *reference.running_update(cast(mean), cast(var), 3, cast(bias), cast(var)),
                *reference.fold(cast(x[:3]), cast(bias), cast(mean), cast(var)),
                *reference.population([cast(x), cast(dy)]),
            )

        narrow = everything(lambda a: a)
        for got, expected in zip(narrow, everything(lambda a: a.astype(np.float64)), strict=True):
            assert got.dtype == np.float64
            np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
class TestLayouts:
    def test_output_has_mean_0_and_variance_1(self, shape, axis):
        x = 1e3 + normal(*shape)
        y, mean, invstd = reference.forward(x, eps=0.0, axis=axis)
        over = others(x.ndim, axis)
        np.testing.assert_allclose(np.mean(y, axis=over), 0.0, atol=1e-12)
        np.testing.assert_allclose(np.var(y, axis=over), 1.0, rtol=1e-12)
        np.testing.assert_allclose(mean, np.mean(x, axis=over), rtol=1e-15)
        np.testing.assert_allclose(invstd, 1.0 / np.std(x, axis=over), rtol=1e-9)

    def test_dx_is_orthogonal_to_ones_and_to_x_hat(self, shape, axis):
        x, dy, _, weight, *_ = operands(shape, axis)
        x_hat, mean, invstd = reference.forward(x, eps=0.0, axis=axis)
        dx, *_ = reference.backward(dy, x, weight, mean, invstd, axis=axis)
        over = others(x.ndim, axis)
        np.testing.assert_allclose(np.sum(dx, axis=over), 0.0, atol=1e-13)
        np.testing.assert_allclose(np.sum(dx * x_hat, axis=over), 0.0, atol=1e-13)

    def test_any_axis_is_axis_1_of_the_moved_array(self, shape, axis):
        x, dy, residual, weight, bias, mean, var = operands(shape, axis)
        mask = reference.relu_mask(residual)

        def everything(axis, view):
            activated = {"residual": view(residual), "activation": "relu", "axis": axis}
            z = reference.inference(view(x), mean, var, weight, bias, **activated)
            y, *saved = reference.forward(view(x), weight, bias, **activated)
            dx, *sums, dresidual = reference.backward(
                view(dy), view(x), weight, *saved, mask=view(mask), axis=axis
            )
            batches = [view(x), view(dy)]
            exact = reference.population(batches, axis=axis, method="exact")
            paper = reference.population(batches, axis=axis, method="paper")
            return (z, y, dx, dresidual), (*saved, *sums, *exact, *paper)

        arrays, vectors = everything(axis, lambda a: a)
        moved_arrays, moved_vectors = everything(1, lambda a: np.moveaxis(a, axis, 1))
        for got, expected in zip(arrays, moved_arrays, strict=True):
            np.testing.assert_allclose(np.moveaxis(got, axis, 1), expected, atol=1e-14)
        for got, expected in zip(vectors, moved_vectors, strict=True):
            assert got.shape == (shape[axis],)
            np.testing.assert_allclose(got, expected, atol=1e-14)

    @pytest.mark.parametrize("activation", [None, "relu"])
    @pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
    @pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
    def test_gradients_against_central_differences(
        self, shape, axis, training, with_residual, activation
    ):
        x, dy, residual, weight, bias, mean, var = operands(shape, axis)
        if not with_residual:
            residual = np.zeros_like(x)

        def output(activation):
            arguments = {"axis": axis, "residual": residual, "activation": activation}
            if training:
                return reference.forward(x, weight, bias, **arguments)
            y = reference.inference(x, mean, var, weight, bias, **arguments)
            return y, mean, 1.0 / np.sqrt(var + 1e-5)

        def differences(parameter, step=1e-5):
            slope = np.empty_like(parameter)
            for index in np.ndindex(parameter.shape):
                value = parameter[index]
                parameter[index] = value + step
                above = np.sum(dy * output(activation)[0])
                parameter[index] = value - step
                below = np.sum(dy * output(activation)[0])
                parameter[index] = value
                slope[index] = (above - below) / (2.0 * step)
            return slope

        z, saved_mean, saved_invstd = output(None)
        assert np.min(np.abs(z)) > 1e-4, "too near the kink of ReLU for a difference quotient"
        mask = None if activation is None else reference.relu_mask(z)
        gradients = reference.backward(
            dy, x, weight, saved_mean, saved_invstd, axis=axis, training=training, mask=mask
        )
        for gradient, parameter in zip(gradients, (x, weight, bias, residual), strict=True):
            np.testing.assert_allclose(gradient, differences(parameter), rtol=1e-7, atol=1e-8)


class TestEdges:
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_not_finite_stays_in_its_channel(self, bad, activation):
        x, dy, _, weight, *_ = operands((4, 3, 2), axis=1)
        spoiled = x.copy()
        spoiled[2, 1, 0] = bad

        def everything(x):
            y, mean, invstd = reference.forward(x, weight, activation=activation)
            return y, reference.backward(dy, x, weight, mean, invstd)[0]

        for got, clean in zip(everything(spoiled), everything(x), strict=True):
            assert np.all(np.isnan(got[:, 1]))
            np.testing.assert_array_equal(got[:, ::2], clean[:, ::2])

    @pytest.mark.parametrize("activation", [None, "relu"])
    def test_inference_keeps_not_finite_values_in_place(self, activation):
        x = np.array([[np.nan, 1.0], [np.inf, 2.0], [3.0, np.nan]])
        y = reference.inference(x, [0.0, 0.0], [1.0, 1.0], eps=0.0, activation=activation)
        np.testing.assert_array_equal(y, x)

    def test_division_by_zero_gives_not_finite_values_silently(self):
        zero = np.zeros(1)
        _, _, invstd = reference.forward([[2.0], [2.0]], eps=0.0)
        np.testing.assert_array_equal(invstd, [np.inf])
        y = reference.inference([[-1.0], [0.0], [1.0]], zero, zero, eps=0.0)
        np.testing.assert_array_equal(y, [[-np.inf], [np.nan], [np.inf]])
        _, var = reference.running_update(zero, zero, 1, [2.0], zero)
        np.testing.assert_array_equal(var, [np.nan])
        w, b = reference.fold([[1.0]], None, zero, zero, eps=0.0)
        np.testing.assert_array_equal([w[0], b], [[np.inf], [np.nan]])
        mean, var = reference.population([[[2.0]], [[4.0], [6.0]]], method="paper")
        np.testing.assert_array_equal([mean, var], [[3.5], [np.nan]])

    def test_long_sums_stay_exact(self):
        dy = np.full((100_000, 2), 0.1)
        _, dweight, dbias, _ = reference.backward(dy, dy, None, np.zeros(2), np.ones(2))
        np.testing.assert_allclose(dbias, 1e4, rtol=1e-15)
        np.testing.assert_allclose(dweight, 1e3, rtol=1e-15)

    def test_mask_blocks_nan(self):
        mask = [[False, True], [True, True]]
        spoiled = reference.backward(
            [[np.nan, 2.0], [3.0, -2.0]], X, WEIGHT, MEAN, INVSTD, mask=mask
        )
        clean = reference.backward(DY, X, WEIGHT, MEAN, INVSTD, mask=mask)
        for got, expected in zip(spoiled, clean, strict=True):
            np.testing.assert_array_equal(got, expected)

    @pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
    def test_empty_batch(self, shape):
        x = np.empty(shape)
        zeros = np.zeros(3)
        count, *moments = reference.statistics(x)
        assert count == 0
        y, mean, invstd = reference.forward(x, eps=0.25)
        dx, *sums, dresidual = reference.backward(x, x, None, mean, invstd)
        for vector in (*moments, mean, *sums, *reference.population([x])):
            np.testing.assert_array_equal(vector, zeros)
        np.testing.assert_array_equal(invstd, np.full(3, 2.0))
        inferred = reference.inference(x, zeros, zeros)
        assert y.shape == dx.shape == dresidual.shape == inferred.shape == shape

    def test_empty_batch_leaves_running_statistics(self):
        old = np.array([1.0, 2.0]), np.array([3.0, 4.0])
        new = reference.running_update(*old, 0, np.zeros(2), np.zeros(2))
        np.testing.assert_array_equal(new, old)
        assert not any(np.shares_memory(a, b) for a, b in zip(new, old, strict=True))

    def test_results_share_no_memory_with_arguments(self):
        x, dy = normal(4, 3), normal(4, 3)
        dx, _, _, dresidual = reference.backward(dy, x, None, np.zeros(3), np.ones(3))
        y = reference.inference(x, np.zeros(3), np.ones(3), eps=0.0)
        w, b = reference.fold(x[:3], dy[0], np.zeros(3), np.ones(3), eps=0.0)
        assert not any(
            np.shares_memory(got, a) for got in (dx, dresidual, y, w, b) for a in (x, dy)
        )

    def test_missing_weight_and_bias_are_ones_and_zeros(self):
        x, dy, _, _, _, mean, var = operands((4, 3), axis=1)
        ones, zeros = np.ones(3), np.zeros(3)
        for got, expected in [
            (reference.forward(x), reference.forward(x, ones, zeros)),
            (reference.inference(x, mean, var), reference.inference(x, mean, var, ones, zeros)),
            (
                reference.backward(dy, x, None, mean, var),
                reference.backward(dy, x, ones, mean, var),
            ),
            (
                reference.fold(x[:3], None, mean, var),
                reference.fold(x[:3], zeros, mean, var, ones, zeros),
            ),
        ]:
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_folded_layer_is_the_layer_then_inference(self):
        inputs, kernel, bias = normal(6, 4), normal(3, 4, seed=1), normal(3, seed=2)
        *_, weight, beta, mean, var = operands((6, 3), axis=1)
        w, b = reference.fold(kernel, bias, mean, var, weight, beta)
        expected = reference.inference(inputs @ kernel.T + bias, mean, var, weight, beta)
        np.testing.assert_allclose(inputs @ w.T + b, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("method", ["exact", "paper"])
    def test_population_of_one_batch(self, method):
        x = normal(5, 3, 2)
        count, mean, m2 = reference.statistics(x)
        denominator = {"exact": count, "paper": count - 1}[method]
        np.testing.assert_array_equal(
            reference.population([x], method=method), [mean, m2 / denominator]
        )

    def test_refuses_what_it_does_not_know(self):
        with pytest.raises(ValueError, match="activation must be None or 'relu', got 'gelu'"):
            reference.forward(X, activation="gelu")
        with pytest.raises(ValueError, match="method must be 'exact' or 'paper', got 'mean'"):
            reference.population([X], method="mean")
        with pytest.raises(ValueError, match="reshape"):
            reference.forward(X, weight=[1.0])
