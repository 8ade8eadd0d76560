"""Statistics of a data set in batches against the oracle on all of it."""

import sys
import weakref
from itertools import pairwise

import cases
import numpy as np
import pytest

import numbabn
from numbabn import reference

METHODS = ("exact", "paper")
methods = pytest.mark.parametrize("method", METHODS)
SIZES = (5, 2, 9, 3)  # values of N, unequal


def batches(shape, axis, dtype=np.float64):
    """Differ in size along an axis that is not the channel's."""
    along = 0 if axis % len(shape) else 1

    def resized(size):
        return [size if i == along else n for i, n in enumerate(shape)]

    return [
        cases.normal(resized(size), dtype, seed=size, offset=10 * i) for i, size in enumerate(SIZES)
    ]


def close(stats, given, axis, method, count=None):
    C = given[0].shape[axis]
    mean, var = reference.population(given, axis=axis, method=method)
    assert stats.count == (sum(batch.size // C for batch in given) if count is None else count)
    assert stats.mean.shape == stats.m2.shape == (C,)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-13)
    np.testing.assert_allclose(stats.var, var, rtol=1e-12)


@methods
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis"), [((0, 3), 1), ((0, 3, 2, 2), 1), ((0, 2, 2, 3), -1), ((3, 0), 0)], ids=str
)
def test_unequal_batches(shape, axis, dtype, method):
    given = batches(shape, axis, dtype)
    close(numbabn.population_stats(given, axis=axis, method=method), given, axis, method)


def test_exact_is_the_default_and_differs_from_paper():
    given = [np.array([[0.0], [2.0]]), np.array([[3.0], [5.0], [7.0], [9.0]])]
    exact = numbabn.population_stats(given)
    np.testing.assert_array_equal([exact.count, *exact.mean], [6, 26 / 6])
    np.testing.assert_allclose(exact.var, 168 / 6 - (26 / 6) ** 2, rtol=1e-14)
    paper = numbabn.population_stats(given, method="paper")
    # Means 1 and 6; unbiased variances 2 and 20/3.
    np.testing.assert_array_equal([paper.count, *paper.mean], [6, 3.5])
    np.testing.assert_allclose(paper.var, (2 + 20 / 3) / 2, rtol=1e-14)


@methods
def test_a_generator_is_consumed_once_and_holds_one_batch(method):
    given = batches((0, 3), 1)
    alive = []

    def generator():
        for batch in given:
            assert [made for made in alive if made() is not None] == []
            fresh = batch.copy()
            alive.append(weakref.ref(fresh))
            yield fresh
            del fresh

    source = generator()
    close(numbabn.population_stats(source, method=method), given, 1, method)
    assert len(alive) == len(given)
    assert next(source, None) is None


@methods
def test_one_array_is_one_batch(method):
    x = cases.normal((7, 3, 2))
    close(numbabn.population_stats(x, method=method), [x], 1, method)


@methods
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_memmap(tmp_path, mode, method):
    x = cases.normal((50, 3), np.float32)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, mode, shape=x.shape)
    close(numbabn.population_stats(mapped, method=method), [x], 1, method)
    slices = (mapped[a:b] for a, b in pairwise([0, 7, 20, 50]))
    close(
        numbabn.population_stats(slices, method=method), np.split(x, [7, 20]), 1, method
    )  # fmt: skip


@methods
def test_empty_batches_are_left_out(method):
    given = batches((0, 3), 1)
    empty = np.empty((0, 3))
    with_empty = [empty, given[0], empty, *given[1:], empty]
    got = numbabn.population_stats(with_empty, method=method)
    expected = numbabn.population_stats(given, method=method)
    assert got.count == expected.count
    np.testing.assert_array_equal([got.mean, got.m2], [expected.mean, expected.m2])


@methods
def test_nothing_but_empty_batches(method):
    stats = numbabn.population_stats([np.empty((0, 3))] * 2, method=method)
    assert stats.count == 0
    np.testing.assert_array_equal([stats.mean, stats.m2], np.zeros((2, 3)))


