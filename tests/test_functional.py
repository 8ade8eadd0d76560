"""The public functions against the oracle: every view, axis, dtype, stride and option."""

import tracemalloc

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numbabn
from numbabn import reference
from numbabn.cpu import schedule

OPTIONS = {
    "plain": (False, None),
    "residual": (True, None),
    "relu": (False, "relu"),
    "residual, relu": (True, "relu"),
}
# Each combination is a kernel to compile: every one in float32 on small shapes, otherwise plain
# and with everything.
TRAINING = {
    f"{shape}, {option}, {name}": (*cases.SHAPES[shape], *OPTIONS[option], *tolerance)
    for name, tolerance in cases.TOLERANCES.items()
    for shape in cases.SHAPES
    for option in OPTIONS
    if option in ("plain", "residual, relu") or (name == "float32" and shape not in cases.LARGE)
}


class Problem:
    """Random operands of one call and what the oracle makes of them."""

    def __init__(
        self, shape, axis, dtype, ulp, *, with_residual=False, activation=None, offset=0.0
    ):
        C = shape[axis]
        self.axis, self.dtype, self.ulp, self.activation = axis, dtype, ulp, activation
        self.x = cases.normal(shape, dtype, seed=1, offset=offset)
        self.dy = cases.normal(shape, dtype, seed=2, offset=0.5)
        self.residual = cases.normal(shape, dtype, seed=3) if with_residual else None
        self.weight = cases.normal(C, dtype, seed=4)
        self.bias = cases.normal(C, dtype, seed=5)
        self.running_mean = cases.normal(C, dtype, seed=6, offset=offset)
        self.running_var = np.abs(cases.normal(C, dtype, seed=7)) + dtype(0.5)
        self.keywords = {"axis": axis, "residual": self.residual, "activation": activation}

    def column(self, values):
        return np.reshape(values, cases.axis_shape(self.x.shape, self.axis))

    def close(self, got, expected, terms, ulps=8):
        """Compare to some units in the last place of the largest term that went into it."""
        assert got.dtype == self.dtype
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=0, atol=ulps * self.ulp * np.max(terms))

    def check_y(self, y, mean, invstd):
        expected = reference.inference(
            self.x, mean, 1 / invstd**2, self.weight, self.bias, eps=0.0, **self.keywords
        )
        scaled = (
            np.abs(self.x - self.column(mean)) * self.column(np.abs(self.weight) * invstd)
        ).max()
        terms = scaled + np.abs(self.bias).max()
        if self.residual is not None:
            terms += np.abs(self.residual).max()
        self.close(y, expected, terms)
        return expected

    def check_gradients(self, got, mean, invstd, passed, *, training):
        expected = reference.backward(
            self.dy, self.x, self.weight, mean, invstd,
            axis=self.axis, training=training, mask=passed,
        )  # fmt: skip
        dx, dweight, dbias, dresidual = expected
        count = self.x.size // self.weight.size
        dy = float(np.abs(self.dy).max())
        normal = np.abs((self.x - self.column(mean)) * self.column(invstd)).max()
        self.close(got.dx, dx, (np.abs(self.weight) * invstd).max() * dy * (2 + normal**2))
        self.close(got.dweight, dweight, count * dy * normal, ulps=1)
        self.close(got.dbias, dbias, count * dy, ulps=1)
        return dresidual


def passed_bits(mask, x):
    return np.unpackbits(mask, bitorder="little", count=x.size).reshape(x.shape).astype(bool)


