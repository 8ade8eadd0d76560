"""Functions for a caller's own kernel, against the float64 oracle: numbers, ends, and who waits."""

import math
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import ml_dtypes
import numba
import numpy as np
import pytest

from numbabn import reference
from numbabn.cuda import device as bn
from numbabn.cuda import simulator as gpu
from numbabn.cuda.formats import THREADS, WARP

EXAMPLE = Path(__file__).parents[3] / "examples" / "cuda_epilogue.py"
EPS = 1e-5


def aligned(values, shift=0):
    """Copy to an address that is a multiple of 64 bytes, plus some numbers."""
    values = np.asarray(values)
    memory = np.zeros(values.nbytes + 128 + shift * values.itemsize, np.uint8)
    start = -memory.ctypes.data % 64 + shift * values.itemsize
    copy = memory[start : start + values.nbytes].view(values.dtype)
    copy[...] = values
    return copy


def normal(size, offset=0.0, seed=0):
    return np.random.default_rng(seed).normal(offset, 1.0, size).astype(np.float32)


def sum_up(x):
    moments = bn.no_moments()
    for i in range(4 * gpu.thread(), len(x), 4 * gpu.threads()):
        moments = bn.add4(moments, bn.load4(x, i), len(x) - i)
    return moments


def stats_of(x, threads=THREADS):
    """Give what each thread of a block gets."""
    out = []
    gpu.run(lambda: out.append(bn.block_stats(sum_up(x))), 1, threads, ())
    assert len(out) == threads
    return out


def check_stats(stats, x, accuracy=2e-7):
    count, (mean,), (m2,) = reference.statistics(x[:, None])
    assert stats.count == count
    assert stats.mean == pytest.approx(mean, rel=0, abs=accuracy * math.sqrt(m2 / count))
    assert stats.m2 == pytest.approx(m2, rel=accuracy)


def check_normalized(x, weight, bias):
    y = aligned(np.full(len(x), np.nan, np.float32))

    def kernel():
        stats = bn.block_stats(sum_up(x))
        constants = bn.affine(stats.mean, stats.m2 / stats.count, weight, bias, EPS)
        for i in range(4 * gpu.thread(), len(x), 4 * gpu.threads()):
            bn.store4(y, i, bn.normalize4(bn.load4(x, i), constants))

    gpu.run(kernel, 1, THREADS, ())
    expected, _, _ = reference.forward(x[:, None], [weight], [bias], eps=EPS)
    np.testing.assert_allclose(y, expected[:, 0], rtol=0, atol=4e-6)


class TestStatistics:
    @pytest.mark.real_blocks
    @pytest.mark.parametrize("offset", [0.0, 1e2, 1e4, 1e6])
    @pytest.mark.parametrize("size", [63, 1000])
    def test_of_a_block(self, size, offset):
        x = aligned(normal(size, offset))
        check_stats(stats_of(x)[0], x)
        check_normalized(x, 1.5, -0.25)

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 4 * THREADS - 1, 4 * THREADS + 1])
    def test_at_the_ends(self, size):
        x = aligned(normal(size, 3.0))
        check_stats(stats_of(x)[0], x)

    def test_every_thread_gets_the_same(self):
        stats = stats_of(aligned(normal(1000)))
        assert len({*stats}) == 1

    @pytest.mark.parametrize("threads", [WARP, 2 * WARP])
    def test_of_other_blocks(self, threads):
        x = aligned(normal(333, 7.0))
        check_stats(stats_of(x, threads)[0], x)

    def test_of_rows_that_begin_anywhere(self):
        x = aligned(normal(300, 7.0), shift=1)
        check_stats(stats_of(x)[0], x)

    def test_twice(self):
        x, other = aligned(normal(100)), aligned(normal(200, 5.0, seed=1))
        out = []
        gpu.run(
            lambda: out.append((bn.block_stats(sum_up(x)), bn.block_stats(sum_up(other)))),
            1, THREADS, (),
        )  # fmt: skip
        check_stats(out[0][0], x)
        check_stats(out[0][1], other)

    def test_of_no_numbers(self):
        stats = stats_of(aligned(normal(0)))[0]
        np.testing.assert_equal([*stats], [0, np.nan, 0])

    @pytest.mark.parametrize("value", [0.1, -3e7, 0.0])
    def test_a_constant_channel_gives_bias(self, value):
        x = aligned(np.full(301, value, np.float32))
        stats = stats_of(x)[0]
        assert (stats.mean, stats.m2) == (x[0], 0.0)
        constants = bn.affine(stats.mean, 0.0, 0.7, 0.3, EPS)
        assert bn.normalize4(x[:4], constants) == (np.float32(0.3),) * 4

    @pytest.mark.parametrize("at", [0, 1, 130, 500])
    @pytest.mark.parametrize("values", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]])
    def test_what_is_not_finite_comes_through(self, values, at):
        x = normal(502)
        x[at : at + len(values)] = values
        x = aligned(x)
        stats = stats_of(x)[0]
        _, (mean,), (m2,) = reference.statistics(x[:, None])
        np.testing.assert_equal([stats.count, stats.mean, stats.m2], [502, mean, m2])
        check_normalized(x, 1.5, -0.25)


