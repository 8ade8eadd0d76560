"""Runs: their formulas at every length and alignment, their masks, and packed machine code."""

import platform
import re

import cases
import ml_dtypes
import numba
import numpy as np
import pytest
from numba import types

from numbabn import reference
from numbabn.cpu import compilation, planes, rows, vector
from numbabn.cpu.arguments import Strided
from numbabn.cpu.intrinsics import nothing, put, spread, store
from numbabn.layout import View

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000]
STORED = {
    np.dtype(np.float32): types.float32,
    np.dtype(np.float64): types.float64,
    np.dtype(np.float16): types.uint16,
    np.dtype(ml_dtypes.bfloat16): types.int16,
}
BITS = Strided(types.uint8)
all_dtypes = pytest.mark.parametrize("dtype", STORED, ids=str)


def view(array):
    return View(array, 0, 0, 1)


def sums(x, found, shift, size):
    data, total = x.data, found.data
    store(total, 0, spread(0.0))
    put(total, 16, shift)
    vector.sum_planes(data, data, 0, nothing(data), 0, 1, size, vector.moved(total, 16), 0, total)


def normalize(x, constants, y, mask, bit, step, size, streaming):
    data = x.data
    vector.normalize_run(
        vector.moved(data, 2), nothing(data), y.data, mask.data, bit, step, 0, size, size,
        constants.data, True, streaming,
    )  # fmt: skip


def gate(dy, x, constants, dx, mask, bit, step, size, streaming):
    data = x.data
    vector.gradient_run(
        dy.data, data, dx.data, nothing(data), mask.data, bit, step, 0, size, size,
        constants.data, False, streaming,
    )  # fmt: skip


def identity(dtype, scale):
    """Constants of a plane that change nothing: every number 0 but the scale."""
    constants = np.zeros(5, np.float64 if dtype == np.float64 else np.float32)
    constants[scale] = 1
    return view(constants)


def compiled(function, *kinds):
    dispatcher = numba.njit(**compilation._OPTIONS)(function)
    dispatcher.compile(kinds)
    return dispatcher


def call(function, *arguments):
    kinds = tuple(
        BITS
        if a is None
        else {View: None, float: types.float64, int: types.intp, bool: types.boolean}[type(a)]
        or Strided(STORED.get(a.array.dtype, types.uint8))
        for a in arguments
    )
    key = function, kinds
    if key not in call.cache:
        call.cache[key] = compiled(function, *kinds).overloads[kinds].entry_point
    return call.cache[key](*arguments)


call.cache = {}


