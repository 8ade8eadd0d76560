"""What every backend must do: random operands of a call, and what the oracle makes of them."""

import cases
import numpy as np
import pytest
from hypothesis import strategies as st

import numbabn
from numbabn import reference


class Host:
    """NumPy's arrays; the model of other places, which put arrays on a device and get them back."""

    def put(self, array):
        return array

    def get(self, array):
        return array

    def accuracy(self, dtype):
        """Error of a mean by the standard deviation; a tenth of an invstd's by itself."""
        return 1e-14

    def put_all(self, arrays):
        return {
            name: self.put(array) if isinstance(array, np.ndarray) else array
            for name, array in arrays.items()
        }

    def call(self, function, *args, **keywords):
        """Call with arrays put there, and get the results."""
        args = self.put_all(dict(enumerate(args))).values()
        result = function(*args, **self.put_all(keywords))
        if isinstance(result, tuple):
            return type(result)(*(a if a is None else self.get(a) for a in result))
        return self.get(result)


class Simulated(Host):
    """Numba's arrays in its simulator."""

    def put(self, array):
        from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

        return FakeCUDAArray(array)

    def get(self, array):
        return array.copy_to_host()

    def accuracy(self, dtype):
        """As the host's of float64. Of others, a thread sums what it takes of a piece in float32.

        Each of those steps errs by half of 2**-23 of a sum that is about as large as the standard
        deviation.
        """
        return super().accuracy(dtype) if dtype == np.float64 else 1e-7


HOST, SIMULATED = Host(), Simulated()


