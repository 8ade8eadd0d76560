"""From an array's kind to the module that computes on it."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from . import cpu


@cache
def _of_type(kind: type) -> ModuleType | None:
    if issubclass(kind, np.ma.MaskedArray):
        return None  # its mask would be ignored without a word
    return cpu if issubclass(kind, np.ndarray) else None


def backend_of(name: str, array: Any) -> Any:
    """Return the backend for an array.

    Raises
    ------
    TypeError
        If it is no array that numbabn computes on.
    """
    kind: type = type(array)
    backend = _of_type(kind)
    if backend is None:
        raise TypeError(f"{name}: expected a NumPy array, got {kind.__qualname__}")
    return backend
