"""Numba's arrays, seen in its simulator: host memory behind the same interface."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import cases
import ml_dtypes
import numpy as np
import pytest
from numba import cuda
from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

import numbabn
from numbabn import backends
from numbabn.cuda import arrays, formats, workspace

dtypes = pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda d: d.__name__
)
SHAPE = (3, 4, 5, 6)


def seen(array):
    (view,) = backends.borrow(None, x=array)
    return view


def host(result):
    """Copy to the host whatever is on the device."""
    return [a if a is None else a.copy_to_host() for a in result]


class TestViews:
    @dtypes
    @cases.memory
    def test_as_of_numpy(self, lay, dtype):
        x = lay(cases.normal(SHAPE, dtype))
        array = FakeCUDAArray(x)
        view = seen(array)
        assert view.owner is array
        assert view.address == x.__array_interface__["data"][0]
        for name in ("shape", "strides", "dtype", "itemsize", "size", "ndim", "nbytes"):
            assert getattr(view, name) == getattr(x, name), name
        for name in ("aligned", "writeable", "c_contiguous"):
            assert getattr(view.flags, name) == getattr(x.flags, name), name

    def test_read_only(self):
        x = cases.normal(SHAPE)
        x.flags.writeable = False
        assert not seen(FakeCUDAArray(x)).flags.writeable

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0, 2), (1, 5, 1)])
    def test_few_or_no_elements(self, shape):
        view = seen(cuda.to_device(np.ones(shape)))
        assert view.shape == shape
        assert view.flags.c_contiguous


class TestAllocation:
    @dtypes
    @cases.memory
    def test_empty_like_keeps_the_order_of_axes(self, lay, dtype):
        x = lay(cases.normal(SHAPE, dtype))
        y = arrays.empty_like(seen(FakeCUDAArray(x)))
        expected = np.empty_like(x)
        assert isinstance(y.owner, FakeCUDAArray)
        assert (y.shape, y.strides, y.dtype) == (x.shape, expected.strides, x.dtype)

    @dtypes
    @cases.memory
    def test_copies_go_between_any_strides(self, lay, dtype):
        x = cases.normal(SHAPE, dtype)
        target, source = (seen(FakeCUDAArray(lay(a))) for a in (np.zeros_like(x), x))
        contiguous = arrays.contiguous(source)
        assert contiguous.flags.c_contiguous
        assert contiguous.address % formats.WORD == 0
        np.testing.assert_array_equal(arrays.download(contiguous), x)
        arrays.copy(target, contiguous)
        np.testing.assert_array_equal(target.owner.copy_to_host(), x)

    def test_what_is_contiguous_is_not_copied(self):
        x = seen(cuda.to_device(np.ones(SHAPE)))
        assert arrays.contiguous(x) is x
        bits = cuda.to_device(np.arange(9, dtype=np.uint8))
        assert arrays.contiguous(seen(bits[4:])).address == seen(bits).address + 4
        copied = arrays.contiguous(seen(bits[1:]))
        np.testing.assert_array_equal(arrays.download(copied), np.arange(1, 9))

    @dtypes
    def test_there_and_back(self, dtype):
        values = cases.normal(7, dtype)
        beside = seen(cuda.to_device(np.ones(SHAPE)))
        np.testing.assert_array_equal(arrays.download(arrays.upload(values, beside)), values)

    @pytest.mark.parametrize("size", [0, 1, 8, 9, 32, 33])
    def test_a_mask_is_zeros_within_whole_words(self, size):
        x = seen(cuda.to_device(np.ones((size, 1))))
        mask = arrays.allocate_mask(x)
        assert mask.shape == (-(-size // 8),)
        assert mask.owner.base is None or mask.owner.base.nbytes % formats.WORD == 0
        assert not mask.owner.copy_to_host().any()


class TestCalls:
    """From the public functions and back; the numbers are the kernels' tests to check."""

    def test_results_are_of_the_callers_kind(self):
        x, ones = cuda.to_device(cases.normal((4, 5, 6), np.float32)), np.ones(5, np.float32)
        weight = cuda.to_device(ones)
        result = numbabn.batch_norm_forward(x, weight, activation="relu")
        gradients = numbabn.batch_norm_backward(
            x, x, weight, result.mean, result.invstd, mask=result.mask, with_residual=True
        )
        stats = numbabn.batch_stats(x)
        y = numbabn.batch_norm_inference(x, weight, weight)
        for array in (*result, *gradients, stats.mean, stats.m2, y):
            assert isinstance(array, FakeCUDAArray)
        assert result.mean.dtype == stats.m2.dtype == np.float64
        on_host = numbabn.batch_norm_forward(x.copy_to_host(), ones, activation="relu")
        for got, expected in zip(host(result), on_host, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)

    @cases.memory
    def test_out_of_any_strides(self, lay):
        x = cases.normal(SHAPE)
        out = FakeCUDAArray(lay(np.zeros_like(x)))
        y = numbabn.batch_norm(FakeCUDAArray(np.asfortranarray(x)), training=True, out=out)
        assert y is out
        expected = numbabn.batch_norm(x, training=True)
        np.testing.assert_allclose(y.copy_to_host(), expected, atol=1e-12)

    @pytest.mark.parametrize("shape", [(0, 3), (5, 3, 0)], ids=str)
    def test_an_empty_batch(self, shape):
        x = cuda.to_device(np.ones(shape))
        result = numbabn.batch_norm_forward(x, activation="relu")
        y, mean, invstd, mask = host(result)
        assert y.shape == shape
        assert mask.shape == (0,)
        np.testing.assert_array_equal(mean, np.zeros(3))
        np.testing.assert_array_equal(invstd, 1 / np.sqrt(np.full(3, 1e-5)))
        gradients = numbabn.batch_norm_backward(x, x, None, *result[1:3], with_residual=True)
        dx, dweight, dbias, dresidual = host(gradients)
        assert dx.shape == dresidual.shape == shape
        np.testing.assert_array_equal([dweight, dbias], np.zeros((2, 3)))
        assert numbabn.batch_stats(x).count == 0

    def test_numpy_beside(self):
        x = cuda.to_device(np.ones((4, 3)))
        expected = r"weight: expected a Numba array on CUDA device 0, as x is, got ndarray"
        with pytest.raises(TypeError, match=expected):
            numbabn.batch_norm_forward(x, np.ones(3))

    def test_overlap(self):
        x = cuda.to_device(np.ones((5, 3)))
        with pytest.raises(ValueError, match=r"out: expected memory of its own.*with x"):
            numbabn.batch_norm(x[1:], training=True, out=x[:4])
        assert numbabn.batch_norm(x, training=True, out=x) is x

    @pytest.mark.parametrize("stream", ["7", 7.0, True, object()], ids=repr)
    def test_no_stream(self, stream):
        x = cuda.to_device(np.ones((4, 3)))
        with pytest.raises(TypeError, match="stream: expected None, a CUDA stream or its handle"):
            numbabn.batch_stats(x, stream=stream)


