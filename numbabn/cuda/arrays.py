"""How arrays of other libraries are seen, and made, on a CUDA device.

The arrays of one call are of one library, on one device. Whatever a library does here it does in
the order of the call's stream, and waits for nothing but where its `Library` says so.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from ..libraries import ANY, DeviceArray, Place, host_of, library_of

WORD = 4  # bytes; kernels read and write masks by words
_LEGACY = 1  # handle of the legacy default stream where 0 might be another one
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Library(ABC):
    """What is asked of a library."""

    name: str
    # Whether what is allocated while a CUDA graph is captured is the graph's, as long as it lives.
    graphs_have_memory = False

    @abstractmethod
    def device(self, array: Any) -> int:
        """Give the number of the device that an array is on."""

    @abstractmethod
    def stream(self, array: Any) -> int:
        """Give the handle of the caller's current stream on an array's device."""

    @abstractmethod
    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        """See an array."""

    @abstractmethod
    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, place: Place
    ) -> Any:
        """Allocate an array without gaps; strides are in bytes."""

    @abstractmethod
    def clear(self, array: DeviceArray) -> None:
        """Set every byte of a contiguous array to 0."""

    @abstractmethod
    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy between arrays of one shape and dtype, whatever their strides."""

    @abstractmethod
    def upload(self, values: Any, place: Place) -> Any:
        """Copy a NumPy array to the device."""

    @abstractmethod
    def download(self, array: DeviceArray) -> Any:
        """Copy to a NumPy array, waiting for it."""

    def give(self, array: DeviceArray) -> Any:
        """Give the caller's own kind of array."""
        return array.owner


class _Torch(Library):
    name = "PyTorch"
    graphs_have_memory = True

    def __init__(self) -> None:
        self.torch: Any = sys.modules["torch"]
        self.dtypes: dict[Any, Any] = {}  # NumPy's of PyTorch's

    def _on(self, place: Place) -> ExitStack:
        """Allocate and compute on the call's stream, so that memory is not reused too early."""
        stack = ExitStack()
        if place.given:
            if place.stream in (0, _LEGACY):  # of 0 PyTorch would make any of its own streams
                stream = self.torch.cuda.default_stream(place.device)
            else:
                stream = self.torch.cuda.ExternalStream(place.stream, device=place.device)
            stack.enter_context(self.torch.cuda.stream(stream))
        return stack

    def device(self, array: Any) -> int:
        ordinal: int = array.device.index
        return ordinal

    def stream(self, array: Any) -> int:
        handle: int = self.torch.cuda.current_stream(array.device).cuda_stream
        return handle

    def _device(self, place: Place) -> str:
        return f"cuda:{place.device}"

    def _dtype(self, name: str, array: Any) -> Any:
        try:
            dtype = np.dtype(str(array.dtype).removeprefix("torch."))  # ml_dtypes names bfloat16
        except TypeError:
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}") from None
        self.dtypes[array.dtype] = dtype
        return dtype

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        if array.is_neg():
            raise TypeError(f"{name}: expected numbers as they are, got a lazily negated Tensor")
        dtype = self.dtypes.get(array.dtype) or self._dtype(name, array)
        itemsize = dtype.itemsize
        strides = tuple([step * itemsize for step in array.stride()])
        return DeviceArray(array, place, array.data_ptr(), tuple(array.shape), strides, dtype)

    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, place: Place
    ) -> Any:
        steps = tuple(stride // dtype.itemsize for stride in strides)
        with self._on(place):
            return self.torch.empty_strided(
                shape, steps, dtype=getattr(self.torch, dtype.name), device=self._device(place)
            )

    def clear(self, array: DeviceArray) -> None:
        with self._on(array.place):
            array.owner.detach().zero_()

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        with self._on(target.place):
            target.owner.detach().copy_(source.owner.detach())

    def upload(self, values: Any, place: Place) -> Any:
        narrow = values.dtype == _BFLOAT16  # which PyTorch takes from no NumPy array
        tensor = self.torch.from_numpy(values.view(np.int16) if narrow else values)
        tensor = tensor.view(self.torch.bfloat16) if narrow else tensor
        with self._on(place):
            return tensor.to(self._device(place))

    def download(self, array: DeviceArray) -> Any:
        with self._on(array.place):
            tensor = array.owner.detach().cpu()
        if array.dtype == _BFLOAT16:
            return tensor.view(self.torch.int16).numpy().view(_BFLOAT16)
        return tensor.numpy()


class _CuPy(Library):
    name = "CuPy"

    def __init__(self) -> None:
        self.cupy: Any = sys.modules["cupy"]

    def _on(self, place: Place) -> ExitStack:
        """Allocate and compute on the call's device and stream."""
        stack = ExitStack()
        stack.enter_context(self.cupy.cuda.Device(place.device))
        if place.given:
            stack.enter_context(self.cupy.cuda.ExternalStream(place.stream, place.device))
        return stack

    def device(self, array: Any) -> int:
        ordinal: int = array.device.id
        return ordinal

    def stream(self, array: Any) -> int:
        handle: int = self.cupy.cuda.get_current_stream(array.device.id).ptr
        return handle

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        return DeviceArray(array, place, array.data.ptr, array.shape, array.strides, array.dtype)

    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, place: Place
    ) -> Any:
        with self._on(place):
            memory = self.cupy.empty(shape, dtype).data
            return self.cupy.ndarray(shape, dtype, memory, strides)

    def clear(self, array: DeviceArray) -> None:
        with self._on(array.place):
            array.owner.fill(0)

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        with self._on(target.place):
            target.owner[...] = source.owner

    def upload(self, values: Any, place: Place) -> Any:
        with self._on(place):
            return self.cupy.asarray(values)

    def download(self, array: DeviceArray) -> Any:
        with self._on(array.place):
            return self.cupy.asnumpy(array.owner)


