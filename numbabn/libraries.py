"""Whose an array is, told by its type, and what one on a device looks like in here.

Nothing is imported that the caller has not imported already.
"""

import math
import sys
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

# The class that makes an array, by the first part of its module's name.
_CLASSES = {
    "numpy": ("ndarray",),
    "torch": ("Tensor",),
    "cupy": ("ndarray",),
    "numba": ("DeviceNDArrayBase", "FakeCUDAArray"),  # on a GPU, and in numba's simulator
    "jaxlib": ("ArrayImpl",),
}
# Arrays that are none in here, by their class likewise, and what to do with one.
_REFUSED = {
    ("numpy", "MaskedArray"): "whose mask would be ignored; its data and filled(value) have none",
    ("dask", "Array"): "which is not computed yet; its map_blocks takes numbabn's functions",
    ("xarray", "DataArray"): "whose array xarray.apply_ufunc gives to numbabn's functions",
    ("jax", "Tracer"): "which is not computed yet; numbabn.jax has functions for traced arrays",
}
# Where a library has sqrt, isfinite, where, full_like, zeros_like and ones_like.
_NAMESPACES = {"numpy": "numpy", "torch": "torch", "cupy": "cupy", "jaxlib": "jax.numpy"}
ANY = "any other library"
CPU = "the CPU"
CUDA_EXTRA = 'pip install "numbabn[cuda13]" (or [cuda12], as the driver is)'


def _classes(kind: type) -> list[tuple[str, str]]:
    """List the classes that a type is one of, as first part of the module and name."""
    return [(base.__module__.partition(".")[0], base.__name__) for base in kind.__mro__]


@cache
def _reason(kind: type) -> str | None:
    """Say why arrays of a type are refused, if there is more to it than that they are none."""
    for base in _classes(kind):
        if base in _REFUSED:
            return _REFUSED[base]
    ndarray = np.ndarray
    if issubclass(kind, ndarray) and kind.__array_function__ is not ndarray.__array_function__:
        return "whose __array_function__ NumPy would ask; its view(numpy.ndarray) has none"
    return None


@cache
def _of_type(kind: type) -> str | None:
    if _reason(kind) is not None:
        return None
    for library, name in _classes(kind):
        if name in _CLASSES.get(library, ()):
            return library
    protocols = ("__cuda_array_interface__", "__dlpack_device__")
    return ANY if any(hasattr(kind, name) for name in protocols) else None


def library_of(array: Any) -> str | None:
    """Name an array's library: `ANY` if it has a protocol alone, None if it is no array."""
    kind: type = type(array)
    return _of_type(kind)


def kind_of(value: Any) -> str:
    """Name what came instead of an array, and why it is refused."""
    kind: type = type(value)
    reason = _reason(kind)
    return kind.__qualname__ if reason is None else f"{kind.__qualname__}, {reason}"


def is_refused(value: Any) -> bool:
    """Whether a value is an array that is refused for more than its library."""
    kind: type = type(value)
    return _reason(kind) is not None


def is_dask(array: Any) -> bool:
    """Whether an array is Dask's: a plan to make one in blocks."""
    return ("dask", "Array") in _classes(type(array))


def host_of(array: Any) -> str | None:
    """Say where an array of a library other than NumPy lies, if that is not a CUDA device."""
    library = library_of(array)
    where = "cuda"
    if library == "torch":
        where = "cuda" if array.is_cuda else array.device.type
    elif library == "jaxlib":
        # A deleted one crashes where it is asked, and whoever views it says that it is deleted.
        where = "cpu" if array.is_deleted() else array.platform().replace("gpu", "cuda")
    elif library == ANY and hasattr(array, "__dlpack_device__"):
        where = "cpu" if array.__dlpack_device__()[0] == 1 else "cuda"
    return {"cuda": None, "cpu": CPU}.get(where, f"the {where.upper()}")


def is_on_device(array: Any) -> bool:
    """Whether an array lies on a CUDA device."""
    return library_of(array) not in (None, "numpy") and host_of(array) is None


