"""PyTorch, CuPy, Numba and JAX on a real GPU: in, out, and in the order of streams."""

import warnings

import cases
import ml_dtypes
import numpy as np
import pytest

import numbabn
from numbabn import reference
from numbabn.libraries import float64_in_jax

pytestmark = pytest.mark.gpu

FLOATS = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
SHAPE = (8, 33, 7, 9)


def imported(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing it says is not ours to mend
        return pytest.importorskip(name)


class Torch:
    def __init__(self):
        self.torch = imported("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("no GPU for PyTorch")
        self.kind = self.torch.Tensor

    def put(self, values):
        if values.dtype == ml_dtypes.bfloat16:
            bits = self.torch.from_numpy(np.ascontiguousarray(values).view(np.int16))
            return bits.view(self.torch.bfloat16).cuda()
        return self.torch.from_numpy(np.ascontiguousarray(values)).cuda()

    def get(self, array):
        if array.dtype == self.torch.bfloat16:
            return array.cpu().view(self.torch.int16).numpy().view(ml_dtypes.bfloat16)
        return array.cpu().numpy()

    def busy_stream(self):
        stream = self.torch.cuda.Stream()
        with self.torch.cuda.stream(stream):
            self.torch.cuda._sleep(100_000_000)
        return stream

    def current(self, stream):
        return self.torch.cuda.stream(stream)


class CuPy:
    def __init__(self):
        self.cupy = imported("cupy")
        if not self.cupy.cuda.is_available():
            pytest.skip("no GPU for CuPy")
        self.kind = self.cupy.ndarray

    def put(self, values):
        return self.cupy.asarray(values)

    def get(self, array):
        return self.cupy.asnumpy(array)

    def busy_stream(self):
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            large = self.cupy.ones((4096, 4096), np.float32)
            for _ in range(20):
                large = large @ large
        return stream

    def current(self, stream):
        return stream


class Numba:
    def __init__(self):
        imported("numba_cuda")
        from numba import cuda

        if not cuda.is_available():
            pytest.skip("no GPU for Numba")
        self.cuda = cuda
        self.kind = cuda.cudadrv.devicearray.DeviceNDArray

    def put(self, values):
        return self.cuda.to_device(np.ascontiguousarray(values))

    def get(self, array):
        return array.copy_to_host()


class JAX:
    def __init__(self):
        self.jax = imported("jax")
        if not any(device.platform == "gpu" for device in self.jax.devices()):
            pytest.skip("no GPU for JAX")
        self.kind = self.jax.Array

    def put(self, values):
        with float64_in_jax():
            return self.jax.numpy.asarray(values)

    def get(self, array):
        return np.asarray(array)


@pytest.fixture(params=[Torch, CuPy, Numba, JAX], ids=lambda kind: kind.__name__)
def library(request):
    return request.param()


@pytest.fixture(params=[Torch, CuPy], ids=lambda kind: kind.__name__)
def streaming(request):
    return request.param()


def close(got, expected, dtype):
    tolerance = {"float16": 4e-3, "bfloat16": 4e-2, "float32": 2e-5}.get(np.dtype(dtype).name, 1e-9)
    scale = max(1.0, np.abs(expected.astype(np.float64)).max())
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
    assert error <= tolerance * scale


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("axis", [1, -1])
def test_in_and_out(library, dtype, axis):
    x, dy = (cases.normal(SHAPE, dtype, seed=seed) for seed in range(2))
    weight = np.abs(cases.normal(SHAPE[axis], dtype, seed=2))
    y, mean, invstd = reference.forward(x, weight, axis=axis, activation="relu")
    given = [library.put(a) for a in (x, dy, weight)]
    result = numbabn.batch_norm_forward(given[0], given[2], axis=axis, activation="relu")
    gradients = numbabn.batch_norm_backward(
        given[1], given[0], given[2], result.mean, result.invstd,
        axis=axis, mask=result.mask, with_residual=True,
    )  # fmt: skip
    bits = np.unpackbits(library.get(result.mask), bitorder="little", count=x.size)
    passed = bits.reshape(SHAPE).astype(bool)
    expected = reference.backward(dy, x, weight, mean, invstd, axis=axis, mask=passed)
    kinds = dtype, np.float64, np.float64, dtype, dtype, dtype, dtype
    for got, want, kind in zip(
        (*result[:3], *gradients), (y, mean, invstd, *expected), kinds, strict=True
    ):
        assert isinstance(got, library.kind)
        host = library.get(got)
        assert (host.dtype, host.shape) == (kind, want.shape)
        close(host, want, dtype)


def test_statistics_stay(library):
    x = cases.normal(SHAPE, np.float32)
    stats = numbabn.batch_stats(library.put(x))
    assert isinstance(stats.mean, library.kind)
    if isinstance(library, Numba | JAX):
        return
    parts = numbabn.batch_stats(library.put(x[:3])) + numbabn.batch_stats(library.put(x[3:]))
    running = [library.put(np.full(SHAPE[1], v, np.float32)) for v in (0, 1)]
    numbabn.update_running_stats(*running, parts)
    start = [np.full(SHAPE[1], v, np.float32) for v in (0, 1)]
    expected = reference.running_update(*start, *reference.statistics(x))
    for got, want in zip(running, expected, strict=True):
        close(library.get(got), want, np.float32)


def test_memory_of_any_kind():
    """Misaligned, strided, channels last."""
    library = Torch()
    memory = library.put(cases.normal(4 * 6 * 10 * 10 + 1, np.float32))
    whole = memory[1:].view(4, 6, 10, 10)
    for x in (
        whole,
        whole[:, ::2],
        whole[:, :, 1:-1, 1:-1],
        whole.permute(3, 1, 0, 2),
        whole.to(memory_format=library.torch.channels_last),
    ):
        y = numbabn.batch_norm(x, training=True)
        assert y.stride() == library.torch.empty_like(x).stride()
        close(library.get(y), reference.forward(library.get(x))[0], np.float32)
        expected = library.get(y)
        assert numbabn.batch_norm(x, training=True, out=x) is x
        close(library.get(x), expected, np.float32)


def test_autograd_is_told_what_was_written():
    """A gradient that would be of other numbers than those that were saved is an error."""
    library = Torch()
    ones = library.torch.ones(5, device="cuda", requires_grad=True)
    x = library.put(cases.normal((8, 5), np.float32))
    for _ in range(3):  # made anew, then as before
        mean, var = library.torch.zeros(5, device="cuda"), library.torch.ones(5, device="cuda")
        read, product = (ones * mean).sum(), (ones * x).sum()
        numbabn.batch_norm(x, mean, var)
        read.backward()
        written = (ones * mean).sum()
        numbabn.batch_norm(x, mean, var, training=True, out=x)
        for each in (written, product):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                each.backward()


def test_read_only():
    library = JAX()
    x = library.put(cases.normal((8, 5), np.float32))
    with pytest.raises(ValueError, match="out: expected a writeable array"):
        numbabn.batch_norm(x, training=True, out=library.put(np.zeros((8, 5), np.float32)))


def test_mixed_arguments(library):
    x, weight = cases.normal((8, 5), np.float32), np.ones(5, np.float32)
    with pytest.raises(TypeError, match=r"weight: expected a .* array on CUDA device 0, as x is"):
        numbabn.batch_norm_forward(library.put(x), weight)
    with pytest.raises(TypeError, match="weight: expected a NumPy array, got"):
        numbabn.batch_norm_forward(x, library.put(weight))


@pytest.mark.parametrize("how", ["current", "named"])
def test_in_the_order_of_a_stream(streaming, how):
    """What the stream is still busy with comes first, and what it is given after comes last."""
    x = cases.normal(SHAPE, np.float32)
    given = streaming.put(np.zeros_like(x))
    values = streaming.put(x)
    stream = streaming.busy_stream()
    with streaming.current(stream):
        given[...] = values
        if how == "current":
            y = numbabn.batch_norm(given, training=True)
    if how == "named":
        y = numbabn.batch_norm(given, training=True, stream=stream)
    with streaming.current(stream):
        given[...] = 0
        y = y + 0
        got = streaming.get(y)
    close(got, reference.forward(x)[0], np.float32)


def test_a_layer(library):
    if isinstance(library, JAX):
        pytest.skip("JAX's arrays are never written")
    layer = numbabn.BatchNorm(SHAPE[1])
    x = cases.normal(SHAPE, np.float32)
    y, mean, invstd = reference.forward(x)
    close(library.get(layer(library.put(x))), y, np.float32)
    dx, *_ = reference.backward(x, x, None, mean, invstd)
    close(library.get(layer.backward(library.put(x))), dx, np.float32)
    running = reference.running_update(np.zeros(33), np.ones(33), *reference.statistics(x))
    state = layer.state_dict()
    for name, expected in zip(("running_mean", "running_var"), running, strict=True):
        close(state[name], expected, np.float32)