class TestOneThread:
    """Errors that would grow with the count show in one thread, which needs no simulator."""

    @staticmethod
    def moments(x):
        moments = bn.no_moments()
        for i in range(0, len(x), 4):
            moments = bn.add4(moments, tuple(x[i : i + 4]), len(x) - i)
        return moments

    @staticmethod
    def errors(moments, x):
        """Of mean and variance, by standard deviation and variance."""
        mean = np.float64(moments.mean) + np.float64(moments.mean_rest)
        var = (np.float64(moments.m2) + np.float64(moments.m2_rest)) / len(x)
        true = x.astype(np.float64)
        return abs(mean - true.mean()) / true.std(), abs(var / true.var() - 1)

    @pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
    def test_of_many_numbers(self, offset):
        x = normal(100_000, offset)
        assert max(self.errors(self.moments(x), x)) < 3e-8

    def test_the_rests_are_needed(self):
        x = normal(100_000, 1e3)
        moments = self.moments(x)
        none = np.float32(0)
        assert self.errors(moments._replace(mean_rest=none), x)[0] > 1e-6
        assert self.errors(moments._replace(m2_rest=none), x)[1] > 3e-8

    @pytest.mark.parametrize("first", [1e3, -1e5])
    def test_after_an_outlier(self, first):
        x = normal(20_000)
        x[0] = first
        assert max(self.errors(self.moments(x), x)) < 2e-7

    def test_counts_below_one_add_nothing(self):
        moments = bn.add4(bn.no_moments(), (1.0, 2.0, 3.0, 4.0), 3)
        for count in (0, -5):
            assert bn.add4(moments, (np.nan,) * 4, count) == moments

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_what_lies_behind_the_count_is_left_out(self, count):
        values = 5.0, 7.0, 6.0, 8.0
        beyond = (*values[:count], *[np.nan] * (4 - count))
        moments = bn.add4(bn.no_moments(), beyond, count)
        assert moments.count == count
        assert moments.mean == pytest.approx(np.mean(values[:count]))
        assert moments.m2 == pytest.approx(count * np.var(values[:count]))


