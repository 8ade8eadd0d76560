"""Every argument check and its message: the argument, what was expected, what came.

Each runs before anything is written. ``ValueError`` is for values and shapes, ``TypeError`` for
kinds and dtypes.
"""

import math
import numbers
import operator
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

import ml_dtypes
import numpy as np

from .libraries import DeviceArray, kind_of, library_of

WIDE = (np.dtype(np.float32), np.dtype(np.float64))
NARROW = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
FLOATS = (*NARROW, *WIDE)


REMEMBERED = 1024  # calls of each kind
# Settings whose value is all there is to them.
PLAIN = frozenset((type(None), bool, int, float, str))


def remembered(check: Callable[..., Any]) -> Callable[..., Any]:
    """Skip what has passed before for arrays of the same shapes and dtypes.

    For checks that look at no more of an array. All arguments go by position.
    """
    passed: dict[Any, Any] = {}
    ndarray = np.ndarray

    @wraps(check)
    def run(*arguments: Any) -> Any:
        parts: list[Any] = []
        for a in arguments:
            kind = type(a)
            if kind in PLAIN:
                parts += (kind, a)
            elif kind is ndarray and a.ndim:
                parts += (a.shape, a.dtype)
            elif kind is DeviceArray:
                parts.append(a.form)
            else:
                return check(*arguments)
        key = tuple(parts)
        found = passed.get(key)
        if found is None:
            found = check(*arguments)
            if len(passed) >= REMEMBERED:
                passed.clear()
            passed[key] = found
        return found

    return run


def _names(dtypes: Collection[Any]) -> str:
    *names, last = map(str, dtypes)
    return f"{', '.join(names)} or {last}" if names else last


def _kind(value: Any) -> str:
    return type(value).__qualname__


def dtype_in(name: str, array: Any, dtypes: Collection[Any]) -> None:
    """Refuse a dtype that is not among those given; the same in the other byte order is not."""
    if array.dtype not in dtypes or not array.dtype.isnative:
        order = "" if array.dtype.isnative else " (byte-swapped)"
        raise TypeError(f"{name}: expected {_names(dtypes)}, got {array.dtype}{order}")


def data(name: str, x: Any) -> None:
    """Check the array to normalize: two dimensions or more, a float dtype."""
    dtype_in(name, x, FLOATS)
    if x.ndim < 2:
        raise ValueError(f"{name}: expected 2 or more dimensions, got shape {x.shape}")


def channel_axis(axis: Any, x: Any) -> int:
    """Return the channel axis counted from the front, if x has it and a channel along it."""
    index: int = integer("axis", axis)
    if not -x.ndim <= index < x.ndim:
        raise ValueError(
            f"axis: expected {-x.ndim} to {x.ndim - 1} for shape {x.shape}, got {index}"
        )
    index %= x.ndim
    if x.shape[index] == 0:
        raise ValueError(f"x: expected a channel or more along axis {index}, got shape {x.shape}")
    return index


def numpy_array(name: str, array: Any) -> None:
    """Check a NumPy array, or one on a device, which `backends.borrow` has checked."""
    if type(array) is not DeviceArray and library_of(array) != "numpy":
        raise TypeError(f"{name}: expected a NumPy array, got {kind_of(array)}")


def like(name: str, array: Any, x: Any) -> None:
    """Check an array that must have x's shape and dtype."""
    numpy_array(name, array)
    dtype_in(name, array, (x.dtype,))
    if array.shape != x.shape:
        raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {array.shape}")


def parameter_dtypes(dtype: Any) -> tuple[Any, ...]:
    """Give the dtypes of parameters beside data: its own, or float32 beside 16 bits."""
    return (dtype, np.dtype(np.float32)) if dtype in NARROW else (dtype,)


def per_channel(name: str, array: Any, channels: int, dtypes: Collection[Any] = FLOATS) -> None:
    """Check an array of one number per channel."""
    numpy_array(name, array)
    dtype_in(name, array, dtypes)
    if array.shape != (channels,):
        raise ValueError(f"{name}: expected shape ({channels},), got {array.shape}")


