"""The public functions on a real GPU against the oracle: the one table of cases, and its bits."""

import os
import subprocess
import sys
from pathlib import Path

import cases
import numpy as np
import on_device
import pytest

import numbabn
from numbabn import reference

pytestmark = pytest.mark.gpu

TESTS = Path(__file__).parents[1]

DTYPES = cases.NARROW | cases.TOLERANCES
OPTIONS = {
    "plain": (False, None),
    "residual": (True, None),
    "relu": (False, "relu"),
    "residual, relu": (True, "relu"),
}
TRAINING = {
    f"{shape}, {option}, {name}": (*cases.SHAPES[shape], *OPTIONS[option], *tolerance)
    for name, tolerance in DTYPES.items()
    for shape in cases.SHAPES
    for option in OPTIONS
    if option in ("plain", "residual, relu") or name == "float32"
}
# A library that copies what lies at odd addresses may take the whole process with it.
ODD = ("unaligned", "field of a record")
# One block for each channel, and several: of planes, rows, and narrow rows.
WHOLE = {
    "planes": ((6, 33, 14, 14), 1),
    "short planes": ((11, 29, 7, 7), 1),
    "rows": ((4, 5, 6, 40), -1),
    "narrow rows": ((50, 3), 1),
}
SPLIT = {
    "planes": ((20, 5, 65, 67), 1),
    "short planes": ((700, 29, 7, 7), 1),
    "rows": ((33, 23, 29, 40), -1),
    "wide rows": ((3001, 1061), 1),
    "narrow rows": ((70001, 3), 1),
}

dtypes = pytest.mark.parametrize(("dtype", "ulp"), DTYPES.values(), ids=DTYPES)


@pytest.fixture
def torch(monkeypatch):
    library = on_device.Torch()
    on_device.poison(monkeypatch)
    return library


@pytest.fixture
def cupy(monkeypatch):
    library = on_device.CuPy()
    on_device.poison(monkeypatch)
    return library


