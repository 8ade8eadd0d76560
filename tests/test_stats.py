"""BatchStats against the oracle on the samples taken together, and exact fractions."""

from fractions import Fraction
from functools import reduce
from itertools import permutations

import cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import numbabn
from numbabn import BatchStats, reference


def stats_of(x):
    return BatchStats(*reference.statistics(x))


def parts(x, *borders):
    return [stats_of(part) for part in np.split(x, borders)]


def together(each):
    return reduce(BatchStats.merge, each, BatchStats())


def same(a, b):
    assert a.count == b.count
    np.testing.assert_array_equal(a.mean, b.mean)
    np.testing.assert_array_equal(a.m2, b.m2)


def close(stats, x, ulps=8):
    """Compare with the oracle, in units in the last place of the largest values."""
    count, mean, m2 = reference.statistics(x)
    assert stats.count == count
    unit = ulps * 2**-53 * np.abs(x).max()
    np.testing.assert_allclose(stats.mean, mean, rtol=0, atol=unit)
    # The rounding of the means goes into M2 by the square of their difference.
    np.testing.assert_allclose(stats.m2, m2, rtol=1e-13, atol=count * unit * (np.ptp(x) + unit))


class TestDerived:
    def test_by_hand(self):
        stats = BatchStats(4, np.array([2.0, -1.0]), np.array([12.0, 0.0]))
        np.testing.assert_array_equal(stats.var, [3.0, 0.0])
        np.testing.assert_array_equal(stats.unbiased_var, [4.0, 0.0])
        np.testing.assert_array_equal(stats.invstd(1.0), [0.5, 1.0])
        np.testing.assert_allclose(stats.invstd(), [(3 + 1e-5) ** -0.5, 1e-5**-0.5], rtol=1e-15)

    @pytest.mark.parametrize("convert", [list, tuple, np.float32], ids=["list", "tuple", "float32"])
    def test_kept_in_float64(self, convert):
        stats = BatchStats(4, convert([2.0, -1.0]), convert([12.0, 0.0]))
        same(stats, BatchStats(4, np.array([2.0, -1.0]), np.array([12.0, 0.0])))
        assert stats.mean.dtype == stats.m2.dtype == np.float64

    def test_by_numpy(self):
        x = cases.normal((9, 3), offset=3)
        stats = numbabn.batch_stats(x)
        np.testing.assert_allclose(stats.var, x.var(axis=0), rtol=1e-14)
        np.testing.assert_allclose(stats.unbiased_var, x.var(axis=0, ddof=1), rtol=1e-14)

    @pytest.mark.parametrize(("count", "var"), [(0, np.nan), (1, 0.0)])
    def test_too_few_values(self, count, var):
        """No warnings, which would be errors."""
        stats = BatchStats(count, np.full(2, 3.0), np.zeros(2))
        np.testing.assert_array_equal(stats.var, [var] * 2)
        np.testing.assert_array_equal(stats.unbiased_var, [np.nan] * 2)
        np.testing.assert_array_equal(stats.invstd(0.25), [2.0 if count else np.nan] * 2)
        np.testing.assert_array_equal(stats.invstd(0.0), [np.inf if count else np.nan] * 2)

    @pytest.mark.parametrize("count", [1, 2])
    @pytest.mark.parametrize("m2", [np.nan, np.inf])
    def test_not_finite(self, count, m2):
        stats = BatchStats(count, np.full(1, np.inf), np.full(1, m2))
        np.testing.assert_array_equal(stats.var, [m2])
        np.testing.assert_array_equal(stats.unbiased_var, [m2 if count > 1 else np.nan])
        np.testing.assert_array_equal(stats.invstd(), [1 / m2])


class TestEmpty:
    def test_starts_empty(self):
        for stats, C in [(BatchStats(), 0), (BatchStats.empty(3), 3)]:
            same(stats, BatchStats(0, np.zeros(C), np.zeros(C)))
            assert stats.mean.dtype == stats.m2.dtype == np.float64

    def test_two_share_no_memory(self):
        for make in (BatchStats, lambda: BatchStats.empty(3)):
            a, b = make(), make()
            assert len({id(array) for array in (a.mean, a.m2, b.mean, b.m2)}) == 4

    @pytest.mark.parametrize("empty", [BatchStats(), BatchStats.empty(3)], ids=["()", "(3)"])
    def test_merges_with_any(self, empty):
        stats = stats_of(cases.normal((5, 3)))
        same(empty + stats, stats)
        same(stats + empty, stats)
        same(empty + BatchStats.empty(3), BatchStats.empty(3))
        same(BatchStats.empty(3) + empty, BatchStats.empty(3))

    def test_starts_a_sum(self):
        x = cases.normal((6, 3))
        same(sum(parts(x, 2, 4), BatchStats()), together(parts(x, 2, 4)))
        same(sum([], BatchStats()), BatchStats())


