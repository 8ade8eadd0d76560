"""Arrays on a CUDA device, whatever library they are of: seen, allocated, copied.

The arrays of one call are of one library, on one device.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..libraries import CUDA_EXTRA, DeviceArray, Form, Place, form_of, host_of, library_of
from .adapters import Library, handle_of, library
from .formats import WORD


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
        f"CUDA arrays: expected NVVM, which compiles kernels, got none: {CUDA_EXTRA}"
    )


_place = lru_cache(maxsize=256)(Place)


def borrow(stream: Any, names: Sequence[str], arrays: Iterable[Any]) -> list[Any]:
    """See the arrays of a call; the first says of which library, where and in which order.

    Raises
    ------
    TypeError, ValueError
        If another is of another library or elsewhere, or the stream is none.
    """
    x = next(iter(arrays))
    name = library_of(x)
    assert name is not None
    adapter = library(name)
    handle = adapter.stream(x) if stream is None else handle_of(stream)
    place = _place(adapter, adapter.device(x), handle, stream is not None)
    seen: list[DeviceArray | None] = []
    for argument, array in zip(names, arrays, strict=True):
        if array is None:
            seen.append(None)
            continue
        if array is not x and not adapter.is_beside(array, place):
            _check_beside(argument, array, names[0], name, place)
        view = adapter.view(argument, array, place)
        form = view.form
        # By number; what has more dimensions is copied if it cannot be read so.
        if form.ndim == 1 and not (form.whole_steps and view.address % form.itemsize == 0):
            raise ValueError(
                f"{argument}: expected an address and strides that are multiples of "
                f"{view.itemsize} bytes, got {view.address} and {view.strides}"
            )
        seen.append(view)
    return seen


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


def give(*results: Any) -> tuple[Any, ...]:
    """Give arrays as the caller's own kind, and what is none as it is."""
    return tuple([a.place.library.give(a) if type(a) is DeviceArray else a for a in results])


def _made(make: Callable[[Form, Place], DeviceArray], form: Form, place: Place) -> DeviceArray:
    """Make an array of a call, noting how if somebody wants to know."""
    array = make(form, place)
    if place.log is not None:
        place.log.made.append((make, form, array))
    return array


def _does_more(place: Place) -> None:
    """Note that a call does more than allocate and launch."""
    if place.log is not None:
        place.log.more = True


def _allocate(form: Form, place: Place) -> DeviceArray:
    adapter: Library = place.library
    owner = adapter.empty(form, place)
    return DeviceArray(owner, place, adapter.address(owner), form)


def _allocate_zeros(form: Form, place: Place) -> DeviceArray:
    array = _allocate(form, place)
    if form.size:
        place.library.clear(array)
    return array


def _allocate_bits(form: Form, place: Place) -> DeviceArray:
    nbytes = -(-form.size // 8)
    memory = _allocate_zeros(_c_contiguous((-(-nbytes // WORD) * WORD,), np.uint8), place)
    bits: DeviceArray = place.library.view("mask", memory.owner[:nbytes], place)
    return bits


def _without_gaps(shape: Sequence[int], order: Sequence[int], dtype: Any) -> Form:
    """Give the form of an array without gaps; the first axis of the order is outermost."""
    strides = [0] * len(shape)
    step = dtype.itemsize
    for i in reversed(order):
        strides[i] = step
        step *= max(shape[i], 1)
    return form_of(tuple(shape), tuple(strides), dtype)


@lru_cache(maxsize=1024)
def _c_contiguous(shape: tuple[int, ...], dtype: Any) -> Form:
    return _without_gaps(shape, range(len(shape)), np.dtype(dtype))


@lru_cache(maxsize=1024)
def _as_in(form: Form) -> Form:
    """Give the form that has the same order of axes in memory, and no gaps."""
    order = sorted(range(form.ndim), key=lambda i: -abs(form.strides[i]))
    return _without_gaps(form.shape, range(form.ndim) if form.c_contiguous else order, form.dtype)


def empty(shape: tuple[int, ...], dtype: Any, like: DeviceArray) -> DeviceArray:
    """Allocate a contiguous array beside another."""
    return _made(_allocate, _c_contiguous(shape, dtype), like.place)


def zeros(shape: tuple[int, ...], dtype: Any, like: DeviceArray) -> DeviceArray:
    """Allocate a contiguous array of zeros beside another."""
    return _made(_allocate_zeros, _c_contiguous(shape, dtype), like.place)


def empty_like(x: DeviceArray) -> DeviceArray:
    """Allocate an array with the same order of axes in memory, as ``numpy.empty_like``."""
    return _made(_allocate, _as_in(x.form), x.place)


def upload(values: Any, like: DeviceArray) -> DeviceArray:
    """Copy a NumPy array to where another is."""
    _does_more(like.place)
    adapter: Library = like.place.library
    return adapter.view("values", adapter.upload(values, like.place), like.place)


def download(array: DeviceArray) -> Any:
    """Copy to a NumPy array, waiting for it."""
    return array.place.library.download(array)


def copy(target: DeviceArray, source: DeviceArray) -> None:
    """Copy between arrays of one shape and dtype, whatever their strides."""
    _does_more(target.place)
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
    return _made(_allocate_bits, x.form, x.place)