class Problem:
    """Random operands of one call, here and on a device, and what the oracle makes of them."""

    def __init__(
        self, library, shape, axis, dtype, ulp, *,
        with_residual=False, activation=None, offset=0.0, lay=np.asarray, shift=0,
    ):  # fmt: skip
        C = shape[axis]
        self.library, self.axis, self.dtype, self.ulp = library, axis, dtype, ulp
        self.activation = activation
        self.x = cases.normal(shape, dtype, seed=1, offset=offset)
        self.dy = cases.normal(shape, dtype, seed=2, offset=0.5)
        self.residual = cases.normal(shape, dtype, seed=3) if with_residual else None
        self.weight = cases.normal(C, dtype, seed=4)
        self.bias = cases.normal(C, dtype, seed=5)
        self.running_mean = cases.normal(C, dtype, seed=6, offset=offset)
        self.running_var = np.abs(cases.normal(C, dtype, seed=7)) + dtype(0.5)
        laid = {"x": self.x, "dy": self.dy, "residual": self.residual}
        self.given = {
            name: None if values is None else library.put(lay(values), shift)
            for name, values in laid.items()
        } | {
            name: library.put(getattr(self, name))
            for name in ("weight", "bias", "running_mean", "running_var")
        }

    def column(self, values):
        return np.reshape(values, cases.axis_shape(self.x.shape, self.axis))

    def forward(self, **keywords):
        on = self.given
        return numbabn.batch_norm_forward(
            on["x"], on["weight"], on["bias"], axis=self.axis, residual=on["residual"],
            activation=self.activation, **keywords,
        )  # fmt: skip

    def backward(self, mean, invstd, **keywords):
        on = self.given
        return numbabn.batch_norm_backward(
            on["dy"], on["x"], on["weight"], mean, invstd, axis=self.axis, **keywords
        )

    def inference(self, **keywords):
        on = self.given
        return numbabn.batch_norm_inference(
            on["x"], on["running_mean"], on["running_var"], on["weight"], on["bias"],
            axis=self.axis, residual=on["residual"], activation=self.activation, **keywords,
        )  # fmt: skip

    def close(self, got, expected, terms, ulps=8):
        """Compare to some units in the last place of the largest term that went into it."""
        got = self.library.get(got)
        assert got.dtype == self.dtype
        assert got.shape == expected.shape
        np.testing.assert_allclose(
            got.astype(np.float64), expected, rtol=0, atol=ulps * self.ulp * np.max(terms)
        )

    def check_statistics(self, mean, m2):
        """16- and 32-bit data are summed in float32 by each thread."""
        count, expected, expected_m2 = reference.statistics(self.x, axis=self.axis)
        wide = self.dtype == np.float64
        spread = np.sqrt(expected_m2 / count).max()
        np.testing.assert_allclose(
            mean, expected, rtol=1e-14, atol=(1e-14 if wide else 5e-7) * spread
        )
        np.testing.assert_allclose(m2, expected_m2, rtol=1e-12 if wide else 1e-6)
        return count, expected, expected_m2

    def check_y(self, y, mean, invstd):
        """Compare y; give what was expected, and how far from it is within rounding."""
        expected = reference.inference(
            self.x, mean, 1 / invstd**2, self.weight, self.bias, eps=0.0,
            axis=self.axis, residual=self.residual, activation=self.activation,
        )  # fmt: skip
        deviation = np.abs(self.x.astype(np.float64) - self.column(mean))
        terms = (deviation * self.column(np.abs(self.weight) * invstd)).max()
        terms += np.abs(self.bias.astype(np.float64)).max()
        if self.residual is not None:
            terms += np.abs(self.residual.astype(np.float64)).max()
        self.close(y, expected, terms)
        return expected, 8 * self.ulp * terms

    def check_passed(self, mask, y, expected, near):
        """Compare the mask's bits to y itself, and to the oracle's where that is not nearly 0."""
        bits = np.unpackbits(self.library.get(mask), bitorder="little", count=self.x.size)
        passed = bits.reshape(self.x.shape).astype(bool)
        np.testing.assert_array_equal(passed, ~(self.library.get(y) <= 0))
        assert not (passed != (expected > 0))[expected > near].any()
        return passed

    def check_gradients(self, got, mean, invstd, passed, *, training):
        dx, dweight, dbias, dresidual = reference.backward(
            self.dy, self.x, self.weight, mean, invstd,
            axis=self.axis, training=training, mask=passed,
        )  # fmt: skip
        count = self.x.size // self.weight.size
        dy = float(np.abs(self.dy.astype(np.float64)).max())
        deviation = np.abs(self.x.astype(np.float64) - self.column(mean))
        normal = (deviation * self.column(invstd)).max()
        weight = np.abs(self.weight.astype(np.float64))
        self.close(got.dx, dx, (weight * invstd).max() * dy * (2 + normal**2))
        self.close(got.dweight, dweight, count * dy * normal, ulps=1)
        self.close(got.dbias, dbias, count * dy, ulps=1)
        if got.dresidual is not None:
            np.testing.assert_array_equal(
                self.library.get(got.dresidual).astype(np.float64), dresidual
            )


