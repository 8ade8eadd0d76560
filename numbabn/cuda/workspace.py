"""Memory that the blocks of a grid share."""

import threading
from functools import lru_cache
from typing import Any

import numpy as np

from ..libraries import DeviceArray
from .arguments import Shape
from .arrays import empty, zeros


class Workspace:
    """What launches on one stream share, kept from call to call.

    Whoever launches what uses it holds its lock: a stream runs what it is given in order.

    Attributes
    ----------
    partials, sums, counters : DeviceArray or None
        See `arguments.Memory`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.partials: Any = None
        self.sums: Any = None
        self.counters: Any = None

    def fit(self, shape: Shape, like: DeviceArray) -> None:
        """Make room for a shape."""
        partials = 3 * shape.C * shape.pieces
        if self.partials is None or self.partials.size < partials:
            self.partials = empty((partials,), np.float64, like)
        if self.sums is None or self.sums.size < 2 * shape.C:
            self.sums = empty((2 * shape.C,), np.float64, like)
        if self.counters is None or self.counters.size < 2 * shape.groups:
            self.counters = zeros((2 * shape.groups,), np.int32, like)  # and zeros they are left


_PER_THREAD = 2  # handle of a stream that each thread has one of


def workspace_of(device: int, stream: int) -> Workspace:
    """Give a stream's memory."""
    return _workspace(device, stream, threading.get_ident() if stream == _PER_THREAD else 0)


@lru_cache(maxsize=64)
def _workspace(device: int, stream: int, thread: int) -> Workspace:
    return Workspace()
