"""From an array's kind to the module that computes on it."""

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, wraps
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import cpu, host
from .libraries import CPU, CUDA_EXTRA, DeviceArray, host_of, is_refused, kind_of, library_of

_EXPECTED = f"an array on {CPU} or a CUDA device"


@cache
def cuda_backend() -> Any:
    """Import what computes on CUDA devices.

    Raises
    ------
    RuntimeError
        If this machine lacks what it takes.
    """
    if find_spec("numba_cuda") is None:
        raise RuntimeError(f"CUDA arrays: expected numba-cuda, got none installed: {CUDA_EXTRA}")
    from . import cuda
    from .cuda.arrays import require_device

    require_device()
    return cuda


def backend_of(name: str, array: Any) -> Any:
    """Return the backend for an array, as `borrow` gave it.

    Raises
    ------
    TypeError
        If it is no array that numbabn computes on.
    """
    if type(array) is DeviceArray:
        return cuda_backend()
    if library_of(array) == "numpy":
        return cpu
    raise TypeError(f"{name}: expected {_EXPECTED}, got {kind_of(array)}")


def _is_on_device(name: str, array: Any, stream: Any) -> bool:
    """Whether a call's first array is on a device; if it is no array, others say so.

    Raises
    ------
    TypeError
        If it is on a device that is none of CUDA's, or on the host, where there are no streams.
    """
    library = library_of(array)
    where = CPU if library in (None, "numpy") else host_of(array)
    if where not in (None, CPU):
        kind = type(array).__qualname__
        raise TypeError(f"{name}: expected {_EXPECTED}, got a {kind} on {where}")
    if library is not None and where == CPU and stream is not None:
        expected = "None for NumPy arrays" if library == "numpy" else f"None for arrays on {CPU}"
        raise TypeError(f"stream: expected {expected}, got {type(stream).__qualname__}")
    return where is None


def borrow(stream: Any, **arrays: Any) -> Iterable[Any]:
    """See the arrays of a call as `DeviceArray` if the first is on a device, else as NumPy's.

    Plain NumPy arrays are given as they are. So is what is no array: others say what was expected.

    Raises
    ------
    TypeError, ValueError
        If the others are not beside the first, or the stream is none of a device.
    RuntimeError
        If this machine lacks what it takes to compute there.
    """
    name, first = next(iter(arrays.items()))
    if _is_on_device(name, first, stream):
        seen: Iterable[Any] = cuda_backend().borrow(stream, tuple(arrays), arrays.values())
        return seen
    if type(first) is np.ndarray or library_of(first) is None:
        return arrays.values()
    return host.borrow(tuple(arrays), tuple(arrays.values()))


def tell_autograd(*written: Any) -> None:
    """Count a write in each PyTorch tensor, as PyTorch's own do, for it to find what went stale."""
    for array in written:
        # Inference tensors have no count.
        if library_of(array) == "torch" and not array.is_inference():
            sys.modules["torch"].autograd.graph.increment_version(array)


def on_arrays(
    *names: str, written: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function of arrays as `borrow` sees them, and settings, take arrays of any library.

    It is given a stream, the arrays of these names, and the settings, all by position, and gives a
    tuple: arrays as the caller's own kind, and what is none. Those named in ``written`` are written
    where they are given, unless x is empty.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        first, ndarray = names[0], np.ndarray
        targets = [names.index(name) for name in written]

        @wraps(function)
        def run(stream: Any, *arguments: Any) -> Any:
            x = arguments[0]
            if type(x) is ndarray and stream is None:
                return function(*arguments)
            if _is_on_device(first, x, stream):
                results = cuda_backend().run(function, names, stream, arguments)
            elif library_of(x) is None:
                return function(*arguments)  # which says what was expected
            else:
                results = host.run(function, names, arguments)
            if library_of(x) == "torch" and x.numel():
                tell_autograd(*[arguments[target] for target in targets])
            return results

        return run

    return decorate


def to_numpy(array: Any, name: str = "array") -> Any:
    """Copy an array of any library, or what NumPy makes one of, to an array of NumPy's.

    Raises
    ------
    TypeError
        If the functions would not take the array for a reason of its own.
    """
    if is_refused(array):
        raise TypeError(f"{name}: expected {_EXPECTED}, got {kind_of(array)}")
    (seen,) = borrow(None, **{name: array})
    return backend_of(name, seen).download(seen) if type(seen) is DeviceArray else np.array(seen)


def duplicate(array: Any) -> Any:
    """Copy an array of any library to where it is."""
    (seen,) = borrow(None, array=array)
    backend = backend_of("array", seen)
    target = backend.empty_like(seen)
    backend.copy(target, seen)
    return backend.give(target)[0]