class TestFourNumbers:
    DTYPES = np.float32, np.float64, np.int8, np.int32, ml_dtypes.bfloat16

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shift", range(4))
    @pytest.mark.parametrize("size", [1, 3, 4, 10])
    def test_a_copy(self, size, shift, dtype):
        x = aligned(np.arange(1, size + 1).astype(dtype), shift)
        y = aligned(np.zeros(size + 8, dtype), shift)
        for i in range(0, size, 4):
            values = bn.load4(x, i)
            assert [*values] == [*x[i : i + 4], *[0] * (4 - len(x[i : i + 4]))]
            bn.store4(y[4 : 4 + size], i, values)
        assert y.tolist() == [0] * 4 + x.tolist() + [0] * 4

    def test_at_once_only_where_it_may(self, monkeypatch):
        moved = []
        at_once = bn.get_four
        monkeypatch.setattr(bn, "get_four", lambda x, i: moved.append(i) or at_once(x, i))
        x = aligned(normal(11))
        for i in range(len(x)):
            bn.load4(x, i)
        assert moved == [0, 4]

    def test_behind_the_end(self):
        x = aligned(normal(6))
        assert bn.load4(x, 6) == bn.load4(x, 100) == (0, 0, 0, 0)
        before = x.copy()
        bn.store4(x, 6, (1, 1, 1, 1))
        assert (x == before).all()

    def test_numbers_are_converted(self):
        y = aligned(np.zeros(5, np.int8))
        bn.store4(y, 0, (np.float32(-127), np.float32(3.7), 5, 127))
        bn.store4(y, 4, (np.float32(-2.5), 0, 0, 0))
        assert y.tolist() == [-127, 3, 5, 127, -2]

    @pytest.mark.parametrize("move", [gpu.get_four, lambda x, i: gpu.put_four(x, i, (0,) * 4)])
    def test_the_simulator_tells_what_would_go_wrong(self, move):
        x = aligned(normal(8))
        with pytest.raises(IndexError, match="16 bytes at an address that is no multiple"):
            move(x, 2)
        for i in (-4, 5):
            with pytest.raises(IndexError, match=f"4 numbers from {i} on, of 8"):
                move(x, i)


class TestAffine:
    def test_the_mean_s_remainder_goes_into_the_shift(self):
        mean, var = 1e6 + 0.01, 4.0
        constants = bn.affine(mean, var, 2.0, 1.0, 0.0)
        x = np.float32([1e6, 1e6 + 1, 1e6 - 3, 1e6 + 0.5])
        expected = (x.astype(np.float64) - mean) / 2 * 2 + 1
        np.testing.assert_allclose(bn.normalize4(x, constants), expected, rtol=0, atol=2e-6)
        assert all(type(each) is np.float32 for each in constants)

    def test_running_statistics(self):
        constants = bn.affine(np.float32(3), np.float32(0.25), np.float32(1), np.float32(0), 0.0)
        assert constants == (3, 2, 0)


def test_numba_s_own_simulator_is_refused():
    @numba.cuda.jit
    def kernel(x):
        bn.block_stats(sum_up(x))

    with pytest.raises(RuntimeError, match="expected `run` to run the threads, got Numba's own"):
        kernel[1, WARP](np.zeros(4, np.float32))


# The example.


class Index:
    """A ``threadIdx`` and its kin."""

    def __init__(self, read):
        self._read = read

    @property
    def x(self):
        return self._read()


class Event:
    def record(self):
        pass

    def synchronize(self):
        pass


class Launched:
    """A kernel that runs in here."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, sizes):
        return lambda *arguments: gpu.run(self.function, *sizes, arguments)


class Cuda:
    """As much of ``numba.cuda`` as the example uses."""

    threadIdx, blockIdx, blockDim = (  # noqa: N815
        Index(read) for read in (gpu.thread, gpu.block, gpu.threads)
    )
    event = Event

    def jit(self, function=None, device=False):
        return (lambda each: each) if device else Launched(function)

    def to_device(self, array):
        return self.device_array(array.shape, array.dtype, array)

    def device_array(self, shape, dtype, values=np.nan):
        with np.errstate(invalid="ignore"):
            fresh = np.full(shape, values).astype(dtype)
        return aligned(fresh.reshape(-1)).reshape(shape).view(OnDevice)

    def event_elapsed_time(self, start, end):
        return 1.0


class OnDevice(np.ndarray):
    def copy_to_host(self):
        return np.array(self)


@pytest.mark.real_blocks
@pytest.mark.parametrize("beyond", [0, 13])
def test_the_example(beyond, monkeypatch, capsys):
    monkeypatch.setattr(numba, "cuda", Cuda())
    spec = spec_from_file_location("cuda_epilogue", EXAMPLE)
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    example.N, example.C, example.S = 2, 3, 4 * THREADS + beyond
    example.THREADS, example.TIMES = THREADS, 1
    example.run_on_gpu()
    assert "agrees with float64" in capsys.readouterr().out