def real(name: str, value: Any) -> float:
    """Return a finite real number; True and False are none, being misplaced arguments."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a real number, got {_kind(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer or a fraction beyond any float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def epsilon(eps: Any) -> float:
    """Return what is added to the variance."""
    number = real("eps", eps)
    if number < 0:
        raise ValueError(f"eps: expected 0 or more, got {number}")
    return number


def integer(name: str, value: Any) -> int:
    """Return an integer."""
    try:
        number: int = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {_kind(value)}") from None
    return number


def positive_integer(name: str, value: Any) -> None:
    """Check a size."""
    index = integer(name, value)
    if index < 1:
        raise ValueError(f"{name}: expected 1 or more, got {index}")


def count(name: str, array: Any) -> None:
    """Check an array without dimensions that holds a count."""
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected an integer, got {array.dtype}")
    if array.shape != () or array < 0:
        raise ValueError(f"{name}: expected one number, 0 or more, got {array.tolist()}")


def flag(name: str, value: Any) -> None:
    """Check a truth value."""
    if not isinstance(value, bool | np.bool_ | int) or value not in (0, 1):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def relu(activation: Any) -> bool:
    """Return whether the activation is a ReLU."""
    if activation is not None and activation != "relu":
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    return activation is not None


def denominator(count: int, correction: float) -> None:
    """Check ``count - correction``, by which a running variance is divided."""
    if count and count - correction <= 0:
        raise ValueError(
            f"correction: expected less than the {count} values per channel, got {correction}"
        )


def features(x: Any, axis: Any, channels: int, dtype: Any) -> None:
    """Check a layer's input against the dtype of its parameters and its number of channels."""
    data("x", x)
    dtype_in("x", x, [d for d in FLOATS if dtype in parameter_dtypes(d)])
    if x.shape[channel_axis(axis, x)] != channels:
        raise ValueError(f"x: expected {channels} channels along axis {axis}, got shape {x.shape}")


def trainable(x: Any, count: int) -> None:
    """Refuse one value per channel: its variance is 0 whatever the value."""
    if count == 1:
        raise ValueError(
            f"x: expected more than one value per channel in training, got shape {x.shape}"
        )


def mask(bits: Any, x: Any) -> None:
    """Check a ReLU mask: one bit per element of x, in bytes."""
    numpy_array("mask", bits)
    dtype_in("mask", bits, (np.dtype(np.uint8),))
    expected = (-(-x.size // 8),)
    if bits.shape != expected:
        raise ValueError(f"mask: expected shape {expected} for x {x.shape}, got {bits.shape}")


class _Ghost:
    """The memory of an array on a device, for NumPy to compare with other memory, never to read."""

    def __init__(self, array: DeviceArray) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": array.shape,
            "strides": array.strides,
            "typestr": f"|V{array.itemsize}",
            "data": (array.address, not array.flags.writeable),
        }


def _ghost(array: Any) -> Any:
    return np.asarray(_Ghost(array)) if type(array) is DeviceArray else array


def _apart(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether all of one lies in front of the other: as far as most arrays need to be looked at."""
    return a.address + a.form.high <= b.address + b.form.low or (
        b.address + b.form.high <= a.address + a.form.low
    )


def _is(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether both are one array, element for element."""
    return a.address == b.address and a.form is b.form


def _share(a: Any, b: Any) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, 10_000)  # type: ignore[arg-type]
    except RuntimeError:  # more candidates than that to try
        return True


def _same(a: Any, b: Any) -> bool:
    """Whether two arrays of one shape are the same elements in memory."""
    here, there = a.__array_interface__["data"][0], b.__array_interface__["data"][0]
    strides = zip(a.shape, a.strides, b.strides, strict=True)
    return bool(here == there and all(s == t for size, s, t in strides if size > 1))


def _overlaps_itself(array: Any) -> bool:
    """Whether two indices may name one element, as in a broadcast array."""
    if array.size == 0:
        return False
    reach = 0
    for stride, size in sorted(
        (abs(stride), size)
        for stride, size in zip(array.strides, array.shape, strict=True)
        if size > 1
    ):
        if stride < reach + array.itemsize:
            return True
        reach += stride * (size - 1)
    return False


def writable(
    name: str, target: Any, others: dict[str, Any], *, in_place: tuple[str, ...] = ()
) -> None:
    """Check an array that will be written, if there is one, against the others of the call.

    ``others`` may hold None; those named in ``in_place`` may be the target itself, element for
    element.
    """
    if target is None:
        return
    if type(target) is DeviceArray:
        others = {
            other: array
            for other, array in others.items()
            if array is not None
            and not _apart(target, array)
            and not (other in in_place and _is(target, array))
        }
        if not others and target.writeable and target.form.c_contiguous:
            return
        target = _ghost(target)
        others = {other: _ghost(array) for other, array in others.items()}
    flags = target.flags
    if not flags.writeable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    if not flags.c_contiguous and _overlaps_itself(target):
        raise ValueError(
            f"{name}: expected distinct elements in memory, got strides {target.strides} "
            f"for shape {target.shape}"
        )
    for other, array in others.items():
        if array is None or not _share(target, array):
            continue
        if not (other in in_place and _same(target, array)):
            raise ValueError(f"{name}: expected memory of its own, got an overlap with {other}")
