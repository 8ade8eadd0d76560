"""What can be known of other libraries' arrays without a GPU.

PyTorch's tensors are real, but on the CPU, where its adapter is told that they belong.
"""

import warnings
from types import SimpleNamespace

import cases
import ml_dtypes
import numpy as np
import pytest

import numbabn
from numbabn.libraries import ANY, Place, form_of, host_of, library_of, namespace

HOST = Place(None, 0, 0, False)


@pytest.fixture(scope="module")
def arrays():
    pytest.importorskip("numba_cuda")
    from numbabn.cuda import arrays

    return arrays


@pytest.fixture(scope="module")
def adapters():
    pytest.importorskip("numba_cuda")
    from numbabn.cuda import adapters

    return adapters


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing it says is not ours to mend
        return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax")


@pytest.fixture
def adapter(adapters, torch):
    class OnTheHost(adapters._Torch):
        def _device(self, place):
            return "cpu"

    return OnTheHost()


class TestForms:
    def test_one_object_for_arrays_of_one_kind(self):
        shape, strides = (2, 3), (12, 4)
        form = form_of(shape, strides, np.dtype(np.float32))
        assert form_of(shape, strides, np.dtype("f4")) is form
        for other in (
            form_of(shape, (4, 8), np.dtype(np.float32)),
            form_of(shape, strides, np.dtype(np.int32)),
            form_of(shape, strides, np.dtype(">f4")),
        ):
            assert other is not form

    @cases.memory
    def test_reach(self, lay):
        x = lay(cases.normal((3, 5, 4, 6), np.float32))
        form = form_of(x.shape, x.strides, x.dtype)
        places = np.zeros(x.shape, np.int64)  # of each element, in bytes from the first
        for index, step in zip(np.indices(x.shape), x.strides, strict=True):
            places += index * step
        assert (form.low, form.high) == (places.min(), places.max() + 4)
        assert (form.size, form.nbytes, form.ndim) == (x.size, x.nbytes, x.ndim)
        assert form.c_contiguous == x.flags.c_contiguous
        assert form.whole_steps == all(step % 4 == 0 for step in x.strides)

    def test_nothing_to_reach(self):
        form = form_of((3, 0, 2), (8, 8, 4), np.dtype(np.float32))
        assert (form.low, form.high, form.size, form.c_contiguous) == (0, 0, 0, True)


class TestLibraries:
    def test_numpy(self):
        for array in (np.zeros(2), np.zeros(2).view(np.recarray)):
            assert library_of(array) == "numpy"
        for array in ([1.0], 1.0, np.float64(1), None, np.ma.masked_array([1.0])):
            assert library_of(array) is None

    def test_torch(self, torch):
        for array in (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))):
            assert library_of(array) == "torch"
            assert host_of(array) == "the CPU"
            assert namespace("x", array) is torch

    def test_jax(self, jax):
        array = jax.numpy.zeros(2)
        assert library_of(array) == "jaxlib"
        assert host_of(array) == "the CPU"
        assert namespace("x", array) is jax.numpy

    def test_protocols(self):
        class Array:
            def __dlpack_device__(self):
                return 2, 0

        assert library_of(Array()) == ANY
        assert host_of(Array()) is None
        with pytest.raises(TypeError, match="x: expected an array of a library with arithmetic"):
            namespace("x", Array())

    def test_on_no_device_that_is_known(self, torch):
        x = torch.ones(4, 3, device="meta")
        expected = "x: expected an array on the CPU or a CUDA device, got a Tensor on the META"
        with pytest.raises(TypeError, match=expected):
            numbabn.batch_norm(x, training=True)
        with pytest.raises(TypeError, match=expected):
            numbabn.BatchNorm(3)(x)

    def test_on_the_cpu_beside_numpy_is_refused(self, torch):
        with pytest.raises(TypeError, match="weight: expected a NumPy array, got Tensor"):
            numbabn.batch_norm_forward(np.ones((4, 3), np.float32), torch.ones(3))