def float64_in_jax() -> Any:
    """Let JAX keep float64, of which it makes float32 by default, within a context.

    JAX 0.8 has moved the function.
    """
    jax = sys.modules["jax"]
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


def namespace(name: str, array: Any) -> Any:
    """Give the module that computes on an array, under NumPy's names.

    Raises
    ------
    TypeError
        If its library has no arithmetic.
    """
    library = library_of(array)
    if library not in _NAMESPACES:
        kind = type(array).__qualname__
        raise TypeError(f"{name}: expected an array of a library with arithmetic, got {kind}")
    return sys.modules[_NAMESPACES[library]]


class Place(NamedTuple):
    """Where the arrays of a call are, and in which order with other work."""

    library: Any  # how `numbabn.cuda.adapters` speaks with it
    device: int
    stream: int  # handle
    given: bool  # whether the caller named the stream, not the library
    log: Any = None  # `numbabn.cuda.replay` notes there what the call does, if it is the first


class Flags(NamedTuple):
    """As NumPy's."""

    aligned: bool
    writeable: bool
    c_contiguous: bool


_flags = lru_cache(maxsize=8)(Flags)


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    expected = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


class Form:
    """What arrays of one shape, strides and dtype on devices have in common.

    They share one object, made by `form_of`, so that it stands for all of that as a key.

    Attributes
    ----------
    shape, strides, dtype, itemsize, ndim, size, nbytes, c_contiguous
        As of an ndarray.
    name : str
        The dtype's.
    low, high : int
        Bytes from the first element's address to the lowest one's, and behind the highest one.
    whole_steps : bool
        Whether strides are multiples of the itemsize.
    """

    def __init__(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any) -> None:
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.name: str = dtype.name
        self.itemsize: int = dtype.itemsize
        self.ndim = len(shape)
        self.size = math.prod(shape)
        self.nbytes: int = self.size * self.itemsize
        self.c_contiguous = _is_contiguous(shape, strides, self.itemsize)
        self.whole_steps = all(stride % self.itemsize == 0 for stride in strides)
        reach = [(n - 1) * step for n, step in zip(shape, strides, strict=True)]
        self.low = sum(min(0, each) for each in reach) if self.size else 0
        self.high = sum(max(0, each) for each in reach) + self.itemsize if self.size else 0


form_of = lru_cache(maxsize=4096)(Form)


class DeviceArray:
    """An array of any library on a CUDA device: what checks, layout and kernels read of one.

    It never touches the memory, nor waits for it.

    Attributes
    ----------
    address : int
        Of the first element.
    owner : object
        The caller's array, or what will become it.
    base : object
        What else must live as long.
    place : Place
        The call's.
    form : Form
        Shape, strides and dtype, and what follows from them.
    shape, strides, dtype, itemsize, ndim, size, nbytes, flags
        As of an ndarray.
    """

    __slots__ = ("address", "base", "form", "owner", "place", "writeable")

    def __init__(
        self,
        owner: Any,
        place: Place,
        address: int,
        form: Form,
        writeable: bool = True,
        base: Any = None,
    ) -> None:
        self.owner = owner
        self.place = place
        self.address = address
        self.form = form
        self.writeable = writeable
        self.base = base

    def __index__(self) -> int:
        """Stand for its address among a kernel's numbers."""
        return self.address

    @property
    def shape(self) -> tuple[int, ...]:  # noqa: D102
        return self.form.shape

    @property
    def strides(self) -> tuple[int, ...]:  # noqa: D102
        return self.form.strides

    @property
    def dtype(self) -> Any:  # noqa: D102
        return self.form.dtype

    @property
    def itemsize(self) -> int:  # noqa: D102
        return self.form.itemsize

    @property
    def ndim(self) -> int:  # noqa: D102
        return self.form.ndim

    @property
    def size(self) -> int:  # noqa: D102
        return self.form.size

    @property
    def nbytes(self) -> int:  # noqa: D102
        return self.form.nbytes

    @property
    def flags(self) -> Flags:  # noqa: D102
        form = self.form
        return _flags(self.address % form.itemsize == 0, self.writeable, form.c_contiguous)