class TestMerge:
    @pytest.mark.parametrize("offset", [0.0, 1e4, -1e8])
    @pytest.mark.parametrize("border", [0, 1, 2, 17, 36, 37])
    def test_two_parts(self, border, offset):
        x = cases.normal((37, 3), offset=offset)
        first, second = parts(x, border)
        close(first.merge(second), x)
        same(first + second, first.merge(second))

    def test_by_hand(self):
        merged = BatchStats(1, np.array([2.0]), np.array([0.0])).merge(
            BatchStats(3, np.array([6.0]), np.array([8.0]))
        )
        same(merged, BatchStats(4, np.array([5.0]), np.array([20.0])))

    def test_many_parts_far_from_zero_against_exact_fractions(self):
        x = cases.normal((999, 1), offset=1e8)
        values = [Fraction(v) for v in x[:, 0].tolist()]
        mean = sum(values) / len(values)
        m2 = sum((v - mean) ** 2 for v in values)
        merged = together(parts(x, *range(1, 999)))
        assert abs(Fraction(merged.mean.item()) - mean) <= 100 * Fraction(1e8 * 2**-53)
        assert abs(Fraction(merged.m2.item()) - m2) <= Fraction(1, 10**8) * m2

    def test_order_and_grouping_matter_to_rounding_only(self):
        x = cases.normal((12, 3), offset=100)
        for a, b, c in permutations(parts(x, 1, 5)):
            close((a + b) + c, x)
            close(a + (b + c), x)

    @pytest.mark.parametrize("value", [0.1, -3.7, 1e10, 1e308])
    def test_a_constant_stays_exact(self, value):
        merged = together(parts(np.full((10, 2), value), 1, 4, 9))
        same(merged, BatchStats(10, np.full(2, value), np.zeros(2)))

    def test_operands_are_unchanged(self):
        first, second = parts(cases.normal((9, 3)), 4)
        arrays = [first.mean, first.m2, second.mean, second.m2]
        before = [a.copy() for a in arrays]
        merged = first + second
        np.testing.assert_array_equal(arrays, before)
        assert (first.count, second.count) == (4, 5)
        assert not any(np.shares_memory(new, a) for new in (merged.mean, merged.m2) for a in arrays)
        with pytest.raises(AttributeError):
            first.count = 5

    def test_counts_beyond_32_bits(self):
        count = 3 * 2**40
        a, b = (BatchStats(count, np.array([mean]), np.zeros(1)) for mean in (0.0, 2.0))
        same(a + b, BatchStats(2 * count, np.array([1.0]), np.array([2.0 * count])))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(
        st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
        st.lists(st.integers(0, 30), max_size=5),
        st.sampled_from([0.0, 1e8]),
    )
    def test_any_split(self, values, borders, offset):
        x = np.reshape(values, (-1, 1)) + offset
        close(together(parts(x, *sorted(borders))), x, ulps=32)


class TestNotFinite:
    @pytest.mark.parametrize(
        ("first", "second", "mean"),
        [
            ([np.inf], [1.0, 2.0], np.inf),
            ([1.0, 2.0], [-np.inf], -np.inf),
            ([np.inf], [np.inf, 1.0], np.inf),
            ([np.inf], [-np.inf], np.nan),
            ([np.nan], [1.0, 2.0], np.nan),
            ([np.inf], [np.nan], np.nan),
        ],
        ids=str,
    )
    def test_as_in_one_batch(self, first, second, mean):
        for a, b in [(first, second), (second, first)]:
            x = np.array([*a, *b])[:, None]
            merged = together(parts(x, len(a)))
            same(merged, stats_of(x))
            np.testing.assert_array_equal(merged.mean, [mean])

    def test_the_difference_overflows(self):
        """Only M2 is beyond float64, the mean is not."""
        merged = together(parts(np.array([1.5e308, -1.5e308, -1.5e308, -1.5e308])[:, None], 1))
        np.testing.assert_allclose(merged.mean, [-0.75e308])
        np.testing.assert_array_equal(merged.m2, [np.inf])


class TestErrors:
    @pytest.mark.parametrize(
        ("mean", "m2"),
        [
            (np.ones(3), np.ones(2)),
            (np.ones(3), np.ones(1)),
            (np.ones((3, 1)), np.ones((3, 1))),
            (np.float64(1), np.float64(1)),
        ],
        ids=["3 and 2", "3 and 1", "2-d", "0-d"],
    )
    def test_no_numbers_per_channel(self, mean, m2):
        with pytest.raises(ValueError, match=r"mean, m2: expected one shape \(C,\), got \("):
            BatchStats(4, mean, m2)

    def test_different_channels(self):
        for count in (0, 4):  # a batch of no values has channels too
            other = BatchStats(count, np.zeros(2), np.zeros(2))
            for a, b in [(stats_of(np.ones((4, 3))), other), (BatchStats.empty(3), other)]:
                with pytest.raises(ValueError, match=r"other: expected 3 channels, got 2"):
                    a.merge(b)

    @pytest.mark.parametrize("other", [None, 0, (1, np.ones(3), np.ones(3))], ids=repr)
    def test_no_stats(self, other):
        stats = BatchStats.empty(3)
        with pytest.raises(
            TypeError, match=rf"other: expected BatchStats.* {type(other).__name__}"
        ):
            stats.merge(other)
        with pytest.raises(TypeError):
            stats + other