class _Numba(Library):
    name = "Numba"

    def __init__(self) -> None:
        from numba import cuda

        self.cuda: Any = cuda

    def _stream(self, place: Place) -> Any:
        if place.stream:
            return self.cuda.external_stream(place.stream)
        return self.cuda.legacy_default_stream()  # to pass none would make numba wait

    def _array(self, array: DeviceArray) -> Any:
        """Give a Numba array that numba can move: of bits, since it has no bfloat16."""
        return array.owner.view(f"u{array.itemsize}")

    def device(self, array: Any) -> int:
        # All that numba simulates is device 0.
        return array.gpu_data.context.device.id if hasattr(array, "gpu_data") else 0

    def stream(self, array: Any) -> int:
        return handle_of(array.stream)

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        # A simulated array has the NumPy array's that it wraps.
        interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
        address, read_only = interface["data"]
        return DeviceArray(
            array, place, address, tuple(array.shape), array.strides, array.dtype,
            writeable=not read_only,
        )  # fmt: skip

    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, place: Place
    ) -> Any:
        with self.cuda.gpus[place.device]:
            return self.cuda.device_array(shape, dtype, strides=strides)

    def clear(self, array: DeviceArray) -> None:
        from numba.cuda.cudadrv.driver import device_memset

        with self.cuda.gpus[array.place.device]:
            device_memset(array.owner, 0, array.nbytes, self._stream(array.place))

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        with self.cuda.gpus[target.place.device]:
            bound = self._array(target).bind(self._stream(target.place))
            bound[...] = self._array(source)

    def upload(self, values: Any, place: Place) -> Any:
        with self.cuda.gpus[place.device]:
            return self.cuda.to_device(values, self._stream(place))

    def download(self, array: DeviceArray) -> Any:
        stream = self._stream(array.place)
        with self.cuda.gpus[array.place.device]:
            host = self._array(array).copy_to_host(stream=stream)
            stream.synchronize()
        return host.view(array.dtype)