def check_training(p):
    """Forward and backward, in training and eval mode, against the oracle."""
    running_mean, running_var = p.running_mean.copy(), p.running_var.copy()
    result = numbabn.batch_norm_forward(
        p.x, p.weight, p.bias, running_mean, running_var, momentum=0.3, **p.keywords
    )

    count, mean, m2 = reference.statistics(p.x, axis=p.axis)
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(result.invstd, invstd, rtol=1e-13)
    assert result.mean.dtype == result.invstd.dtype == np.float64
    expected = p.check_y(result.y, mean, invstd)
    new_mean, new_var = reference.running_update(
        p.running_mean, p.running_var, count, mean, m2, 0.3
    )
    p.close(running_mean, new_mean, np.abs(new_mean), ulps=1)
    p.close(running_var, new_var, np.abs(new_var), ulps=1)

    if p.activation is None:
        assert result.mask is None
        passed = None
    else:
        assert result.mask.nbytes == -(-p.x.size // 8)
        passed = passed_bits(result.mask, p.x)
        np.testing.assert_array_equal(passed, ~(result.y <= 0))
        np.testing.assert_array_equal(passed, expected > 0)

    for training in (True, False):
        gradients = numbabn.batch_norm_backward(
            p.dy, p.x, p.weight, result.mean, result.invstd,
            axis=p.axis, training=training, mask=result.mask, with_residual=p.residual is not None,
        )  # fmt: skip
        dresidual = p.check_gradients(gradients, mean, invstd, passed, training=training)
        if p.residual is not None:
            np.testing.assert_array_equal(gradients.dresidual, dresidual)
        else:
            assert gradients.dresidual is None


@pytest.mark.parametrize(
    ("shape", "axis", "with_residual", "activation", "dtype", "ulp"),
    TRAINING.values(),
    ids=TRAINING,
)
def test_training(shape, axis, with_residual, activation, dtype, ulp):
    check_training(
        Problem(shape, axis, dtype, ulp, with_residual=with_residual, activation=activation)
    )


@pytest.fixture(params=["real caches", "tiny caches"])
def caches(request, monkeypatch):
    """Small arrays go past tiny caches, as large ones past real ones, and through a slab."""
    if request.param == "tiny caches":
        monkeypatch.setattr(schedule, "cache_bytes", {2: 1 << 6, 3: 1 << 16}.get)
    schedule.forget()
    yield
    schedule.forget()


@pytest.mark.parametrize("name", [name for name in cases.SHAPES if name not in cases.LARGE])
@cases.narrow_dtypes
def test_sixteen_bits(caches, name, dtype, ulp):
    check_training(Problem(*cases.SHAPES[name], dtype, ulp, with_residual=True, activation="relu"))


@pytest.mark.parametrize("name", cases.LARGE)
def test_sixteen_bits_on_threads(name):
    check_training(Problem(*cases.SHAPES[name], *cases.NARROW["float16"]))


def rounded(values, dtype):
    """Round float32 as NumPy does, to the nearest, ties to even, beyond the largest to infinity."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


@cases.narrow_dtypes
def test_every_sixteen_bit_number_is_read_and_rounded_right(dtype, ulp):
    x = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(-1, 1)
    one = np.ones(1, np.float32)
    zero = np.zeros(1, np.float32)
    for scale in (1.0, 1.00390625, 0.7, 3e-5, 1e4):
        weight = np.full(1, scale, np.float32)
        y = numbabn.batch_norm_inference(x, zero, one, weight, eps=0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = rounded(x.astype(np.float32) * weight, dtype)
        np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


@cases.narrow_dtypes
@pytest.mark.parametrize("shape", [(9, 5, 13), (2, 17, 23, 23), (50, 7)])
def test_sixteen_bits_beside_float32_parameters(shape, dtype, ulp):
    x, dy = cases.normal(shape, dtype, offset=8), cases.normal(shape, dtype, seed=1)
    weight, bias, running_mean = (cases.normal(shape[1], np.float32, seed=s) for s in (2, 3, 4))
    running_var = np.ones(shape[1], np.float32)
    expected_mean, expected_var = reference.running_update(
        running_mean, running_var, *reference.statistics(x)
    )
    result = numbabn.batch_norm_forward(x, weight, bias, running_mean, running_var)
    expected, mean, invstd = reference.forward(x, weight, bias)
    assert result.y.dtype == dtype
    np.testing.assert_allclose(result.y.astype(np.float64), expected, rtol=ulp, atol=ulp / 8)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(result.invstd, invstd, rtol=1e-12)
    np.testing.assert_allclose(running_mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(running_var, expected_var, rtol=1e-6)
    gradients = numbabn.batch_norm_backward(dy, x, weight, mean, invstd)
    _, dweight, dbias, _ = reference.backward(dy, x, weight, mean, invstd)
    assert gradients.dx.dtype == dtype
    assert gradients.dweight.dtype == gradients.dbias.dtype == np.float32
    np.testing.assert_allclose(gradients.dweight, dweight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients.dbias, dbias, rtol=1e-5, atol=1e-5)
    assert numbabn.batch_norm_backward(dy, x, None, mean, invstd).dbias.dtype == np.float32


@cases.shapes
@cases.dtypes
def test_inference(shape, axis, dtype, ulp):
    p = Problem(shape, axis, dtype, ulp)
    before = p.running_mean.copy(), p.running_var.copy()
    y = numbabn.batch_norm_inference(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, axis=axis
    )
    p.check_y(y, before[0], 1 / np.sqrt(before[1].astype(np.float64) + 1e-5))
    np.testing.assert_array_equal(p.running_mean, before[0])
    np.testing.assert_array_equal(p.running_var, before[1])


@cases.shapes
@cases.dtypes
def test_statistics(shape, axis, dtype, ulp):
    x = cases.normal(shape, dtype, seed=1, offset=3)
    stats = numbabn.batch_stats(x, axis=axis)
    count, mean, m2 = reference.statistics(x, axis=axis)
    assert stats.count == count
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(stats.m2, m2, rtol=1e-12)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 4, 5, 3), 1), ((9, 4, 5, 3), 1), ((6, 5, 3, 4), 3)]
)
def test_batch_norm_is_forward_or_inference(shape, axis):
    p = Problem(shape, axis, np.float32, 2**-23, with_residual=True, activation="relu")
    ported = numbabn.batch_norm(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, False, 0.1, 1e-5, **p.keywords
    )
    inference = numbabn.batch_norm_inference(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, **p.keywords
    )
    np.testing.assert_array_equal(ported, inference)

    mean, var = p.running_mean.copy(), p.running_var.copy()
    ported = numbabn.batch_norm(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, True, 0.2, 1e-3, **p.keywords
    )
    forward = numbabn.batch_norm_forward(
        p.x, p.weight, p.bias, mean, var, momentum=0.2, eps=1e-3, **p.keywords
    )
    np.testing.assert_array_equal(ported, forward.y)
    np.testing.assert_array_equal(p.running_mean, mean)
    np.testing.assert_array_equal(p.running_var, var)


def test_without_affine_and_running():
    x = cases.normal((6, 4, 5), np.float64)
    expected, _, _ = reference.forward(x)
    np.testing.assert_allclose(numbabn.batch_norm(x, training=True), expected, atol=1e-14)


@pytest.mark.parametrize("correction", [0, 1, 0.5])
def test_correction_is_the_running_variances_alone(correction):
    x = cases.normal((6, 4), np.float64)
    running_var = np.ones(4)
    y = numbabn.batch_norm(x, None, running_var, training=True, momentum=1.0, correction=correction)
    np.testing.assert_allclose(running_var, x.var(0) * 6 / (6 - correction), rtol=1e-14)
    np.testing.assert_array_equal(y, numbabn.batch_norm(x, training=True))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@cases.memory
@cases.dtypes
def test_any_strides(caches, lay, axis, dtype, ulp):
    p = Problem((9, 17, 5, 6), axis, dtype, ulp, with_residual=True, activation="relu")
    keywords = p.keywords | {"residual": lay(p.residual)}
    result = numbabn.batch_norm_forward(lay(p.x), p.weight, p.bias, **keywords)
    _, mean, invstd = reference.forward(p.x, axis=axis)
    p.check_y(result.y, mean, invstd)
    passed = passed_bits(result.mask, p.x)
    np.testing.assert_array_equal(passed, result.y > 0)
    gradients = numbabn.batch_norm_backward(
        lay(p.dy), lay(p.x), p.weight, mean, invstd, axis=axis, mask=result.mask, with_residual=True
    )
    dresidual = p.check_gradients(gradients, mean, invstd, passed, training=True)
    np.testing.assert_array_equal(gradients.dresidual, dresidual)
    y = numbabn.batch_norm_inference(
        lay(p.x), p.running_mean, p.running_var, p.weight, p.bias, **keywords
    )
    p.check_y(y, p.running_mean, 1 / np.sqrt(p.running_var + 1e-5))


@cases.memory
def test_operands_may_lie_in_different_ways(lay):
    p = Problem((9, 4, 5, 6), 1, np.float64, 2**-48, with_residual=True, activation="relu")
    out = lay(np.zeros_like(p.x))
    result = numbabn.batch_norm_forward(p.x, p.weight, p.bias, out=out, **p.keywords)
    assert result.y is out
    _, mean, invstd = reference.forward(p.x)
    p.check_y(out, mean, invstd)
    dx = np.asfortranarray(np.zeros_like(p.x))
    gradients = numbabn.batch_norm_backward(
        lay(p.dy), p.x, p.weight, mean, invstd, mask=result.mask, out=dx
    )
    assert gradients.dx is dx
    p.check_gradients(gradients, mean, invstd, passed_bits(result.mask, p.x), training=True)


def test_results_lie_as_the_input_does():
    x = np.asfortranarray(cases.normal((9, 4, 5, 6), np.float32))
    result = numbabn.batch_norm_forward(x)
    assert result.y.strides == x.strides
    assert numbabn.batch_norm_backward(x, x, None, *result[1:3]).dx.strides == x.strides


def test_broadcast_input():
    p = Problem((9, 4, 5, 6), 1, np.float64, 2**-48)
    for narrow in (p.x[:1], p.x[:, :1], p.x[:, :, :1, :1], p.x[:1, :, :1, :1]):
        p.x = np.broadcast_to(narrow, (9, 4, 5, 6))
        result = numbabn.batch_norm_forward(p.x, p.weight, p.bias)
        _, mean, invstd = reference.forward(p.x)
        p.check_y(result.y, mean, invstd)
        np.testing.assert_allclose(numbabn.batch_stats(p.x).mean, mean, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("shape", [(4, 5, 33), (4, 50, 33), (3, 7, 513), (4, 5, 11), (4, 5, 16)])
@pytest.mark.parametrize("axis", [1, 2])
def test_operands_broadcast_over_the_batch(caches, shape, axis):
    x, dy, residual = (cases.normal(shape, np.float32, seed=seed) for seed in range(3))
    C = shape[axis]
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    for name in ("x", "dy", "residual"):
        whole = {"x": x, "dy": dy, "residual": residual}
        narrow = np.broadcast_to(whole[name][:1], shape)
        results = []
        for operands in (whole | {name: narrow}, whole | {name: narrow.copy()}):
            x_, dy_, residual_ = operands.values()
            y, *_ = numbabn.batch_norm_forward(x_, residual=residual_, axis=axis)
            z = numbabn.batch_norm_inference(x_, mean, var, residual=residual_, axis=axis)
            dx, *_ = numbabn.batch_norm_backward(
                dy_, x_, None, mean.astype(np.float64), np.ones(C), axis=axis
            )
            results.append((y, z, dx))
        for broadcast, copied in zip(*results, strict=True):
            np.testing.assert_array_equal(broadcast, copied)


def test_read_only_input():
    x = cases.normal((9, 4, 5), np.float32)
    expected = numbabn.batch_norm(x, training=True)
    x.flags.writeable = False
    np.testing.assert_array_equal(numbabn.batch_norm(x, training=True), expected)
    assert not x.flags.writeable


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[::2],
        lambda a: a[:, ::2],
        lambda a: a[:, ::-1],
        lambda a: a[:, :, :, ::2],
        lambda a: a[:, :, 8:],
        lambda a: a.transpose(0, 3, 1, 2),
        lambda a: a.transpose(0, 3, 1, 2)[:, ::2],
        lambda a: a.transpose(0, 3, 1, 2)[:, :, :, 8:],
        lambda a: a.transpose(3, 2, 0, 1),
    ],
)
def test_views_are_never_copied(view):
    x, dy, y = (view(np.ones((32, 32, 32, 32), np.float32)) for _ in range(3))

    def steps():
        result = numbabn.batch_norm_forward(x, out=y)
        numbabn.batch_norm_backward(dy, x, None, result.mean, result.invstd, out=dy)

    steps()
    tracemalloc.start()
    steps()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 8


@cases.dtypes
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (9, 4, 5, 3), (6, 17, 23, 23), (50, 7)])
def test_in_place(shape, dtype, ulp):
    p = Problem(shape, 1, dtype, ulp, with_residual=True)
    y, mean, invstd, _ = numbabn.batch_norm_forward(p.x, p.weight, p.bias, residual=p.residual)
    for name in ("x", "residual"):
        operands = {"x": p.x.copy(), "residual": p.residual.copy()}
        numbabn.batch_norm_forward(weight=p.weight, bias=p.bias, out=operands[name], **operands)
        np.testing.assert_array_equal(operands[name], y)
    dx = numbabn.batch_norm_backward(p.dy, p.x, p.weight, mean, invstd).dx
    for name in ("x", "dy"):
        operands = {"x": p.x.copy(), "dy": p.dy.copy()}
        gradients = numbabn.batch_norm_backward(
            weight=p.weight, mean=mean, invstd=invstd,
            with_residual=True, out=operands[name], **operands,
        )  # fmt: skip
        np.testing.assert_array_equal(operands[name], dx)
        np.testing.assert_array_equal(gradients.dresidual, p.dy)
        assert not np.shares_memory(gradients.dresidual, operands["dy"])


@cases.shapes
@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_float32_is_exact_at_any_offset(shape, axis, offset):
    x = cases.normal(shape, np.float32, offset=offset)
    expected, _, _ = reference.forward(x, axis=axis)
    assert np.abs(numbabn.batch_norm(x, axis=axis, training=True) - expected).max() < 4e-6


@cases.shapes
@pytest.mark.parametrize(("x_offset", "dy_offset"), [(1e2, 0), (1e6, 0), (0, 1e4), (1e4, 1e2)])
def test_float32_gradients_are_exact_at_any_offset(shape, axis, x_offset, dy_offset):
    x = cases.normal(shape, np.float32, seed=1, offset=x_offset)
    dy = cases.normal(shape, np.float32, seed=2, offset=dy_offset)
    _, mean, invstd = reference.forward(x, axis=axis)
    expected, _, _, _ = reference.backward(dy, x, None, mean, invstd, axis=axis)
    dx = numbabn.batch_norm_backward(dy, x, None, mean, invstd, axis=axis).dx
    # Steeper than 1 where few values have little variance.
    assert np.abs(dx - expected).max() < 4e-6 * max(1, invstd.max())


def test_only_what_has_no_view_is_copied():
    x = np.ones((32, 32, 32, 32), np.float32)
    out = np.zeros((32, 32, 34, 34), np.float32)[:, :, 1:-1, 1:-1]
    numbabn.batch_norm(x, training=True, out=out)
    tracemalloc.start()
    numbabn.batch_norm(x, training=True, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * x.nbytes


@cases.shapes
@cases.dtypes
@pytest.mark.parametrize("constant", [0.0, 1.0, -3.7, 1e10, 1e30, 1e-40])
def test_a_constant_channel_gives_exactly_bias(shape, axis, dtype, ulp, constant):
    x = np.full(shape, constant, dtype)
    bias = cases.normal(shape[axis], dtype)
    y, mean, invstd, _ = numbabn.batch_norm_forward(x, bias * 3, bias, axis=axis)
    np.testing.assert_array_equal(
        y, np.broadcast_to(bias.reshape(cases.axis_shape(shape, axis)), shape)
    )
    np.testing.assert_array_equal(mean, dtype(constant))
    np.testing.assert_array_equal(invstd, 1 / np.sqrt(1e-5))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30])
def test_squares_neither_overflow_nor_underflow(scale, dtype):
    x = cases.normal((64, 3, 40, 40), dtype) * dtype(scale)
    y = numbabn.batch_norm(x, training=True, eps=0.0)
    np.testing.assert_allclose(y, reference.forward(x, eps=0.0)[0], rtol=2e-6, atol=1e-6)


def test_an_outlier_in_front_spoils_nothing():
    # The worst case of a sum shifted by the first element.
    x = cases.normal((4, 2, 80, 80), np.float64)
    x[0, :, 0, 0] = 1e6
    stats = numbabn.batch_stats(x)
    count, mean, m2 = reference.statistics(x)
    np.testing.assert_allclose(stats.mean, mean, atol=1e-13 * np.sqrt(m2 / count).max())
    np.testing.assert_allclose(stats.m2, m2, rtol=1e-11)


def test_sums_that_are_exact_in_any_order_come_out_exact():
    # As benchdnn fills x: pairs around the mean.
    pairs = np.random.default_rng(0).integers(-8, 9, (16, 5, 8, 4)).astype(np.float32)
    x = np.stack([4 + pairs, 4 - pairs], axis=-1).reshape(16, 5, 8, 8)
    stats = numbabn.batch_stats(x)
    np.testing.assert_array_equal(stats.mean, 4)
    np.testing.assert_array_equal(stats.m2, ((x - 4.0) ** 2).sum((0, 2, 3)))


@cases.shapes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_channel(shape, axis, bad):
    x = cases.normal(shape, np.float32)
    channel = np.moveaxis(x, axis, 0)[shape[axis] // 2]
    channel.flat[channel.size // 3] = bad
    expected, mean, _ = reference.forward(x, axis=axis)
    result = numbabn.batch_norm_forward(x, axis=axis)
    np.testing.assert_allclose(result.y, expected, atol=4e-6)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-13, atol=1e-14)
    dx = numbabn.batch_norm_backward(x, x, None, *result[1:3], axis=axis).dx
    wrong = np.moveaxis(np.isnan(dx), axis, 0).reshape(shape[axis], -1).any(1)
    assert wrong.tolist() == [c == shape[axis] // 2 for c in range(shape[axis])]


def test_relu_lets_nan_through():
    x = np.array([[np.nan, -1.0], [1.0, 1.0]])
    y = numbabn.batch_norm_inference(x, np.zeros(2), np.ones(2), eps=0.0, activation="relu")
    np.testing.assert_array_equal(y, [[np.nan, 0.0], [1.0, 1.0]])
    result = numbabn.batch_norm_forward(x, activation="relu")
    np.testing.assert_array_equal(passed_bits(result.mask, x), ~(result.y <= 0))


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((9, 2, 3), 1), ((5, 3), 1)])
def test_gradients_against_finite_differences(shape, axis, with_mask):
    p = Problem(
        shape,
        axis,
        np.float64,
        2**-48,
        with_residual=True,
        activation="relu" if with_mask else None,
    )

    def loss(**changed):
        operands = {"x": p.x, "weight": p.weight, "bias": p.bias, "residual": p.residual} | changed
        y = numbabn.batch_norm_forward(**operands, axis=axis, activation=p.activation).y
        return (y * p.dy).sum()

    result = numbabn.batch_norm_forward(p.x, p.weight, p.bias, **p.keywords)
    gradients = numbabn.batch_norm_backward(
        p.dy, p.x, p.weight, *result[1:3], axis=axis, mask=result.mask, with_residual=True
    )
    step = 1e-6
    for name, gradient in gradients._asdict().items():
        operand = getattr(p, name.removeprefix("d"))
        numeric = np.empty_like(operand)
        for i in np.ndindex(operand.shape):
            nudge = np.zeros_like(operand)
            nudge[i] = step
            name_of = name.removeprefix("d")
            up, down = loss(**{name_of: operand + nudge}), loss(**{name_of: operand - nudge})
            numeric[i] = (up - down) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, atol=2e-8, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (5, 3, 0)])
def test_empty_batch(shape, dtype):
    x = np.empty(shape, dtype)
    running_mean, running_var = np.full(3, 2, dtype), np.full(3, 5, dtype)
    result = numbabn.batch_norm_forward(x, None, None, running_mean, running_var, activation="relu")
    assert result.y.shape == shape
    assert result.y.dtype == dtype
    gradients = numbabn.batch_norm_backward(
        x, x, None, result.mean, result.invstd, mask=result.mask, with_residual=True
    )
    assert gradients.dx.shape == gradients.dresidual.shape == shape
    np.testing.assert_array_equal(gradients.dweight, np.zeros(3))
    np.testing.assert_array_equal(gradients.dbias, np.zeros(3))
    out = np.empty(shape, dtype)
    assert numbabn.batch_norm(x, running_mean, running_var, out=out) is out
    numbabn.update_running_stats(running_mean, running_var, numbabn.batch_stats(x))
    np.testing.assert_array_equal(running_mean, 2)
    np.testing.assert_array_equal(running_var, 5)


def test_in_place_through_an_axis_of_one_place():
    memory = cases.normal((4, 3), np.float64)
    x, out = memory[:, :, None], memory.reshape(4, 3, 1)
    expected = numbabn.batch_norm(x.copy(), training=True)
    np.testing.assert_array_equal(numbabn.batch_norm(x, training=True, out=out), expected)


def test_statistics_that_start_empty_update_nothing():
    running_mean, running_var = np.full(3, 2.0), np.full(3, 5.0)
    numbabn.update_running_stats(running_mean, running_var, numbabn.BatchStats())
    assert running_mean.tolist() == [2, 2, 2]
    assert running_var.tolist() == [5, 5, 5]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("of", ["x", "residual"])
def test_running_statistics_within_an_input_are_refused(name, of):
    operands = {"x": cases.normal((4, 3)), "residual": cases.normal((4, 3), seed=1)}
    before = {key: value.copy() for key, value in operands.items()}
    with pytest.raises(ValueError, match=f"{name}: expected memory of its own.*{of}"):
        numbabn.batch_norm_forward(**operands, **{name: operands[of][0]})
    for key, value in operands.items():
        np.testing.assert_array_equal(value, before[key])


def test_memmaps_in_plain_arrays_out(tmp_path):
    memory = np.memmap(tmp_path / "x", np.float32, "w+", shape=(9, 4, 5))
    memory[...] = cases.normal((9, 4, 5))
    result = numbabn.batch_norm_forward(memory)
    gradients = numbabn.batch_norm_backward(memory, memory, None, *result[1:3], with_residual=True)
    for array in (result.y, gradients.dx, gradients.dresidual):
        assert type(array) is np.ndarray
    np.testing.assert_array_equal(result.y, numbabn.batch_norm(np.array(memory), training=True))


def test_saved_statistics_may_be_float32():
    p = Problem((9, 4, 5), 1, np.float32, 2**-23)
    _, mean, invstd, _ = numbabn.batch_norm_forward(p.x, p.weight)
    narrow = numbabn.batch_norm_backward(
        p.dy, p.x, p.weight, mean.astype(np.float32), invstd.astype(np.float32)
    )
    wide = numbabn.batch_norm_backward(p.dy, p.x, p.weight, mean, invstd)
    np.testing.assert_allclose(narrow.dx, wide.dx, atol=1e-5)


@st.composite
def arrays(draw):
    """Any shape and axis, laid in memory in any order of axes, with any steps."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=2, max_size=5)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1, -2]), min_size=5, max_size=5))
    return shape, axis, order, steps[: len(shape)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arrays(), st.integers(0, 2**31))
def test_any_shape_axis_order_and_step(array, seed):
    shape, axis, order, steps = array
    values = cases.normal(shape, seed=seed, offset=1.5)
    x = cases._with_steps(values.transpose(order), steps).transpose(np.argsort(order))
    np.testing.assert_array_equal(x, values)
    if x.size == shape[axis]:
        with pytest.raises(ValueError, match="more than one value per channel"):
            numbabn.batch_norm(x, axis=axis, training=True)
        return
    weight = cases.normal(shape[axis], seed=seed + 1)
    y, mean, invstd, mask = numbabn.batch_norm_forward(x, weight, axis=axis, activation="relu")
    expected, ref_mean, ref_invstd = reference.forward(values, weight, axis=axis, activation="relu")
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(mean, ref_mean, atol=1e-14)
    np.testing.assert_allclose(invstd, ref_invstd, rtol=1e-11)
    passed = passed_bits(mask, x)
    np.testing.assert_array_equal(passed, y > 0)
    gradients = numbabn.batch_norm_backward(values, x, weight, mean, invstd, axis=axis, mask=mask)
    dx, dweight, dbias, _ = reference.backward(
        values, values, weight, ref_mean, ref_invstd, axis=axis, mask=passed
    )
    scale = 1 + np.abs(weight * invstd).max()
    np.testing.assert_allclose(gradients.dx, dx, atol=1e-12 * scale)
    np.testing.assert_allclose(gradients.dweight, dweight, atol=1e-11)
    np.testing.assert_allclose(gradients.dbias, dbias, atol=1e-12)
