"""Memory that the blocks of a grid share."""

import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ..libraries import DeviceArray
from .arguments import Shape
from .arrays import empty, zeros
from .target import SIMULATED

if SIMULATED:

    def is_capturing(stream: int) -> bool:
        return False

else:
    from .driver import is_capturing


class Buffers(NamedTuple):
    """See `arguments.Memory`."""

    partials: DeviceArray
    sums: DeviceArray
    counters: DeviceArray  # zeros, and zeros they are left

    @classmethod
    def allocate(cls, sizes: tuple[int, ...], like: DeviceArray) -> "Buffers":
        """Allocate numbers of each beside another array."""
        partials, sums, counters = sizes
        # Not the call's: it is there when the call is made again.
        beside = DeviceArray(None, like.place._replace(log=None), 0, like.form)
        return cls(
            empty((partials,), np.float64, beside),
            empty((sums,), np.float64, beside),
            zeros((counters,), np.int32, beside),
        )


# Nobody tells when a graph is gone, and until then it reads and writes what it was captured with.
_captured: list[Buffers] = []


class Workspace:
    """What launches on one stream share, kept from call to call.

    Whoever launches what uses it holds its lock: a stream runs what it is given in order.

    Attributes
    ----------
    buffers : Buffers or None
        What it has so far; it never becomes less.
    addresses : tuple of int
        Theirs.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.buffers: Buffers | None = None
        self.addresses = (0, 0, 0)
        self._is_captured = False

    def fit(self, shape: Shape, like: DeviceArray) -> Buffers:
        """Give memory for a shape.

        Raises
        ------
        RuntimeError
            If it would have to be allocated while the stream is captured into a CUDA graph, by a
            library whose graphs have no memory of their own.
        """
        sizes: tuple[int, ...] = 3 * shape.C * shape.pieces, 2 * shape.C, 2 * shape.groups
        place = like.place
        capturing = is_capturing(place.stream)
        if capturing and place.library.graphs_have_memory:
            return Buffers.allocate(sizes, like)
        buffers = self.buffers
        if buffers is None or any(
            each.size < size for each, size in zip(buffers, sizes, strict=True)
        ):
            if capturing:
                raise RuntimeError(
                    "capture into a CUDA graph: expected the stream's shared memory allocated by "
                    "an earlier call, got none, or less: call once on this stream, with arrays of "
                    "the same shapes, dtypes and strides, before capturing"
                )
            if buffers is not None:  # what has been enough for other shapes is so from now on
                sizes = tuple(
                    max(each.size, size) for each, size in zip(buffers, sizes, strict=True)
                )
            buffers = self.buffers = Buffers.allocate(sizes, like)
            partials, sums, counters = buffers
            self.addresses = partials.address, sums.address, counters.address
            self._is_captured = False
        if capturing and not self._is_captured:
            _captured.append(buffers)
            self._is_captured = True
        return buffers


PER_THREAD = 2  # handle of a stream that each thread has one of


_own = threading.local()  # by what the thread is known: identifiers are used again


def workspace_of(device: int, stream: int) -> Workspace:
    """Give a stream's memory."""
    if stream != PER_THREAD:
        return _workspace(device, stream, None)
    if not hasattr(_own, "thread"):
        _own.thread = object()
    return _workspace(device, stream, _own.thread)


@lru_cache(maxsize=64)
def _workspace(device: int, stream: int, thread: object) -> Workspace:
    return Workspace()