@pytest.mark.parametrize("n", LENGTHS)
@all_dtypes
def test_sums(n, dtype):
    x = cases.normal(n, dtype, offset=100)
    found = np.zeros(17)
    call(sums, view(x), view(found), 100.0, n)
    parts = found[:16].reshape(2, 8).sum(1)
    deviations = x.astype(np.float64) - 100
    np.testing.assert_allclose(parts[0], deviations.sum(), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(parts[1], (deviations**2).sum(), rtol=1e-14)


def test_merge_is_the_moments_of_both():
    x = cases.normal(50, offset=7)
    _, mean, m2 = reference.statistics(x[:, None])

    @numba.njit
    def merge(*arguments):
        return vector.merge(*arguments)

    parts = [(float(part.size), part.mean(), part.var() * part.size) for part in (x[:20], x[20:])]
    count, got_mean, got_m2 = merge(*parts[0], *parts[1])
    assert count == 50
    np.testing.assert_allclose([got_mean, got_m2], [mean[0], m2[0]], rtol=1e-14)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("bit", [0, 1, 4, 5, 8, 13])
@pytest.mark.parametrize("step", [1, 9])
@pytest.mark.parametrize("streaming", [False, True])
@all_dtypes
def test_mask_round_trip(n, bit, step, streaming, dtype):
    x = cases.normal(n + 2, dtype)
    x[2 + n // 2] = np.nan
    x[0], x[1] = 0, 1
    y = np.full(n, 3, dtype)
    mask = np.zeros((bit + n * step) // 8 + 1, np.uint8)
    call(normalize, view(x), identity(dtype, 1), view(y), view(mask), bit, step, n, streaming)
    wide = x[2:].astype(np.float64)  # NumPy knows no NaN of bfloat16
    stopped = wide <= 0
    np.testing.assert_array_equal(y.astype(np.float64), np.where(stopped, 0, wide))
    bits = np.unpackbits(mask, bitorder="little").astype(bool)
    np.testing.assert_array_equal(bits[bit::step][:n], ~stopped)
    assert bits.sum() == (~stopped).sum()

    dy, dx = cases.normal(n, dtype, seed=1), np.full(n, 3, dtype)
    x[2 + n // 2] = 2  # what passed where y is not a number, here as a number
    arrays = view(dy), view(x), identity(dtype, 3), view(dx), view(mask)
    call(gate, *arrays, bit, step, n, streaming)
    np.testing.assert_array_equal(dx, np.where(stopped, np.zeros_like(dy), dy))


@pytest.mark.parametrize("n", [5, 16, 50])
@all_dtypes
def test_what_is_rounded_to_zero_does_not_pass(n, dtype):
    """Around half of the smallest number, where the mask must say what y holds."""
    smallest = ml_dtypes.finfo(dtype).smallest_subnormal
    for factor in (0.5, 0.75, 1.0):
        x, y = np.full(n + 2, smallest, dtype), np.full(n, 3, dtype)
        x[2::2] = 0
        mask = np.zeros(n // 8 + 1, np.uint8)
        constants = identity(dtype, 1)
        constants.array[1] = factor
        call(normalize, view(x), constants, view(y), view(mask), 0, 1, n, False)
        bits = np.unpackbits(mask, bitorder="little")[:n].astype(bool)
        np.testing.assert_array_equal(bits, y.astype(np.float64) != 0)
        # Halfway goes to the even one, which is 0.
        assert bits.any() == (factor > 0.5)


def test_packing_leaves_the_neighbours_bits():
    x, y = np.ones(22, np.float32), np.zeros(20, np.float32)
    x[0] = 0
    mask = np.full(4, 0b10000001, np.uint8)
    before = np.unpackbits(mask, bitorder="little")
    constants = identity(np.float32, 1)
    call(normalize, view(x), constants, view(y), view(mask), 3, 1, 20, False)
    after = np.unpackbits(mask, bitorder="little")
    assert after[3:23].all()
    np.testing.assert_array_equal(np.delete(after, np.s_[3:23]), np.delete(before, np.s_[3:23]))


def write_planes(x, constants, y, mask, start, stop, S, streaming):
    y, data = y.data, x.data
    vector.normalize_run(
        data, nothing(data), y, mask.data, 0, 1, start, stop, S,
        vector.moved(constants.data, 5), False, streaming,
    )  # fmt: skip


@pytest.mark.parametrize("S", [16, 17, 31, 50])
@pytest.mark.parametrize("offset", range(16))
@all_dtypes
def test_planes_are_written_by_their_own_constants(S, offset, dtype):
    """Lines that two planes share, for every place at which the first may begin in a line."""
    memory = np.full(5 * S + 64, 3, dtype)
    line = -memory.ctypes.data % 64 // memory.itemsize
    y = memory[line + 16 + offset :][: 4 * S]
    x = cases.normal(4 * S, dtype)
    computed = np.float64 if dtype == np.float64 else np.float32
    constants = np.zeros((4, 5), computed)
    constants[:, 0], constants[:, 1], constants[:, 2] = [0, 1, 2, 3], [1, 2, 3, 4], [5, 6, 7, 8]
    # Planes 1 to 3, from the line in which plane 1 begins, as far as plane 0 goes.
    lanes = (y[S:].ctypes.data % min(64, 16 * y.itemsize)) // y.itemsize
    for start in {0, -lanes}:
        for streaming in (False, True):
            memory.fill(3)
            call(
                write_planes, View(x[S:], 0, 0, 1), view(constants), View(y[S:], 0, 0, 1), None,
                start, 3 * S, S, streaming,
            )  # fmt: skip
            planes = x.astype(computed).reshape(4, S)
            wide = (planes - constants[:, :1]) * constants[:, 1:2] + constants[:, 2:3]
            expected = wide.astype(dtype).ravel()
            np.testing.assert_allclose(
                y[S + start :].astype(np.float64), expected[S + start :].astype(np.float64),
                rtol=0, atol=0.13 if dtype.itemsize == 2 else 64 * np.finfo(computed).eps,
            )  # fmt: skip
            before, after = line + 16 + offset + S + start, line + 16 + offset + 4 * S
            untouched = np.concatenate([memory[:before], memory[after:]])
            np.testing.assert_array_equal(untouched.astype(np.float64), 3)


# Vector registers by instruction set, and the arithmetic on several numbers at once: x86's
# "packed" instructions end in ps and pd, ARM's name their lanes.
PACKED = {
    "float32": re.compile(
        r"v?(add|sub|mul|fn?m(add|sub)\d*)ps\b|f(add|sub|mul|mla|mls)\s+v\d+\.[24]s"
    ),
    "float64": re.compile(
        r"v?(add|sub|mul|fn?m(add|sub)\d*)pd\b|f(add|sub|mul|mla|mls)\s+v\d+\.2d"
    ),
}


def assembly(function, *kinds):
    return "\n".join(compiled(function, *kinds).inspect_asm().values())


@all_dtypes
def test_arithmetic_is_packed(dtype):
    strided, bits = Strided(STORED[dtype]), Strided(types.uint8)
    constants = Strided(types.float64 if dtype == np.float64 else types.float32)
    sizes = *(types.intp,) * 3, types.boolean
    written = assembly(normalize, strided, constants, strided, bits, *sizes)
    assert PACKED["float64" if dtype == np.float64 else "float32"].search(written)
    wide = Strided(types.float64)
    assert PACKED["float64"].search(assembly(sums, strided, wide, types.float64, types.intp))


def test_the_check_of_packed_arithmetic_can_fail():
    def plain_sum(x, size):
        total = 0.0
        for i in range(size):
            total += vector.get(x.data, i)
        return total

    assert not PACKED["float64"].search(assembly(plain_sum, Strided(types.float64), types.intp))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86's assembly")
@pytest.mark.parametrize(
    ("kernel", "streams"),
    [(planes.normalize_planes, 3), (rows.normalize_rows, 2)],
    ids=["planes", "rows"],
)
@all_dtypes
def test_kernels_stream(kernel, streams, dtype):
    """LLVM can lose the wish to stream, of each place that streams by itself."""
    stored = STORED[dtype]
    kinds = [compilation._kind(name, stored) for name in (*kernel._kinds, "Memory", "Shape")]
    code = assembly(kernel._function, *kinds)
    assert len(re.findall(r"\bv?movnt(ps|pd|dq)\b", code)) >= streams
