"""The public functions in functions that numba compiles: the same bits, and what they refuse."""

import subprocess
import sys

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError

import numbabn
from numbabn import BatchStats, reference
from numbabn.overloads import functional


def arrays(shape, axis, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, dy, residual = rng.standard_normal((3, *shape)).astype(dtype)
    C = shape[axis]
    weight, bias = rng.standard_normal((2, C)).astype(dtype)
    return x, dy, residual, weight, bias, np.zeros(C, dtype), np.ones(C, dtype)


def step(x, dy, residual, weight, bias, running_mean, running_var, axis):
    y, mean, invstd, mask = numbabn.batch_norm_forward(
        x, weight, bias, running_mean, running_var, momentum=0.3, axis=axis,
        residual=residual, activation="relu", correction=0,
    )  # fmt: skip
    dx, dweight, dbias, dresidual = numbabn.batch_norm_backward(
        dy, x, weight, mean, invstd, axis=axis, mask=mask, with_residual=True
    )
    z = numbabn.batch_norm_inference(x, running_mean, running_var, weight, axis=axis)
    stats = numbabn.batch_stats(x, axis=axis)
    numbabn.update_running_stats(running_mean, running_var, stats, momentum=0.3)
    return y, mean, invstd, mask, dx, dweight, dbias, dresidual, z, stats.mean, stats.m2


compiled_step = njit(step)


@pytest.mark.parametrize(
    ("shape", "axis", "dtype"),
    [
        ((37, 21), 1, "float32"),
        ((6, 19, 7, 7), 1, "float32"),
        ((6, 7, 9, 33), -1, "float32"),
        ((5, 4, 9, 11, 3), 1, "float32"),
        ((300, 5, 71), 1, "float64"),
        ((6, 70, 3), -1, "float64"),
    ],
    ids=str,
)
def test_same_bits_as_in_python(shape, axis, dtype):
    here, there = (arrays(shape, axis, dtype) for _ in range(2))
    for a, b in zip(compiled_step(*here, axis), step(*there, axis), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    for a, b in zip(
        here, there, strict=True
    ):  # running statistics, and inputs that stay as they are
        np.testing.assert_array_equal(a, b)


def test_the_oracle_agrees():
    x, dy, residual, weight, bias, *running = arrays((16, 24, 10, 10), 1, "float32")
    y, mean, invstd, *_ = compiled_step(x + 1e4, dy, residual, weight, bias, *running, 1)
    wanted = reference.forward(
        x + np.float32(1e4), weight, bias, residual=residual, activation="relu"
    )
    np.testing.assert_allclose(y, wanted[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(mean, wanted[1], rtol=1e-14)
    np.testing.assert_allclose(invstd, wanted[2], rtol=1e-10)


@njit
def normalized(x, out):
    return numbabn.batch_norm(x, training=True, axis=1, out=out)


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (1, 0, 2, 3), (2, 3, 0, 1)])
def test_views_of_any_order(order):
    back = np.argsort(order)
    x = np.random.default_rng(1).standard_normal((4, 18, 8, 6)).astype(np.float32)
    x = np.ascontiguousarray(x.transpose(order)).transpose(back)
    y = normalized(x, None)
    np.testing.assert_array_equal(y, numbabn.batch_norm(x, training=True))
    assert y.strides == numbabn.batch_norm(x, training=True).strides


def test_what_has_no_view_is_copied():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((8, 20, 9, 14)).astype(np.float32)[::2, :, ::2, ::2]
    memory = np.full((4, 20, 10, 21), 7, np.float32)
    out = memory[:, :, ::2, ::3]
    assert normalized(x, out) is not None
    np.testing.assert_array_equal(out, numbabn.batch_norm(x, training=True))
    assert (memory[:, :, 1::2] == 7).all()


@njit
def step_in_place(x, dy, weight, running_mean, running_var):
    y, mean, invstd, _ = numbabn.batch_norm_forward(x, weight, None, running_mean, running_var)
    gradients = numbabn.batch_norm_backward(dy, x, weight, mean, invstd, with_residual=True, out=dy)
    numbabn.batch_norm_inference(x, running_mean, running_var, out=x)
    return y, numbabn.batch_stats(x).mean, gradients.dx, gradients.dweight, gradients.dresidual


def test_fields_of_records_and_unaligned_arrays_are_copied():
    data = np.zeros((2, 6, 37), [("pad", "u1"), ("x", "f4")])
    data["x"] = arrays((6, 37), 1, "float32")[:2]
    parameters = np.zeros(37, [("pad", "u1"), ("weight", "f4"), ("mean", "f4"), ("var", "f4")])
    parameters["weight"], parameters["var"] = 2, 1
    fields = [*data["x"], *(parameters[name] for name in ("weight", "mean", "var"))]
    plain = [field.copy() for field in fields]
    for a, b in zip(step_in_place(*fields), step_in_place(*plain), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(fields, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not data["pad"].any()
    assert not parameters["pad"].any()

    large = np.zeros(6 * 32 * 1000 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(6, 32, 1000)
    large[...] = arrays((6, 32, 1000), 1, "float32")[0]
    wanted = numbabn.batch_norm(large.copy(), training=True)
    np.testing.assert_array_equal(normalized(large, large), wanted)
    np.testing.assert_array_equal(large, wanted)


@pytest.mark.parametrize("shape", [(0, 18, 5, 5), (4, 18, 0, 5), (4, 18, 5, 0)])
def test_empty_batches(shape):
    @njit
    def run(x):
        y, mean, invstd, _ = numbabn.batch_norm_forward(x, out=x)
        gradients = numbabn.batch_norm_backward(x, x, None, mean, invstd, out=x)
        numbabn.batch_norm_inference(x, mean, invstd)
        return y.shape, gradients.dweight

    y_shape, dweight = run(np.zeros(shape))
    assert y_shape == shape
    np.testing.assert_array_equal(dweight, np.zeros(18))


def test_in_place_and_within_a_parallel_loop():
    @njit(parallel=True)
    def each(xs, mean, var):
        for i in prange(len(xs)):
            numbabn.batch_norm_inference(xs[i], mean, var, out=xs[i])

    xs = np.random.default_rng(3).standard_normal((40, 6, 20, 12, 12)).astype(np.float32)
    mean, var = np.full(20, 0.5, np.float32), np.full(20, 2, np.float32)
    wanted = [numbabn.batch_norm_inference(x, mean, var) for x in xs]
    each(xs, mean, var)
    np.testing.assert_array_equal(xs, wanted)


def test_training_may_be_chosen_when_it_runs():
    @njit
    def run(x, mean, var, training):
        return numbabn.batch_norm(x, mean, var, training=training)

    @njit
    def without(x, training):
        return numbabn.batch_norm(x, training=training)

    x = arrays((9, 5), 1, "float64")[0]
    for training in (True, False):
        here, there = ([np.zeros(5), np.ones(5)] for _ in range(2))
        np.testing.assert_array_equal(
            run(x, *here, training), numbabn.batch_norm(x, *there, training=training)
        )
        np.testing.assert_array_equal(here, there)
    np.testing.assert_array_equal(without(x, True), numbabn.batch_norm(x, training=True))
    with pytest.raises(ValueError, match=r"running_mean: expected an array of shape \(C,\)"):
        without(x, False)


def test_statistics_go_in_and_out_and_merge():
    @njit(fastmath=True)  # of the caller alone
    def merged(stats, x):
        total = BatchStats() + stats
        total += numbabn.batch_stats(x)
        return total, total.var, total.unbiased_var, total.invstd(0.5), total.count

    x = arrays((40, 700), 1, "float64")[0]
    x[:, 0] = 1e150
    first = BatchStats(25, *(a[::-1] for a in (x[0].copy(), x[1] ** 2)))  # of another stride
    first.mean[:2] = -1e308, np.inf

    total, var, unbiased, invstd, count = merged(first, x)
    wanted = first + numbabn.batch_stats(x)
    assert type(total) is BatchStats
    assert count == total.count == wanted.count
    np.testing.assert_array_equal(total.mean, wanted.mean)
    np.testing.assert_array_equal(total.m2, wanted.m2)
    np.testing.assert_array_equal(var, wanted.var)
    np.testing.assert_array_equal(unbiased, wanted.unbiased_var)
    np.testing.assert_array_equal(invstd, wanted.invstd(0.5))


def test_statistics_are_made_of_arrays_of_one_length():
    @njit
    def made(mean, m2):
        return BatchStats(3, mean, m2)

    stats = made(np.arange(6, dtype=np.float32)[::2], np.ones(3))
    np.testing.assert_array_equal(stats.mean, [0, 2, 4])
    with pytest.raises(
        ValueError, match=r"mean, m2: expected one shape \(C,\), got \(3,\) and \(2,\)"
    ):
        made(np.ones(3, np.float32), np.ones(2))


@njit
def update(running_mean, running_var, stats):
    numbabn.update_running_stats(running_mean, running_var, stats, momentum=0.3)


def test_running_statistics_have_the_same_bits_and_distinct_numbers():
    x, _, _, *running = arrays((50, 1000), 1, "float64")[:5]
    stats = numbabn.batch_stats(x)
    here, there = ([array.copy() for array in running] for _ in range(2))
    update(*here, stats)
    numbabn.update_running_stats(*there, stats, momentum=0.3)
    np.testing.assert_array_equal(here, there)
    one = np.lib.stride_tricks.as_strided(np.zeros(1), (1000,), (0,))
    with pytest.raises(ValueError, match="running_var: expected distinct elements"):
        update(here[0], one, stats)


def test_infinity_and_not_a_number_come_through():
    x = arrays((6, 18, 5, 5), 1, "float32")[0]
    x[2, 3, 1, 1], x[0, 7, 0, 0] = np.nan, np.inf
    np.testing.assert_array_equal(normalized(x, None), numbabn.batch_norm(x, training=True))


@njit
def train(x, weight, running_mean, running_var, eps, axis, out):
    return numbabn.batch_norm_forward(
        x, weight, None, running_mean, running_var, eps=eps, axis=axis, out=out
    ).y


BASE = np.arange(400.0).reshape(10, 5, 8)
REFUSED = {
    "weight: expected shape (5,), got (4,)": {"weight": np.ones(4)},
    "running_var: expected shape (5,), got (6,)": {"running_var": np.ones(6)},
    "eps: expected a finite number": {"eps": -1.0},
    "axis: expected -3 to 2, got 3": {"axis": 3},
    "out: expected the shape of x, got 9 along axis 0": {"out": np.empty((9, 5, 8))},
    "x: expected more than one value per channel": {"x": BASE[:1, :, :1], "out": BASE[:1, :, :1]},
    "out: expected memory of its own, got an overlap with x": {"x": BASE[1:], "out": BASE[:-1]},
    "out: expected distinct elements": {
        "out": np.lib.stride_tricks.as_strided(np.zeros((5, 8)), BASE.shape, (0, 64, 8))
    },
    "out: expected distinct elements in memory, got a stride of 64 bytes along axis 1": {
        "out": np.lib.stride_tricks.as_strided(np.zeros(90), BASE.shape, (64, 64, 8))
    },
    "running_mean: expected distinct elements": {
        "running_mean": np.lib.stride_tricks.as_strided(np.zeros(1), (5,), (0,))
    },
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_values_are_refused_before_anything_is_written(message):
    changed = REFUSED[message]
    given = {
        "x": BASE, "weight": np.ones(5), "running_mean": np.zeros(5), "running_var": np.ones(5),
        "eps": 1e-5, "axis": 1, "out": np.empty_like(BASE),
    } | changed  # fmt: skip
    before = [a.copy() for a in given.values() if isinstance(a, np.ndarray)]
    with pytest.raises(ValueError, match="^" + message.replace("(", r"\(").replace(")", r"\)")):
        train(*given.values())
    after = [a for a in given.values() if isinstance(a, np.ndarray)]
    for a, b in zip(after, before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_arrays_may_lie_side_by_side():
    x = arrays((8, 5, 6), 1, "float32")[0]
    memory = np.zeros((4, 5), np.float32)
    weight, mean, var, _ = memory
    weight[:], var[:] = 2, 1
    wanted = numbabn.batch_norm(x, np.zeros(5, "f4"), np.ones(5, "f4"), weight, training=True)
    np.testing.assert_array_equal(train(x, weight, mean, var, 1e-5, 1, np.empty_like(x)), wanted)
    assert memory[1:3].all()


FROZEN = np.empty((3, 4), np.float32)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: numbabn.batch_stats(x.astype(np.int64)), "x: expected an array of float32 or"),
        (lambda x: numbabn.batch_stats(x[0]), "x: expected 2 or more dimensions"),
        (lambda x: numbabn.batch_stats(x, axis=1.0), "axis: expected an integer"),
        (
            lambda x: numbabn.batch_norm_forward(x, activation="gelu"),
            "activation: expected None or 'relu', as a literal",
        ),
        (
            lambda x: numbabn.batch_norm_forward(x, np.ones(4)),
            "weight: expected a 1d array of float32",
        ),
        (
            lambda x: numbabn.batch_norm_forward(x, residual=x.astype(np.float64)),
            "residual: expected an array of float32, 2d, like x",
        ),
        (lambda x: numbabn.batch_norm_forward(x, out=FROZEN), "out: expected a writeable array"),
        (lambda x: numbabn.batch_norm(x), r"running_mean: expected an array of shape \(C,\)"),
        (lambda x: numbabn.batch_norm(x, training=1), "training: expected True or False"),
        (lambda x: numbabn.batch_norm_forward(x, eps="0"), "eps: expected a real number"),
        (
            lambda x: numbabn.batch_norm_forward(x, eps=np.float16(1)),
            "eps: expected a real number, got float16",
        ),
        (lambda x: numbabn.batch_stats(x).invstd("0"), "eps: expected a real number"),
        (lambda x: numbabn.batch_stats(x) + None, "other: expected BatchStats, got none"),
        (lambda x: BatchStats(1.5, x[0], x[0]), "count: expected an integer, got float64"),
        (lambda x: BatchStats(2, x, x), "mean: expected a 1d array of float32 or float64"),
    ],
)
def test_wrong_types_are_refused_while_compiling(call, message):
    with pytest.raises(TypingError, match=message):
        njit(call)(np.ones((3, 4), np.float32))


USER = """
import sys

import numpy as np
from numba import njit

import numbabn
from numbabn.cpu import compilation

if sys.argv[1:]:
    compilation._digest = lambda kinds: "of_another_version"

@njit(cache=True)
def stats(x):
    return numbabn.batch_stats(x).mean

x = np.arange(12.0).reshape(6, 2)
assert (stats(x) == [5, 6]).all()
print(sum(stats.stats.cache_hits.values()))
"""


def test_a_caller_kept_on_disk_finds_its_kernels_and_is_compiled_anew_for_others(tmp_path):
    program = tmp_path / "user.py"
    program.write_text(USER)

    def hits(*argv):
        command = [sys.executable, "-W", "error", program, *argv]
        return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    assert hits() == 0
    assert hits() == 1
    assert hits("other") == 0


def test_every_public_function_is_there():
    covered = {
        name for name in numbabn.__all__
        if name.startswith("batch_") or name == "update_running_stats"
    }  # fmt: skip
    assert covered <= {name.removeprefix("_") for name in vars(functional)}