def check_training(p):
    """Forward and backward, in training and eval mode, against the oracle."""
    running_mean, running_var = p.given["running_mean"], p.given["running_var"]
    result = p.forward(running_mean=running_mean, running_var=running_var, momentum=0.3)
    got_mean, got_invstd = p.library.get(result.mean), p.library.get(result.invstd)
    assert got_mean.dtype == got_invstd.dtype == np.float64
    m2 = (got_invstd**-2.0 - 1e-5) * (p.x.size // p.weight.size)
    count, mean, m2 = p.check_statistics(got_mean, m2)
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    expected, near = p.check_y(result.y, mean, invstd)
    new_mean, new_var = reference.running_update(
        p.running_mean, p.running_var, count, mean, m2, 0.3
    )
    p.close(running_mean, new_mean, np.abs(new_mean), ulps=2)
    p.close(running_var, new_var, np.abs(new_var), ulps=2)
    passed = None
    if p.activation is None:
        assert result.mask is None
    else:
        passed = p.check_passed(result.mask, result.y, expected, near)
    for training in (True, False):
        gradients = p.backward(
            result.mean, result.invstd,
            training=training, mask=result.mask, with_residual=p.residual is not None,
        )  # fmt: skip
        assert (gradients.dresidual is None) == (p.residual is None)
        p.check_gradients(gradients, mean, invstd, passed, training=training)


@pytest.mark.parametrize(
    ("shape", "axis", "with_residual", "activation", "dtype", "ulp"),
    TRAINING.values(),
    ids=TRAINING,
)
def test_training(torch, shape, axis, with_residual, activation, dtype, ulp):
    options = {"with_residual": with_residual, "activation": activation}
    check_training(Problem(torch, shape, axis, dtype, ulp, **options))


@cases.shapes
@dtypes
def test_inference(torch, shape, axis, dtype, ulp):
    p = Problem(torch, shape, axis, dtype, ulp)
    y = p.inference()
    p.check_y(y, p.running_mean, 1 / np.sqrt(p.running_var.astype(np.float64) + 1e-5))
    for name in ("running_mean", "running_var"):
        np.testing.assert_array_equal(torch.get(p.given[name]), getattr(p, name))


@cases.shapes
@dtypes
def test_statistics(torch, shape, axis, dtype, ulp):
    p = Problem(torch, shape, axis, dtype, ulp, offset=3)
    stats = numbabn.batch_stats(p.given["x"], axis=axis)
    assert stats.count == p.x.size // p.weight.size
    p.check_statistics(torch.get(stats.mean), torch.get(stats.m2))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@pytest.mark.parametrize("name", [name for name in cases.MEMORY if name not in ODD])
@dtypes
def test_any_strides(request, name, axis, dtype, ulp):
    library = request.getfixturevalue("cupy" if name.startswith("backwards") else "torch")
    options = {"with_residual": True, "activation": "relu", "lay": cases.MEMORY[name]}
    p = Problem(library, (9, 17, 5, 6), axis, dtype, ulp, **options)
    check_training(p)
    y = p.inference()
    # Its running ones are what training has left.
    mean, var = (library.get(p.given[name]) for name in ("running_mean", "running_var"))
    p.check_y(y, mean.astype(np.float64), 1 / np.sqrt(var.astype(np.float64) + 1e-5))


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3, 16, 32), 1), ((5, 3, 16, 32), -1), ((3, 4, 64), 1), ((40, 64), 1)]
)
@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 8])
@dtypes
def test_begins_anywhere(torch, shape, axis, elements, dtype, ulp):
    """What is not aligned to 16 bytes moves fewer numbers at a time."""
    shift = elements * np.dtype(dtype).itemsize
    options = {"with_residual": True, "activation": "relu", "shift": shift}
    check_training(Problem(torch, shape, axis, dtype, ulp, **options))