class TestTorch:
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "uint8"])
    def test_view(self, torch, adapter, dtype):
        memory = torch.zeros(4, 6, 5, dtype=getattr(torch, dtype))
        for array in (memory, memory[:, ::2, 1:], memory.transpose(0, 2), memory[:, :1]):
            view = adapter.view("x", array, HOST)
            assert view.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
            assert view.shape == tuple(array.shape)
            assert view.strides == tuple(s * array.element_size() for s in array.stride())
            assert view.address == array.data_ptr()
            assert view.flags.c_contiguous == array.is_contiguous()
            assert view.flags.writeable

    def test_a_gradient_is_no_obstacle(self, torch, adapter):
        leaf = torch.ones(3, requires_grad=True)
        view = adapter.view("x", leaf, HOST)
        assert view.owner is leaf
        adapter.clear(view)
        np.testing.assert_array_equal(adapter.download(view), np.zeros(3))

    def test_no_numbers_as_they_are(self, torch, adapter):
        with pytest.raises(TypeError, match="x: expected numbers as they are"):
            adapter.view("x", torch.zeros(3, dtype=torch.complex64).conj().imag, HOST)
        quantized = SimpleNamespace(
            dtype="torch.quint8", shape=(3,), stride=lambda: (1,), is_neg=lambda: False
        )
        with pytest.raises(TypeError, match=r"x: expected a float dtype, got torch\.quint8"):
            adapter.view("x", quantized, HOST)

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
    def test_allocate_and_copy(self, torch, adapter, arrays, dtype):
        values = cases.normal((2, 3, 4, 5), dtype)
        place = HOST._replace(library=adapter)
        x = adapter.view("x", adapter.upload(values, place), place)
        np.testing.assert_array_equal(adapter.download(x), values)
        last = x.owner.to(memory_format=torch.channels_last)
        like = arrays.empty_like(adapter.view("x", last, place))
        assert like.owner.stride() == last.stride()
        assert like.owner.is_contiguous(memory_format=torch.channels_last)
        arrays.copy(like, x)
        np.testing.assert_array_equal(arrays.download(like), values)
        mask = arrays.allocate_mask(x)
        assert mask.shape == (15,)
        assert mask.owner.untyped_storage().nbytes() == 16
        assert not mask.owner.any()


class TestStatistics:
    """By PyTorch's arithmetic; what it makes of CUDA tensors it makes of these."""

    @pytest.fixture
    def on_device(self, torch, monkeypatch):
        monkeypatch.setattr(
            numbabn.stats, "is_on_device", lambda array: library_of(array) == "torch"
        )

        def stats(x):
            count, mean, m2 = numbabn.batch_stats(x).__dict__.values()
            return numbabn.BatchStats(count, torch.from_numpy(mean), torch.from_numpy(m2))

        return stats

    def test_as_by_numpy(self, torch, on_device):
        x = cases.normal((9, 3), offset=5)
        host = numbabn.batch_stats(x)
        merged = numbabn.BatchStats() + on_device(x[:4]) + on_device(x[4:])
        whole = on_device(x)
        for stats in (merged, whole):
            for name in ("mean", "m2", "var", "unbiased_var"):
                array = getattr(stats, name)
                assert array.dtype == torch.float64
                np.testing.assert_allclose(array, getattr(host, name), rtol=1e-13)
            np.testing.assert_allclose(stats.invstd(), host.invstd(), rtol=1e-13)
        with pytest.raises(TypeError, match="other: expected statistics in Tensor, got ndarray"):
            merged.merge(host)


class TestProtocol:
    def test_dlpack(self, adapters):
        class Array:
            def __init__(self, array):
                self.array = array

            def __dlpack_device__(self):
                return self.array.__dlpack_device__()

            def __dlpack__(self, **_):
                return self.array.__dlpack__()

        adapter = adapters._Protocol()
        memory = np.zeros((4, 6), np.float32)
        for x in (memory, memory[:, ::2]):
            view = adapter.view("x", Array(x), HOST)
            assert (view.address, view.shape) == (x.ctypes.data, x.shape)
            assert (view.strides, view.dtype) == (x.strides, x.dtype)


class TestStreams:
    def test_handles(self, adapters):
        for stream in (
            7,
            np.int64(7),
            SimpleNamespace(cuda_stream=7),
            SimpleNamespace(ptr=7),
            SimpleNamespace(handle=7),
            SimpleNamespace(__cuda_stream__=lambda: (0, 7), handle=8),
        ):
            assert adapters.handle_of(stream) == 7
        with pytest.raises(ValueError, match="stream: expected a CUDA stream's handle, got -1"):
            adapters.handle_of(-1)
        for no_stream in ("7", None, 7.0, True):
            with pytest.raises(TypeError, match="stream: expected None, a CUDA stream or its han"):
                adapters.handle_of(no_stream)