class _Protocol(_Numba):
    """Whatever has DLPack or the CUDA Array Interface; results are Numba's."""

    name = "CUDA"

    def _see(self, name: str, array: Any, stream: int) -> Any:
        from cuda.core.utils import StridedMemoryView

        try:
            return StridedMemoryView.from_any_interface(array, stream_ptr=stream)
        except BufferError as error:
            raise TypeError(f"{name}: expected a CUDA array, got {error}") from error

    def _array(self, array: DeviceArray) -> Any:
        if library_of(array.owner) == "numba":
            return super()._array(array)
        interface = {
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"<u{array.itemsize}",
            "data": (array.address, False),
        }
        return self.cuda.from_cuda_array_interface(interface, owner=array.owner, sync=False)

    def device(self, array: Any) -> int:
        if hasattr(array, "__dlpack_device__"):
            return int(array.__dlpack_device__()[1])
        return int(self._see("array", array, -1).device_id)

    def stream(self, array: Any) -> int:
        interface = getattr(array, "__cuda_array_interface__", None)
        return (interface and interface.get("stream")) or _LEGACY

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        if library_of(array) == "numba":
            return super().view(name, array, place)
        # The producer's stream, where it is another, lets the call's wait for what it has begun.
        seen = self._see(name, array, place.stream or _LEGACY)
        steps = seen.strides or _c_strides(seen.shape, 1)
        strides = tuple(step * seen.dtype.itemsize for step in steps)
        return DeviceArray(
            array, place, seen.ptr, tuple(seen.shape), strides, seen.dtype,
            writeable=not seen.readonly, base=seen,
        )  # fmt: skip


