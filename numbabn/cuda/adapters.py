"""How arrays of other libraries are seen, made and moved on a CUDA device.

Whatever a library does here it does in the order of the call's stream, and waits for nothing but
where its `Library` says so.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from ..layout import contiguous_strides
from ..libraries import ANY, DeviceArray, Form, Place, float64_in_jax, form_of, library_of
from .formats import ACCESS, LEGACY

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_FORMS = 4096  # that are remembered
_NOWHERE = Place(None, -1, 0, False)


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

    def is_beside(self, array: Any, place: Place) -> bool:
        """Whether an array is the library's, on the call's device; False if that is not plain."""
        return False

    def traits(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], list[int]]:
        """Give all that is asked of arrays above but addresses, and how those are aligned; those.

        Addresses are of the arrays that are there.

        Raises
        ------
        NotImplementedError
            If to see an array is more than to look.
        """
        traits: list[Any] = []
        addresses = []
        for array in arrays:
            if array is None:
                traits.append(None)
            else:
                view = self.view("array", array, _NOWHERE)
                at = view.address
                traits += type(array), self.device(array), view.form, view.writeable, at % ACCESS
                addresses.append(at)
        return traits, addresses

    @abstractmethod
    def empty(self, form: Form, place: Place) -> Any:
        """Allocate an array without gaps."""

    @abstractmethod
    def address(self, array: Any) -> int:
        """Give the address of what was allocated."""

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
        self._kinds = self.torch.Tensor, self.torch.nn.Parameter
        # The handle itself, which PyTorch's compiled kernels are given: 0.1 microseconds for the 1
        # that a stream with its checks takes.
        self._handle = getattr(self.torch._C, "_cuda_getCurrentRawStream", self._handle_of_stream)
        self._empty = self.torch.empty_strided
        self._form = lru_cache(_FORMS)(self._form_of)
        self._options = lru_cache(_FORMS)(self._options_of)

    def _on(self, place: Place) -> AbstractContextManager[Any]:
        """Allocate and compute on the call's stream, so that memory is not reused too early."""
        if not place.given:
            return nullcontext()
        if place.stream in (0, LEGACY):  # of 0 PyTorch would make any of its own streams
            stream = self.torch.cuda.default_stream(place.device)
        else:
            stream = self.torch.cuda.ExternalStream(place.stream, device=place.device)
        on: AbstractContextManager[Any] = self.torch.cuda.stream(stream)
        return on

    def device(self, array: Any) -> int:
        ordinal: int = array.get_device()
        return ordinal

    def _handle_of_stream(self, ordinal: int) -> Any:
        return self.torch.cuda.current_stream(ordinal).cuda_stream

    def stream(self, array: Any) -> int:
        handle: int = self._handle(self.device(array))
        return handle

    def is_beside(self, array: Any, place: Place) -> bool:
        return type(array) in self._kinds and bool(array.get_device() == place.device)

    def traits(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], list[int]]:
        # What `view` and `is_beside` ask, without a call and an object for each: twice as fast.
        traits: list[Any] = []
        addresses = []
        for a in arrays:
            if a is None:
                traits.append(None)
            else:
                at = a.data_ptr()
                traits += (
                    type(a), a.dtype, a.shape, a.stride(), a.get_device(), a.is_neg(), at % ACCESS,
                )  # fmt: skip
                addresses.append(at)
        return traits, addresses

    def _device(self, place: Place) -> str:
        return f"cuda:{place.device}"

    def _form_of(self, kind: Any, shape: Any, steps: Any) -> Form:
        dtype = np.dtype(str(kind).removeprefix("torch."))  # ml_dtypes names bfloat16
        return form_of(tuple(shape), tuple(step * dtype.itemsize for step in steps), dtype)

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        if array.is_neg():
            raise TypeError(f"{name}: expected numbers as they are, got a lazily negated Tensor")
        try:
            form = self._form(array.dtype, array.shape, array.stride())
        except TypeError:
            raise TypeError(f"{name}: expected a float dtype, got {array.dtype}") from None
        return DeviceArray(array, place, array.data_ptr(), form)

    def _options_of(self, form: Form) -> tuple[Any, Any, Any]:
        steps = tuple(stride // form.itemsize for stride in form.strides)
        return form.shape, steps, getattr(self.torch, form.name)

    def empty(self, form: Form, place: Place) -> Any:
        shape, steps, dtype = self._options(form)
        device = self._device(place)
        if not place.given:  # what `_on` knows too, but each result costs its time
            return self._empty(shape, steps, dtype=dtype, device=device)
        with self._on(place):
            return self._empty(shape, steps, dtype=dtype, device=device)

    def address(self, array: Any) -> int:
        address: int = array.data_ptr()
        return address

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
        form = form_of(array.shape, array.strides, array.dtype)
        return DeviceArray(array, place, array.data.ptr, form)

    def is_beside(self, array: Any, place: Place) -> bool:
        return type(array) is self.cupy.ndarray and self.device(array) == place.device

    def empty(self, form: Form, place: Place) -> Any:
        with self._on(place):
            memory = self.cupy.empty(form.shape, form.dtype).data
            return self.cupy.ndarray(form.shape, form.dtype, memory, form.strides)

    def address(self, array: Any) -> int:
        address: int = array.data.ptr
        return address

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
        address, read_only = self._data(array)
        form = form_of(tuple(array.shape), array.strides, array.dtype)
        return DeviceArray(array, place, address, form, not read_only)

    def _data(self, array: Any) -> tuple[int, bool]:
        # A simulated array has the NumPy array's that it wraps.
        interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
        data: tuple[int, bool] = interface["data"]
        return data

    def empty(self, form: Form, place: Place) -> Any:
        with self.cuda.gpus[place.device]:
            return self.cuda.device_array(form.shape, form.dtype, strides=form.strides)

    def address(self, array: Any) -> int:
        return self._data(array)[0]

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

    def traits(self, arrays: Sequence[Any]) -> tuple[Sequence[Any], list[int]]:
        raise NotImplementedError

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
        return (interface and interface.get("stream")) or LEGACY

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        if library_of(array) == "numba":
            return super().view(name, array, place)
        # The producer's stream, where it is another, lets the call's wait for what it has begun.
        seen = self._see(name, array, place.stream or LEGACY)
        steps = seen.strides or contiguous_strides(seen.shape, 1)
        strides = tuple(step * seen.dtype.itemsize for step in steps)
        form = form_of(tuple(seen.shape), strides, seen.dtype)
        return DeviceArray(array, place, seen.ptr, form, not seen.readonly, base=seen)


class _JAX(_Protocol):
    """JAX's arrays are never written.

    What follows is not proven on a GPU yet: results are Numba's memory, which JAX takes over. JAX
    neither knows what other streams still read of its arrays, so that it might use their memory
    anew, nor how to wait for them; so the host waits for the call's stream before it gives results.
    """

    name = "JAX"

    def stream(self, array: Any) -> int:
        return LEGACY

    def view(self, name: str, array: Any, place: Place) -> DeviceArray:
        seen = super().view(name, array, place)
        if seen.owner is array and library_of(array) != "numba":
            seen.writeable = False
        return seen

    def give(self, array: DeviceArray) -> Any:
        from cuda.core import Buffer
        from cuda.core.utils import StridedMemoryView

        jax = sys.modules["jax"]
        self._stream(array.place).synchronize()
        memory = Buffer.from_handle(array.address, array.nbytes, owner=array.owner)
        steps = tuple(stride // array.itemsize for stride in array.strides)
        view = StridedMemoryView.from_buffer(memory, array.shape, steps, dtype=array.dtype)
        with float64_in_jax():
            return jax.dlpack.from_dlpack(view)


_LIBRARIES = {"torch": _Torch, "cupy": _CuPy, "numba": _Numba, "jaxlib": _JAX, ANY: _Protocol}


@cache
def library(name: str) -> Library:
    """Give a library's adapter by the name that `libraries.library_of` has for it."""
    adapter: Library = _LIBRARIES[name]()  # type: ignore[abstract]
    return adapter


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