@methods
def test_no_batches(method):
    stats = numbabn.population_stats(iter(()), method=method)
    assert (stats.count, stats.mean.shape, stats.m2.shape) == (0, (0,), (0,))


def test_batches_of_one_value():
    given = np.split(cases.normal((4, 3)), 4)
    close(numbabn.population_stats(given), given, 1, "exact")
    with pytest.raises(ValueError, match=r"^batches: expected more than one value.*, got 1"):
        numbabn.population_stats(given, method="paper")


class Dataset:
    """As h5py's: no array, but with rows to iterate over."""

    shape, dtype = (4, 3, 2), np.dtype(np.float32)

    def __iter__(self):
        return iter(np.ones(self.shape, self.dtype))


@pytest.mark.parametrize("offset", [1e4, 1e8])
def test_far_from_zero(offset):
    given = [offset + batch for batch in batches((0, 3), 1)]
    stats = numbabn.population_stats(given)
    mean, var = reference.population(given)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-15)
    np.testing.assert_allclose(stats.var, var, rtol=1e-15 * offset)


@methods
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, "batches: expected an iterable, got NoneType"),
        (7.0, TypeError, "batches: expected an iterable, got float"),
        ([[[1.0, 2.0]]], TypeError, "x: expected an array on the CPU or a CUDA device, got list"),
        (Dataset(), TypeError, "batches: expected an array, or .* slices of it, got Dataset"),
        (
            np.ma.ones((4, 3)),
            TypeError,
            "batches: expected an array, or .*, got MaskedArray, whose",
        ),
        ([np.ma.ones((4, 3))], TypeError, "x: expected an array on .*, got MaskedArray, whose"),
        (
            [np.ones((4, 3), int)],
            TypeError,
            "x: expected float16, bfloat16, float32 or float64, got int64",
        ),
        ([np.ones(4)], ValueError, r"x: expected 2 or more dimensions, got shape \(4,\)"),
        ([np.ones((4, 3)), np.ones((4, 2))], ValueError, "expected 3 channels, got 2"),
        ([np.ones((4, 3)), np.ones((0, 2))], ValueError, "expected 3 channels, got 2"),
        ([np.ones((0, 3)), np.ones((4, 2))], ValueError, "expected 3 channels, got 2"),
    ],
)
def test_errors(given, error, message, method):
    with pytest.raises(error, match=message):
        numbabn.population_stats(given, method=method)


def test_axis_and_method_errors():
    with pytest.raises(ValueError, match=r"axis: expected -2 to 1 .*, got 2"):
        numbabn.population_stats([np.ones((4, 3))], axis=2)
    with pytest.raises(ValueError, match=r"method: expected 'exact' or 'paper', got 'Exact'"):
        numbabn.population_stats([np.ones((4, 3))], method="Exact")


@pytest.fixture
def dask_array():
    return pytest.importorskip("dask.array")


