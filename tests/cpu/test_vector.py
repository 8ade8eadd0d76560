"""Row primitives: their formulas at every length and alignment, and packed machine code."""

import re

import cases
import numba
import numpy as np
import pytest

from numbabn import reference
from numbabn.cpu import vector

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000]


@pytest.mark.parametrize("n", LENGTHS)
@cases.dtypes
def test_moments(n, dtype, ulp):
    x = cases.normal(n, dtype, offset=100)
    _, mean, m2 = reference.statistics(x[:, None])
    got_mean, got_m2 = vector.moments(x)
    np.testing.assert_allclose(got_mean, mean[0], rtol=1e-15)
    np.testing.assert_allclose(got_m2, m2[0], rtol=1e-13, atol=1e-13)


def test_merge_is_the_moments_of_both():
    x = cases.normal(50, offset=7)
    _, mean, m2 = reference.statistics(x[:, None])
    count, got_mean, got_m2 = vector.merge(0, 0.0, 0.0, 20, *vector.moments(x[:20]))
    count, got_mean, got_m2 = vector.merge(count, got_mean, got_m2, 30, *vector.moments(x[20:]))
    assert count == 50
    np.testing.assert_allclose([got_mean, got_m2], [mean[0], m2[0]], rtol=1e-14)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("bit", [0, 1, 5, 8, 13])
@cases.dtypes
def test_mask_round_trip(n, bit, dtype, ulp):
    y = cases.normal(n, dtype)
    y[n // 2] = np.nan
    mask = np.zeros(bit // 8 + n // 8 + 3, np.uint8)
    vector.pack(y, mask, bit, 1)
    bits = np.unpackbits(mask, bitorder="little").astype(bool)
    np.testing.assert_array_equal(bits[bit : bit + n], ~(y <= 0))
    assert not bits[:bit].any()
    assert not bits[bit + n :].any()

    dy, gated = cases.normal(n, dtype, seed=1), np.full(n, np.nan, dtype)
    vector.gate(dy, mask, bit, 1, gated)
    np.testing.assert_array_equal(gated, np.where(y <= 0, 0, dy))


def test_packing_leaves_the_neighbours_bits():
    y = np.ones(20)
    mask = np.full(4, 0b10000001, np.uint8)
    before = np.unpackbits(mask, bitorder="little")
    vector.pack(y, mask, 3, 1)
    after = np.unpackbits(mask, bitorder="little")
    assert after[3:23].all()
    np.testing.assert_array_equal(np.delete(after, np.s_[3:23]), np.delete(before, np.s_[3:23]))


@pytest.mark.parametrize("step", [2, 7, 9])
def test_mask_with_steps(step):
    y = cases.normal(30)
    mask = np.zeros(40, np.uint8)
    vector.pack(y, mask, 4, step)
    bits = np.unpackbits(mask, bitorder="little").astype(bool)
    np.testing.assert_array_equal(bits[4::step][:30], y > 0)
    assert bits.sum() == (y > 0).sum()
    gated = np.full(30, np.nan)
    vector.gate(y, mask, 4, step, gated)
    np.testing.assert_array_equal(gated, np.maximum(y, 0))


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


def arguments(name, stored, computed):
    row, wide, one = np.ones(64, stored), np.ones(64), computed(1)
    each = np.ones(64, computed)
    return {
        "moments": (row,),
        "normalize": (row, None, row, one, one, one, True),
        "normalize_columns": (row, row, row, each, each, each, True),
        "products": (row, row, 1.0),
        "input_gradient": (row, row, row, one, one, one, one, one),
        "input_gradient_columns": (row, row, row, each, each, each, each, each),
        "sum_columns": (row, wide, wide, wide),
        "merge_columns": (5, wide, wide, 7, wide, wide),
        "sum_products_columns": (row, row, wide, wide, wide),
    }[name]


def assembly(primitive, *arguments):
    signature = tuple(numba.typeof(argument) for argument in arguments)
    primitive.compile(signature)
    return primitive.inspect_asm(signature)


@pytest.mark.parametrize(
    ("name", "wide"),
    [
        ("moments", True),
        ("normalize", False),
        ("normalize_columns", False),
        ("products", True),
        ("input_gradient", False),
        ("input_gradient_columns", False),
        ("sum_columns", True),
        ("merge_columns", True),
        ("sum_products_columns", True),
    ],
)
@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        pytest.param(np.float32, np.float32, id="float32"),
        pytest.param(np.float64, np.float64, id="float64"),
        pytest.param(np.uint16, np.float32, id="float16"),
        pytest.param(np.int16, np.float32, id="bfloat16"),
    ],
)
def test_arithmetic_is_packed(name, wide, stored, computed):
    code = assembly(getattr(vector, name), *arguments(name, stored, computed))
    assert PACKED["float64" if wide else computed.__name__].search(code)


def test_the_check_of_packed_arithmetic_can_fail():
    @numba.njit  # no reassociation: the sum stays in order, one number at a time
    def plain_sum(x):
        total = 0.0
        for i in range(x.size):
            total += x[i]
        return total

    assert not PACKED["float64"].search(assembly(plain_sum, np.ones(64)))