class _JAX(_Protocol):
    """JAX's arrays are never written.

    What follows is not proven on a GPU yet: results are Numba's memory, which JAX takes over. JAX
    neither knows what other streams still read of its arrays, so that it might use their memory
    anew, nor how to wait for them; so the host waits for the call's stream before it gives results.
    """

    name = "JAX"

    def stream(self, array: Any) -> int:
        return _LEGACY

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        seen = super().view(name, array, place)
        if seen.owner is array and library_of(array) != "numba":
            seen.flags = seen.flags._replace(writeable=False)
        return seen

    def give(self, array: DeviceArray) -> Any:
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        jax = sys.modules["jax"]
        self._stream(array.place).synchronize()
        memory = Buffer.from_handle(array.address, array.nbytes, owner=array.owner)
        steps = tuple(stride // array.itemsize for stride in array.strides)
        view = StridedMemoryView.from_buffer(memory, array.shape, steps, dtype=array.dtype)
        with jax.enable_x64(True):  # else float64 becomes float32
            return jax.dlpack.from_dlpack(view)


_LIBRARIES = {"torch": _Torch, "cupy": _CuPy, "numba": _Numba, "jaxlib": _JAX, ANY: _Protocol}


@cache
def _library(name: str) -> Library:
    library: Library = _LIBRARIES[name]()  # type: ignore[abstract]
    return library


def handle_of(stream: Any) -> int:
    """Give the handle of a stream: of any library's, or the handle itself.

    Raises
    ------
    TypeError, ValueError
        If it is no stream.
    """
    if hasattr(stream, "__cuda_stream__"):
        stream = stream.__cuda_stream__()[1]
    else:
        for name in ("cuda_stream", "ptr", "handle"):  # PyTorch's, CuPy's, others'
            if hasattr(stream, name):
                stream = getattr(stream, name)
                break
    if isinstance(stream, bool) or not hasattr(stream, "__int__") or isinstance(stream, float):
        kind = type(stream).__qualname__
        raise TypeError(f"stream: expected None, a CUDA stream or its handle, got {kind}")
    handle = int(stream)
    if handle < 0:
        raise ValueError(f"stream: expected a CUDA stream's handle, got {handle}")
    return handle


def require_device() -> None:
    """Refuse to go on without a driver or a device.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    from numba import cuda

    if cuda.is_available():
        return
    error = (cuda.cuda_error() or "").strip().partition("\n")[0]
    if error:
        raise RuntimeError(
            f"CUDA arrays: expected NVIDIA's driver and a device, got none: {error.rstrip('.')}. "
            "The driver is the system's to install, see https://www.nvidia.com/drivers"
        )
    raise RuntimeError(
        "CUDA arrays: expected NVVM, which compiles kernels, got none: "
        'pip install "numbabn[cuda13]" (or [cuda12], as the driver is)'
    )


def borrow(stream: Any, arrays: Mapping[str, Any]) -> tuple[DeviceArray | None, ...]:
    """See the arrays of a call; the first says of which library, where and in which order.

    Raises
    ------
    TypeError, ValueError
        If another is of another library or elsewhere, or the stream is none.
    """
    first, x = next(iter(arrays.items()))
    name = library_of(x)
    assert name is not None
    library = _library(name)
    device = library.device(x)
    handle = library.stream(x) if stream is None else handle_of(stream)
    place = Place(library, device, handle, stream is not None)
    seen: list[DeviceArray | None] = []
    for argument, array in arrays.items():
        if array is None:
            seen.append(None)
            continue
        if array is not x:
            _check_beside(argument, array, first, name, place)
        view = library.view(argument, array, place)
        if view.ndim == 1 and not _is_readable(view):
            raise ValueError(
                f"{argument}: expected an address and strides that are multiples of "
                f"{view.itemsize} bytes, got {view.address} and {view.strides}"
            )
        seen.append(view)
    return tuple(seen)


def _is_readable(array: DeviceArray) -> bool:
    """Whether a kernel can read it number by number; what has more dimensions is copied if not."""
    return array.flags.aligned and all(stride % array.itemsize == 0 for stride in array.strides)


def _check_beside(argument: str, array: Any, first: str, name: str, place: Place) -> None:
    """Refuse an array of another library than the call's, or elsewhere."""
    expected = f"expected a {place.library.name} array on CUDA device {place.device}, as {first} is"
    kind = type(array).__qualname__
    if library_of(array) != name:
        raise TypeError(f"{argument}: {expected}, got {kind}")
    host = host_of(array)
    if host is not None:
        raise TypeError(f"{argument}: {expected}, got a {kind} on {host}")
    device = place.library.device(array)
    if device != place.device:
        raise ValueError(f"{argument}: {expected}, got one on CUDA device {device}")


def give(*arrays: DeviceArray | None) -> tuple[Any, ...]:
    """Give results as the caller's own kind of array."""
    return tuple([a if a is None else a.place.library.give(a) for a in arrays])


def _c_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return _strides(shape, range(len(shape)), itemsize)


def _strides(shape: Sequence[int], order: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Strides of memory without gaps; the first axis of the order is outermost."""
    strides = [0] * len(shape)
    step = itemsize
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    return tuple(strides)


def _allocate(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, place: Place
) -> DeviceArray:
    library: Library = place.library
    return library.view("out", library.empty(shape, strides, dtype, place), place)


def empty(shape: tuple[int, ...], dtype: Any, like: DeviceArray) -> DeviceArray:
    """Allocate a contiguous array beside another."""
    dtype = np.dtype(dtype)
    return _allocate(shape, _c_strides(shape, dtype.itemsize), dtype, like.place)


def zeros(shape: tuple[int, ...], dtype: Any, like: DeviceArray) -> DeviceArray:
    """Allocate a contiguous array of zeros beside another."""
    array = empty(shape, dtype, like)
    if array.size:
        array.place.library.clear(array)
    return array


def empty_like(x: DeviceArray) -> DeviceArray:
    """Allocate an array with the same order of axes in memory, as ``numpy.empty_like``."""
    order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    strides = _strides(x.shape, range(x.ndim) if x.flags.c_contiguous else order, x.itemsize)
    return _allocate(x.shape, strides, x.dtype, x.place)


def upload(values: Any, like: DeviceArray) -> DeviceArray:
    """Copy a NumPy array to where another is."""
    library: Library = like.place.library
    return library.view("values", library.upload(values, like.place), like.place)


def download(array: DeviceArray) -> Any:
    """Copy to a NumPy array, waiting for it."""
    return array.place.library.download(array)


def copy(target: DeviceArray, source: DeviceArray) -> None:
    """Copy between arrays of one shape and dtype, whatever their strides."""
    if target.size:
        target.place.library.copy(target, source)


def contiguous(array: DeviceArray) -> DeviceArray:
    """Give the array itself if a kernel can take it word by word, else a copy."""
    if array.flags.c_contiguous and array.address % max(WORD, array.itemsize) == 0:
        return array
    target = empty(array.shape, array.dtype, array)
    copy(target, array)
    return target


def allocate_mask(x: DeviceArray) -> DeviceArray:
    """Zeros for one bit per element of ``x``, in memory of whole words."""
    nbytes = -(-x.size // 8)
    memory = zeros((-(-nbytes // WORD) * WORD,), np.uint8, x)
    mask: DeviceArray = x.place.library.view("mask", memory.owner[:nbytes], x.place)
    return mask