class TestDask:
    @methods
    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize(
        ("shape", "axis", "chunks"),
        [
            ((19, 3), 1, ((5, 2, 9, 3), 3)),
            ((19, 3, 4, 6), 1, ((5, 14), 3, 2, (5, 1))),
            ((19, 7), 1, ((5, 14), (3, 4))),
            ((9, 4, 5, 7), -1, ((2, 7), 4, 5, (1, 2, 4))),
            ((7, 9), 0, ((3, 4), (5, 4))),
            ((13, 5, 7), 1, ((6, 7), (2, 0, 3), 7)),
        ],
        ids=str,
    )
    def test_against_the_oracle(self, dask_array, shape, axis, chunks, dtype, method):
        x = cases.normal(shape, dtype, offset=10)
        plan = dask_array.from_array(x, chunks=chunks)
        # A batch has all channels, whatever chunks these are in.
        whole = plan.rechunk({axis % x.ndim: -1})
        given = [np.asarray(whole.blocks[i]) for i in np.ndindex(whole.numblocks)]
        close(numbabn.population_stats(plan, axis=axis, method=method), given, axis, method)

    @methods
    @pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
    def test_holds_one_chunk(self, dask_array, scheduler, method):
        dask = pytest.importorskip("dask")
        alive, at_once = [], []

        def load(block_info=None):
            at_once.append(sum(made() is not None for made in alive))
            seed = block_info[None]["chunk-location"][0]
            fresh = cases.normal(block_info[None]["chunk-shape"], seed=seed)
            alive.append(weakref.ref(fresh))
            return fresh

        chunks, meta = ((4, 5, 6, 7), (3, 2)), np.empty((0, 0))
        plan = dask_array.map_blocks(load, chunks=chunks, meta=meta)
        with dask.config.set(scheduler=scheduler):
            stats = numbabn.population_stats(plan, method=method)
        assert stats.count == 22
        assert at_once == [0] * 8

    @methods
    def test_empty_chunks_are_left_out(self, dask_array, method):
        x = cases.normal((7, 3))
        plan = dask_array.from_array(x, chunks=((0, 4, 0, 3), (3,)))
        close(numbabn.population_stats(plan, method=method), [x[:4], x[4:]], 1, method)

    def test_sixteen_bits(self, dask_array):
        x = cases.normal((7, 3), np.float16)
        close(
            numbabn.population_stats(dask_array.from_array(x, chunks=4)), [x[:4], x[4:]], 1, "exact"
        )

    @methods
    @pytest.mark.parametrize(
        ("shape", "dtype", "axis", "error", "message"),
        [
            ((4, 3), int, 1, TypeError, "batches: expected float16, .* or float64, got int64"),
            ((4, 3), ">f4", 1, TypeError, "batches: expected .*, got >f4 .byte-swapped.|>f4"),
            ((4,), float, 1, ValueError, r"batches: expected 2 or more dimensions, got .*\(4,\)"),
            ((4, 3), float, 2, ValueError, "axis: expected -2 to 1 .*, got 2"),
            ((4, 3), float, 1.0, TypeError, "axis: expected an integer, got float"),
        ],
    )
    def test_refused_before_anything_is_computed(
        self, dask_array, shape, dtype, axis, error, message, method
    ):
        def load():
            raise AssertionError("computed")

        meta = np.empty([0] * len(shape), dtype)
        plan = dask_array.map_blocks(load, chunks=[(n,) for n in shape], meta=meta)
        with pytest.raises(error, match=message):
            numbabn.population_stats(plan, axis=axis, method=method)

    def test_work_grows_as_the_number_of_chunks(self, dask_array):
        """Not as its square, as where each chunk's turn looks through the whole plan."""

        def calls(chunks):
            plan = dask_array.from_array(cases.normal((chunks, 3)), chunks=(1, 3))[::-1] * 2
            events = []
            sys.setprofile(lambda frame, event, argument: events.append(event))
            try:
                numbabn.population_stats(plan)
            finally:
                sys.setprofile(None)
            return events.count("call")

        with pytest.importorskip("dask").config.set(scheduler="synchronous"):
            calls(1)  # imports what it needs
            assert calls(200) < 2.1 * calls(100)

    def test_chunks_of_another_kind(self, dask_array):
        plan = dask_array.from_array(np.ones((4, 3)), chunks=2).map_blocks(np.ma.masked_array)
        with pytest.raises(TypeError, match=r"x: expected an array .*, got MaskedArray"):
            numbabn.population_stats(plan)

    def test_chunks_of_one_value(self, dask_array):
        plan = dask_array.from_array(cases.normal((4, 3)), chunks=(1, 3))
        close(numbabn.population_stats(plan), np.split(np.asarray(plan), 4), 1, "exact")
        with pytest.raises(ValueError, match=r"^batches: expected more than one value.*, got 1"):
            numbabn.population_stats(plan, method="paper")
