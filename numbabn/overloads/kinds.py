"""What types tell of arguments, checked while the caller's function is compiled."""

from numba import types
from numba.core.errors import TypingError

FLOATS = (types.float32, types.float64)


def refuse(name, expected, kind):
    """Refuse an argument, by numba's own error."""
    raise TypingError(f"{name}: expected {expected}, got {kind}")


def given(kind):
    """Whether an argument is there: neither left out nor None."""
    return value_of(kind) is not None


def value_of(kind):
    """Give the value of a literal, of a default, or of None; any other type itself."""
    if isinstance(kind, types.Omitted):
        return kind.value
    if isinstance(kind, types.Literal):
        return kind.literal_value
    return None if isinstance(kind, types.NoneType) else kind


def check_data(name, kind):
    """Check an array of data."""
    if not isinstance(kind, types.Array) or kind.dtype not in FLOATS:
        refuse(name, "an array of float32 or float64", kind)
    if kind.ndim < 2:
        refuse(name, "2 or more dimensions", kind)


def check_like(x, **kinds):
    """Check arrays of data beside x, where they are given."""
    for name, kind in kinds.items():
        if given(kind):
            check_data(name, kind)
            if (kind.dtype, kind.ndim) != (x.dtype, x.ndim):
                refuse(name, f"an array of {x.dtype}, {x.ndim}d, like x", kind)


def check_per_channel(dtypes, **kinds):
    """Check arrays of a number per channel, where they are given."""
    for name, kind in kinds.items():
        if not given(kind):
            continue
        if not isinstance(kind, types.Array) or kind.ndim != 1 or kind.dtype not in dtypes:
            refuse(name, f"a 1d array of {' or '.join(map(str, dtypes))}", kind)


def check_written(**kinds):
    """Check that arrays may be written, where they are given."""
    for name, kind in kinds.items():
        if given(kind) and not kind.mutable:
            refuse(name, "a writeable array", kind)


def check_numbers(**kinds):
    """Check real numbers."""
    for name, kind in kinds.items():
        value = value_of(kind)
        real = isinstance(value, types.Integer | types.Float | int | float)
        # Numba has float16 as a type, but nothing to do with it on the CPU.
        if not real or isinstance(value, bool | types.Boolean) or value == types.float16:
            refuse(name, "a real number", kind)


def check_axis(kind):
    """Check the channel's axis."""
    if not isinstance(value_of(kind), types.Integer | int) or isinstance(value_of(kind), bool):
        refuse("axis", "an integer", kind)


def rectifies(kind):
    """Whether the activation is a ReLU, and not none."""
    if value_of(kind) not in (None, "relu"):
        refuse("activation", "None or 'relu', as a literal", kind)
    return given(kind)


def flag(name, kind):
    """Give a flag that must be known."""
    value = value_of(kind)
    if not isinstance(value, bool):
        refuse(name, "True or False, as a literal", kind)
    return value