class Problem:
    """Random operands of one call and what the oracle makes of them."""

    def __init__(
        self, shape, axis, dtype, ulp,
        *, with_residual=False, activation=None, offset=0.0, on=HOST,
    ):  # fmt: skip
        C = shape[axis]
        self.on = on
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
    running_mean, running_var = (p.on.put(a.copy()) for a in (p.running_mean, p.running_var))
    result = p.on.call(
        numbabn.batch_norm_forward,
        p.x, p.weight, p.bias, running_mean, running_var, momentum=0.3, **p.keywords,
    )  # fmt: skip

    count, mean, m2 = reference.statistics(p.x, axis=p.axis)
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    off = p.on.accuracy(p.dtype)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-14, atol=off / invstd.min())
    np.testing.assert_allclose(result.invstd, invstd, rtol=10 * off)
    assert result.mean.dtype == result.invstd.dtype == np.float64
    expected = p.check_y(result.y, mean, invstd)
    new_mean, new_var = reference.running_update(
        p.running_mean, p.running_var, count, mean, m2, 0.3
    )
    p.close(p.on.get(running_mean), new_mean, np.abs(new_mean), ulps=1)
    p.close(p.on.get(running_var), new_var, np.abs(new_var), ulps=1)

    if p.activation is None:
        assert result.mask is None
        passed = None
    else:
        assert result.mask.nbytes == -(-p.x.size // 8)
        passed = passed_bits(result.mask, p.x)
        np.testing.assert_array_equal(passed, ~(result.y <= 0))
        np.testing.assert_array_equal(passed, expected > 0)

    for training in (True, False):
        gradients = p.on.call(
            numbabn.batch_norm_backward, p.dy, p.x, p.weight, result.mean, result.invstd,
            axis=p.axis, training=training, mask=result.mask, with_residual=p.residual is not None,
        )  # fmt: skip
        dresidual = p.check_gradients(gradients, mean, invstd, passed, training=training)
        if p.residual is not None:
            np.testing.assert_array_equal(gradients.dresidual, dresidual)
        else:
            assert gradients.dresidual is None


def check_inference(p):
    running = [p.on.put(a.copy()) for a in (p.running_mean, p.running_var)]
    y = p.on.call(numbabn.batch_norm_inference, p.x, *running, p.weight, p.bias, **p.keywords)
    p.check_y(y, p.running_mean, 1 / np.sqrt(p.running_var.astype(np.float64) + 1e-5))
    np.testing.assert_array_equal(p.on.get(running[0]), p.running_mean)
    np.testing.assert_array_equal(p.on.get(running[1]), p.running_var)


def check_statistics(shape, axis, dtype, on=HOST):
    x = cases.normal(shape, dtype, seed=1, offset=3)
    stats = numbabn.batch_stats(on.put(x), axis=axis)
    count, mean, m2 = reference.statistics(x, axis=axis)
    off = on.accuracy(dtype)
    assert stats.count == count
    std = np.sqrt(m2 / count).max()
    np.testing.assert_allclose(on.get(stats.mean), mean, rtol=1e-14, atol=off * std)
    np.testing.assert_allclose(on.get(stats.m2), m2, rtol=20 * off)


def check_strides(p, lay):
    """Operands that lie in any way."""
    keywords = p.keywords | {"residual": lay(p.residual)}
    result = p.on.call(numbabn.batch_norm_forward, lay(p.x), p.weight, p.bias, **keywords)
    _, mean, invstd = reference.forward(p.x, axis=p.axis)
    p.check_y(result.y, mean, invstd)
    passed = passed_bits(result.mask, p.x)
    np.testing.assert_array_equal(passed, result.y > 0)
    gradients = p.on.call(
        numbabn.batch_norm_backward, lay(p.dy), lay(p.x), p.weight, mean, invstd,
        axis=p.axis, mask=result.mask, with_residual=True,
    )  # fmt: skip
    dresidual = p.check_gradients(gradients, mean, invstd, passed, training=True)
    np.testing.assert_array_equal(gradients.dresidual, dresidual)
    y = p.on.call(
        numbabn.batch_norm_inference,
        lay(p.x), p.running_mean, p.running_var, p.weight, p.bias, **keywords,
    )  # fmt: skip
    p.check_y(y, p.running_mean, 1 / np.sqrt(p.running_var + 1e-5))


def check_out_of_any_strides(p, lay):
    """Results that lie in another way than the operands."""
    out = p.on.put(lay(np.zeros_like(p.x)))
    operands = p.on.put_all({"x": p.x, "weight": p.weight, "bias": p.bias} | p.keywords)
    result = numbabn.batch_norm_forward(out=out, **operands)
    assert result.y is out
    _, mean, invstd = reference.forward(p.x, axis=p.axis)
    p.check_y(p.on.get(out), mean, invstd)
    dx = p.on.put(np.asfortranarray(np.zeros_like(p.x)))
    gradients = p.on.call(
        numbabn.batch_norm_backward, lay(p.dy), p.x, p.weight, mean, invstd,
        axis=p.axis, mask=result.mask, out=dx,
    )  # fmt: skip
    passed = passed_bits(p.on.get(result.mask), p.x)
    p.check_gradients(gradients, mean, invstd, passed, training=True)


def check_in_place(p):
    """A result may replace any operand of its shape."""
    y, mean, invstd, mask = p.on.call(
        numbabn.batch_norm_forward, p.x, p.weight, p.bias, **p.keywords
    )
    for name in ("x", "residual"):
        operands = {"weight": p.weight, "bias": p.bias, "x": p.x.copy()} | p.keywords
        operands = p.on.put_all(operands | {"residual": p.residual.copy()})
        result = numbabn.batch_norm_forward(out=operands[name], **operands)
        assert result.y is operands[name]
        np.testing.assert_array_equal(p.on.get(result.y), y)
    saved = {"weight": p.weight, "mean": mean, "invstd": invstd, "axis": p.axis, "mask": mask}
    expected = p.on.call(numbabn.batch_norm_backward, dy=p.dy, x=p.x, with_residual=True, **saved)
    for name in ("x", "dy"):
        operands = p.on.put_all({"x": p.x.copy(), "dy": p.dy.copy()} | saved)
        got = numbabn.batch_norm_backward(with_residual=True, out=operands[name], **operands)
        assert got.dx is operands[name]
        for result, same in zip(got, expected, strict=True):
            np.testing.assert_array_equal(p.on.get(result), same)
        assert not np.shares_memory(p.on.get(got.dresidual), p.on.get(operands["dy"]))


def check_offset(shape, axis, offset, on=HOST):
    x = cases.normal(shape, np.float32, offset=offset)
    expected, _, _ = reference.forward(x, axis=axis)
    y = on.call(numbabn.batch_norm, x, axis=axis, training=True)
    assert np.abs(y - expected).max() < 4e-6


def check_gradient_offsets(shape, axis, x_offset, dy_offset, on=HOST):
    x = cases.normal(shape, np.float32, seed=1, offset=x_offset)
    dy = cases.normal(shape, np.float32, seed=2, offset=dy_offset)
    _, mean, invstd = reference.forward(x, axis=axis)
    expected, _, _, _ = reference.backward(dy, x, None, mean, invstd, axis=axis)
    dx = on.call(numbabn.batch_norm_backward, dy, x, None, mean, invstd, axis=axis).dx
    # Steeper than 1 where few values have little variance. The sums of dy err by its own size.
    off = 4e-6 + on.accuracy(np.float32) * dy_offset
    assert np.abs(dx - expected).max() < off * max(1, invstd.max())


CONSTANTS = [0.0, 1.0, -3.7, 1e10, 1e30, 1e-40]


def check_constant(shape, axis, dtype, constant, on=HOST):
    """A constant channel gives exactly bias."""
    x = np.full(shape, constant, dtype)
    bias = cases.normal(shape[axis], dtype)
    y, mean, invstd, _ = on.call(numbabn.batch_norm_forward, x, bias * 3, bias, axis=axis)
    np.testing.assert_array_equal(
        y, np.broadcast_to(bias.reshape(cases.axis_shape(shape, axis)), shape)
    )
    np.testing.assert_array_equal(mean, np.float64(dtype(constant)))
    np.testing.assert_array_equal(invstd, 1 / np.sqrt(1e-5))


def check_scale(shape, scale, dtype, on=HOST, *, atol=1e-6):
    """Squares neither overflow nor underflow."""
    x = cases.normal(shape, dtype) * dtype(scale)
    y = on.call(numbabn.batch_norm, x, training=True, eps=0.0)
    np.testing.assert_allclose(y, reference.forward(x, eps=0.0)[0], rtol=2e-6, atol=atol)


def check_outlier(shape, dtype, outlier, on=HOST):
    """The worst case of a sum shifted by the first element."""
    rest = cases.normal(shape, dtype)
    # Whose differences from the outlier are all rounded the same way.
    alike = np.where(np.arange(rest.size).reshape(shape) % 2, dtype(0.02), dtype(0.03))
    for x in (rest, alike):
        x[0].reshape(shape[1], -1)[:, 0] = outlier
        stats = numbabn.batch_stats(on.put(x))
        count, mean, m2 = reference.statistics(x)
        off = on.accuracy(dtype)
        std = np.sqrt(m2 / count).max()
        np.testing.assert_allclose(on.get(stats.mean), mean, atol=10 * off * std)
        # Cancellation costs up to as many units in the last place as there are numbers.
        np.testing.assert_allclose(on.get(stats.m2), m2, rtol=3000 * off)


def check_not_finite(shape, axis, bad, dtype=np.float32, on=HOST):
    """NaN and infinity stay in their channel."""
    x = cases.normal(shape, dtype)
    channel = np.moveaxis(x, axis, 0)[shape[axis] // 2]
    channel.flat[channel.size // 3] = bad
    expected, mean, _ = reference.forward(x, axis=axis)
    result = on.call(numbabn.batch_norm_forward, x, axis=axis)
    off = on.accuracy(dtype)
    np.testing.assert_allclose(result.y, expected, atol=4e-6)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-13, atol=off)
    dx = on.call(numbabn.batch_norm_backward, x, x, None, *result[1:3], axis=axis).dx
    wrong = np.moveaxis(np.isnan(dx), axis, 0).reshape(shape[axis], -1).any(1)
    assert wrong.tolist() == [c == shape[axis] // 2 for c in range(shape[axis])]


def check_relu_lets_nan_through(on=HOST):
    x = np.array([[np.nan, -1.0], [1.0, 1.0]])
    y = on.call(
        numbabn.batch_norm_inference, x, np.zeros(2), np.ones(2), eps=0.0, activation="relu"
    )
    np.testing.assert_array_equal(y, [[np.nan, 0.0], [1.0, 1.0]])
    result = on.call(numbabn.batch_norm_forward, x, activation="relu")
    np.testing.assert_array_equal(passed_bits(result.mask, x), ~(result.y <= 0))


def check_empty(shape, dtype, on=HOST):
    x = on.put(np.empty(shape, dtype))
    running_mean, running_var = (on.put(np.full(3, value, dtype)) for value in (2, 5))
    result = numbabn.batch_norm_forward(x, None, None, running_mean, running_var, activation="relu")
    assert result.y.shape == shape
    assert result.y.dtype == dtype
    gradients = numbabn.batch_norm_backward(
        x, x, None, result.mean, result.invstd, mask=result.mask, with_residual=True
    )
    assert gradients.dx.shape == gradients.dresidual.shape == shape
    np.testing.assert_array_equal(on.get(gradients.dweight), np.zeros(3))
    np.testing.assert_array_equal(on.get(gradients.dbias), np.zeros(3))
    out = on.put(np.empty(shape, dtype))
    assert numbabn.batch_norm(x, running_mean, running_var, out=out) is out
    assert numbabn.batch_stats(x).count == 0
    np.testing.assert_array_equal(on.get(running_mean), 2)
    np.testing.assert_array_equal(on.get(running_var), 5)


def _rounded(values, dtype):
    """Round float32 as NumPy does, to the nearest, ties to even, beyond the largest to infinity."""
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def check_every_sixteen_bit_number(dtype, scale, *, every=1, on=HOST):
    """Each is read and rounded right."""
    x = np.arange(0, 2**16, every, dtype=np.uint16).view(dtype).reshape(-1, 1)
    weight, one, zero = (np.full(1, value, np.float32) for value in (scale, 1, 0))
    y = on.call(numbabn.batch_norm_inference, x, zero, one, weight, eps=0.0)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = _rounded(x.astype(np.float32) * weight, dtype)
    np.testing.assert_array_equal(y.astype(np.float32), expected.astype(np.float32))


def check_sixteen_bits_beside_float32(shape, dtype, ulp, on=HOST):
    x, dy = cases.normal(shape, dtype, offset=8), cases.normal(shape, dtype, seed=1)
    weight, bias, running_mean = (cases.normal(shape[1], np.float32, seed=s) for s in (2, 3, 4))
    running_var = np.ones(shape[1], np.float32)
    expected_mean, expected_var = reference.running_update(
        running_mean, running_var, *reference.statistics(x)
    )
    running_mean, running_var = on.put(running_mean), on.put(running_var)
    result = on.call(numbabn.batch_norm_forward, x, weight, bias, running_mean, running_var)
    expected, mean, invstd = reference.forward(x, weight, bias)
    off = on.accuracy(dtype)
    assert result.y.dtype == dtype
    np.testing.assert_allclose(result.y.astype(np.float64), expected, rtol=ulp, atol=ulp / 8)
    np.testing.assert_allclose(result.mean, mean, rtol=off)
    np.testing.assert_allclose(result.invstd, invstd, rtol=10 * off)
    np.testing.assert_allclose(on.get(running_mean), expected_mean, rtol=1e-6)
    np.testing.assert_allclose(on.get(running_var), expected_var, rtol=1e-6)
    gradients = on.call(numbabn.batch_norm_backward, dy, x, weight, mean, invstd)
    _, dweight, dbias, _ = reference.backward(dy, x, weight, mean, invstd)
    assert gradients.dx.dtype == dtype
    assert gradients.dweight.dtype == gradients.dbias.dtype == np.float32
    np.testing.assert_allclose(gradients.dweight, dweight, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients.dbias, dbias, rtol=1e-5, atol=1e-5)
    without = on.call(numbabn.batch_norm_backward, dy, x, None, mean, invstd)
    assert without.dbias.dtype == np.float32


def check_correction(correction, on=HOST):
    """It is the running variance's alone."""
    x = cases.normal((6, 4), np.float64)
    running_var = on.put(np.ones(4))
    keywords = {"training": True, "momentum": 1.0, "correction": correction}
    y = on.call(numbabn.batch_norm, x, None, running_var, **keywords)
    expected = x.var(0) * 6 / (6 - correction)
    np.testing.assert_allclose(on.get(running_var), expected, rtol=1e-14)
    np.testing.assert_array_equal(y, on.call(numbabn.batch_norm, x, training=True))


def check_broadcast(p):
    """Inputs whose elements repeat without lying repeatedly in memory."""
    shape = p.x.shape
    for narrow in (p.x[:1], p.x[:, :1], p.x[:, :, :1, :1], p.x[:1, :, :1, :1]):
        p.x = np.broadcast_to(narrow, shape)
        result = p.on.call(numbabn.batch_norm_forward, p.x, p.weight, p.bias)
        _, mean, invstd = reference.forward(p.x)
        p.check_y(result.y, mean, invstd)
        stats = numbabn.batch_stats(p.on.put(p.x))
        np.testing.assert_allclose(p.on.get(stats.mean), mean, rtol=1e-14, atol=1e-15)


def check_float32_statistics(p):
    """Saved statistics may be float32."""
    _, mean, invstd, _ = p.on.call(numbabn.batch_norm_forward, p.x, p.weight)
    narrow, wide = (
        p.on.call(numbabn.batch_norm_backward, p.dy, p.x, p.weight, *saved)
        for saved in ((mean.astype(np.float32), invstd.astype(np.float32)), (mean, invstd))
    )
    np.testing.assert_allclose(narrow.dx, wide.dx, atol=1e-5)


@st.composite
def arrays(draw, most_axes=5, most=7):
    """Any shape and axis, laid in memory in any order of axes, with any steps."""
    shape = tuple(draw(st.lists(st.integers(1, most), min_size=2, max_size=most_axes)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, -1, -2]), min_size=5, max_size=5))
    return shape, axis, order, steps[: len(shape)]


def check_any_array(array, seed, on=HOST):
    shape, axis, order, steps = array
    values = cases.normal(shape, seed=seed, offset=1.5)
    x = cases._with_steps(values.transpose(order), steps).transpose(np.argsort(order))
    np.testing.assert_array_equal(x, values)
    if x.size == shape[axis]:
        with pytest.raises(ValueError, match="more than one value per channel"):
            on.call(numbabn.batch_norm, x, axis=axis, training=True)
        return
    weight = cases.normal(shape[axis], seed=seed + 1)
    y, mean, invstd, mask = on.call(
        numbabn.batch_norm_forward, x, weight, axis=axis, activation="relu"
    )
    expected, ref_mean, ref_invstd = reference.forward(values, weight, axis=axis, activation="relu")
    np.testing.assert_allclose(y, expected, atol=1e-12)
    np.testing.assert_allclose(mean, ref_mean, atol=1e-14)
    np.testing.assert_allclose(invstd, ref_invstd, rtol=1e-11)
    passed = passed_bits(mask, x)
    np.testing.assert_array_equal(passed, y > 0)
    gradients = on.call(
        numbabn.batch_norm_backward, values, x, weight, mean, invstd, axis=axis, mask=mask
    )
    dx, dweight, dbias, _ = reference.backward(
        values, values, weight, ref_mean, ref_invstd, axis=axis, mask=passed
    )
    scale = 1 + np.abs(weight * invstd).max()
    np.testing.assert_allclose(gradients.dx, dx, atol=1e-12 * scale)
    np.testing.assert_allclose(gradients.dweight, dweight, atol=1e-11)
    np.testing.assert_allclose(gradients.dbias, dbias, atol=1e-12)