class TestParameters:
    def test_off_their_alignment_are_refused(self):
        x = cuda.to_device(np.ones((4, 3), np.float32))
        packed = np.zeros(3, [("a", np.uint8), ("b", np.float32)])["b"]
        running = cuda.to_device(np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="weight: expected an address and strides that are"):
            numbabn.batch_norm(x, running, None, FakeCUDAArray(packed), training=True)
        assert not running.copy_to_host().any()

    def test_workspaces_of_threads_own_streams(self, monkeypatch):
        per_thread, legacy = 2, 1
        # As of a thread that has ended, whose identifier another one has.
        alike = SimpleNamespace(get_ident=lambda: 7, RLock=threading.RLock)
        monkeypatch.setattr(workspace, "threading", alike)
        here = workspace.workspace_of(0, per_thread)
        assert here is workspace.workspace_of(0, per_thread)
        assert here is not workspace.workspace_of(0, legacy)
        with ThreadPoolExecutor(1) as pool:
            assert here is not pool.submit(workspace.workspace_of, 0, per_thread).result()


class TestStatistics:
    def test_what_needs_no_arithmetic(self):
        x = cuda.to_device(cases.normal((4, 3)))
        stats = numbabn.batch_stats(x)
        assert numbabn.BatchStats() + stats is stats
        with pytest.raises(TypeError, match="m2: expected an array of a library with arithmetic"):
            _ = stats.var
        with pytest.raises(TypeError, match="mean: expected an array of a library with arith"):
            stats.merge(stats)
        with pytest.raises(TypeError, match="other: expected statistics in FakeCUDAArray, got nda"):
            stats.merge(numbabn.batch_stats(x.copy_to_host()))


class TestLayer:
    def test_goes_to_the_device_and_stays(self):
        x = cases.normal((4, 3), np.float32)
        layer, expected = numbabn.BatchNorm(3), numbabn.BatchNorm(3)
        dx = layer(cuda.to_device(x)), layer.backward(cuda.to_device(x))
        close = [expected(x), expected.backward(x)]
        for got, want in zip(host(dx), close, strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)
        for name in ("weight", "bias", "running_mean", "running_var", "grad_weight", "grad_bias"):
            assert isinstance(getattr(layer, name), FakeCUDAArray), name
        for name, array in layer.state_dict().items():
            assert isinstance(array, np.ndarray)
            np.testing.assert_allclose(array, expected.state_dict()[name], rtol=1e-5)
        with pytest.raises(TypeError, match="x: expected a CUDA array, since the layer's weight"):
            layer(x)
        state = {name: array + 1 for name, array in layer.state_dict().items()}
        weight = layer.weight
        layer.load_state_dict(state)
        assert layer.weight is weight
        np.testing.assert_array_equal(weight.copy_to_host(), state["weight"])
        assert layer.eval()(cuda.to_device(x)).shape == x.shape

    def test_a_failing_forward_leaves_it_where_it_is(self):
        layer = numbabn.BatchNorm(3)
        with pytest.raises(ValueError, match="x: expected more than one value per channel"):
            layer(cuda.to_device(np.ones((1, 3), np.float32)))
        assert isinstance(layer.weight, np.ndarray)