@pytest.mark.parametrize("name", ODD)
def test_odd_addresses_are_right_or_refused(name):
    """In a process of its own."""
    on_device.CuPy()
    code = f"""
import cases, numpy, numbabn, on_device
from numbabn import reference
library = on_device.CuPy()
x = cases.normal((4, 3, 5, 6), numpy.float32)
given = library.put(cases.MEMORY[{name!r}](x), {int(name == "unaligned")})
try:
    y = numbabn.batch_norm(given, training=True)
except (TypeError, ValueError) as error:
    print("refused:", error)
else:
    numpy.testing.assert_allclose(library.get(y), reference.forward(x)[0], atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("shape", [(5, 3, 16, 32), (40, 64)])
@dtypes
def test_in_place_and_given_results(torch, shape, dtype, ulp):
    p = Problem(torch, shape, 1, dtype, ulp)
    result = p.forward()
    gradients = p.backward(result.mean, result.invstd)
    out = torch.put(np.zeros(shape, dtype))
    assert p.forward(out=out).y is out
    np.testing.assert_array_equal(torch.get(out), torch.get(result.y))
    assert p.backward(result.mean, result.invstd, out=p.given["dy"]).dx is p.given["dy"]
    np.testing.assert_array_equal(torch.get(p.given["dy"]), torch.get(gradients.dx))
    assert p.forward(out=p.given["x"]).y is p.given["x"]
    np.testing.assert_array_equal(torch.get(p.given["x"]), torch.get(result.y))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(9, 5, 13), (2, 17, 23, 23), (50, 7)])
def test_sixteen_bits_beside_float32_parameters(torch, shape, name):
    dtype, ulp = cases.NARROW[name]
    p = Problem(torch, shape, 1, dtype, ulp)
    for key in ("weight", "bias", "running_mean", "running_var"):
        setattr(p, key, getattr(p, key).astype(np.float32))
        p.given[key] = torch.put(getattr(p, key))
    result = p.forward(running_mean=p.given["running_mean"], running_var=p.given["running_var"])
    statistics = reference.statistics(p.x)
    count, mean, m2 = statistics
    invstd = 1 / np.sqrt(m2 / count + 1e-5)
    p.check_y(result.y, mean, invstd)
    running = reference.running_update(p.running_mean, p.running_var, *statistics)
    for key, want in zip(("running_mean", "running_var"), running, strict=True):
        np.testing.assert_allclose(torch.get(p.given[key]), want, rtol=2e-6, atol=2e-7)
    gradients = p.backward(result.mean, result.invstd)
    _, dweight, dbias, _ = reference.backward(p.dy, p.x, p.weight, mean, invstd)
    for got, want in ((gradients.dweight, dweight), (gradients.dbias, dbias)):
        host = torch.get(got)
        assert host.dtype == np.float32
        np.testing.assert_allclose(host, want, rtol=1e-5, atol=1e-5 * count**0.5)


@cases.shapes
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_float32_is_exact_at_any_offset(torch, shape, axis, offset):
    p = Problem(torch, shape, axis, np.float32, 2**-23, offset=offset)
    x, dy = p.given["x"], p.given["dy"]
    expected, mean, invstd = reference.forward(p.x, axis=axis)
    y, got_mean, got_invstd, _ = numbabn.batch_norm_forward(x, axis=axis)
    assert np.abs(torch.get(y) - expected).max() < 4e-6
    dx = numbabn.batch_norm_backward(dy, x, None, got_mean, got_invstd, axis=axis).dx
    expected, *_ = reference.backward(p.dy, p.x, None, mean, invstd, axis=axis)
    assert np.abs(torch.get(dx) - expected).max() < 8e-6 * max(1, invstd.max())


@pytest.mark.parametrize("constant", [0.0, -3.7, 1e10, 1e30, 1e-40])
@pytest.mark.parametrize("name", [*WHOLE, *(f"{name}, several blocks" for name in SPLIT)])
def test_a_constant_channel_gives_exactly_bias(torch, name, constant):
    shape, axis = WHOLE[name] if name in WHOLE else SPLIT[name.partition(",")[0]]
    bias = cases.normal(shape[axis], np.float32)
    x = torch.put(np.full(shape, constant, np.float32))
    y, mean, invstd, _ = numbabn.batch_norm_forward(
        x, torch.put(bias * 3), torch.put(bias), axis=axis
    )
    wanted = np.broadcast_to(bias.reshape(cases.axis_shape(shape, axis)), shape)
    np.testing.assert_array_equal(torch.get(y), wanted)
    np.testing.assert_array_equal(torch.get(mean), np.float32(constant))
    np.testing.assert_array_equal(torch.get(invstd), 1 / np.sqrt(1e-5))


@cases.shapes
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_stay_in_their_channel(torch, shape, axis, bad):
    x = cases.normal(shape, np.float32)
    channel = np.moveaxis(x, axis, 0)[shape[axis] // 2]
    channel.flat[channel.size // 3] = bad
    given = torch.put(x)
    expected, _, _ = reference.forward(x, axis=axis)
    result = numbabn.batch_norm_forward(given, axis=axis)
    np.testing.assert_allclose(torch.get(result.y), expected, atol=4e-6)
    dx = numbabn.batch_norm_backward(given, given, None, *result[1:3], axis=axis).dx
    wrong = np.moveaxis(np.isnan(torch.get(dx)), axis, 0).reshape(shape[axis], -1).any(1)
    assert wrong.tolist() == [c == shape[axis] // 2 for c in range(shape[axis])]


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_sixteen_bit_number_is_read_and_rounded_right(torch, name):
    dtype = cases.NARROW[name].dtype
    x = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(-1, 1)
    zero, one = (torch.put(np.full(1, value, np.float32)) for value in (0, 1))
    for scale in (1.0, 1.00390625, 0.7, 3e-5, 1e4):
        weight = np.full(1, scale, np.float32)
        y = numbabn.batch_norm_inference(torch.put(x), zero, one, torch.put(weight), eps=0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (x.astype(np.float32) * weight).astype(dtype)
        np.testing.assert_array_equal(torch.get(y).astype(np.float32), expected.astype(np.float32))


def all_results(p):
    """Everything that a forward, an inference and a backward pass give, as bits."""
    running = [p.given[name] + 0 for name in ("running_mean", "running_var")]
    result = p.forward(running_mean=running[0], running_var=running[1])
    gradients = p.backward(
        result.mean, result.invstd, mask=result.mask, with_residual=p.residual is not None
    )
    stats = numbabn.batch_stats(p.given["x"], axis=p.axis)
    arrays = [*result, *gradients, stats.mean, stats.m2, p.inference(), *running]
    kept = [p.library.get(a) for a in arrays if a is not None]
    return [np.ascontiguousarray(a).view(np.uint8) for a in kept]


def check_bits(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def problem_of(torch, shape, axis, dtype, ulp):
    return Problem(torch, shape, axis, dtype, ulp, with_residual=True, activation="relu")


@pytest.mark.parametrize("name", [*WHOLE, *(f"{name}, several blocks" for name in SPLIT)])
@dtypes
def test_the_same_bits_every_time(torch, name, dtype, ulp):
    case = WHOLE[name] if name in WHOLE else SPLIT[name.partition(",")[0]]
    p = problem_of(torch, *case, dtype, ulp)
    expected = all_results(p)
    for _ in range(19):
        check_bits(all_results(p), expected)


@pytest.mark.parametrize("name", [*WHOLE, *(f"{name}, several blocks" for name in SPLIT)])
@dtypes
def test_the_same_bits_held_and_swept_twice(torch, monkeypatch, name, dtype, ulp):
    from numbabn import cuda

    case = WHOLE[name] if name in WHOLE else SPLIT[name.partition(",")[0]]
    p = problem_of(torch, *case, dtype, ulp)
    taken = []
    launch = cuda.runner.launch
    on_device.forget(monkeypatch)

    def noting(place, kernel, *arguments, **options):
        taken.append(kernel)
        launch(place, kernel, *arguments, **options)

    monkeypatch.setattr(cuda.runner, "launch", noting)
    expected = all_results(p)
    assert {"forward", "backward"} <= set(taken)
    taken.clear()
    monkeypatch.setattr(cuda, "is_held", lambda shape, capacity: False)
    on_device.forget(monkeypatch)
    check_bits(all_results(p), expected)
    assert not {"forward", "backward"} & set(taken)


@pytest.mark.parametrize("blocks", [1, 3, 64])
@pytest.mark.parametrize("name", [*WHOLE, *(f"{name}, several blocks" for name in SPLIT)])
def test_the_same_bits_on_any_number_of_blocks(torch, monkeypatch, name, blocks):
    """As if no more ran at once: fewer than wait for one another would wait for ever."""
    from numbabn import cuda

    case = WHOLE[name] if name in WHOLE else SPLIT[name.partition(",")[0]]
    p = problem_of(torch, *case, *DTYPES["float32"])
    expected = all_results(p)
    monkeypatch.setattr(cuda.runner, "capacity", lambda *arguments: blocks)
    monkeypatch.setattr(cuda.runner, "MOST_BLOCKS", blocks)
    on_device.forget(monkeypatch)
    check_bits(all_results(p), expected)
