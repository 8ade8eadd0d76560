"""How kernels are launched in Numba's simulator."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ..layout import View
from ..libraries import DeviceArray, Place
from . import channels, planes, rows, short
from .arguments import Map, Memory
from .arrays import borrow, give
from .formats import FORMATS, MOST_BLOCKS, THREADS
from .simulator import Flat, flat, flat_bytes
from .simulator import run as run_blocks

# As of an H200, which may hold two blocks on each of 132 multiprocessors.
RUNNING = 264  # blocks that run at once
SHARED = 104 << 10  # bytes of shared memory that each may ask for
L2 = 60 << 20  # bytes
_VIEWS = {"planes": planes, "rows": rows, "short": short, "channels": channels}


def map_of(view: View | None, width: int, sizes: tuple[int, int, int]) -> Map:
    """Pass an array that is moved `width` numbers at a time."""
    if view is None:
        return Map(Flat(FORMATS["float32"], width), 0, 0, 0)
    array, *steps = view
    reach = [(size - 1) * step for size, step in zip(sizes, steps, strict=True)]
    first, last = (sum(pick(0, each) for each in reach) for pick in (min, max))
    return Map(flat(array.dtype.name, width, array.address, first, last), *steps)


def mask_of(view: View | None) -> Map:
    """Pass a mask of bits."""
    if view is None:
        return Map(None, 0, 0, 0)
    return Map(flat_bytes(view.array.address, view.array.nbytes), *view[1:])


def memory_of(partials: DeviceArray, sums: DeviceArray, counters: DeviceArray) -> Memory:
    """Pass what blocks share, without what an earlier call has left."""
    views = [flat("float64", 1, each.address, 0, each.size - 1) for each in (partials, sums)]
    for view in views:
        view.memory.fill(np.nan)
    counts = flat_bytes(counters.address, counters.nbytes).view(np.int32)
    assert not counts.any()
    return Memory(views[0], views[1], counts)


def on_device(ordinal: int) -> AbstractContextManager[None]:
    """Do nothing: there is one device."""
    return nullcontext()


def prepare(place: Place, kernel: str, view: str, format_name: str, width: int) -> None:
    """Do nothing: Python's functions are ready."""


def capacity(
    place: Place, kernel: str, view: str, format_name: str, width: int, shared: int
) -> int:
    """Count the blocks of a kernel that run at once."""
    return RUNNING if shared <= SHARED else 0


def l2_bytes(place: Place) -> int:
    """Give the size of the L2 cache."""
    return L2


def run(
    function: Callable[..., Any], names: tuple[str, ...], stream: Any, arguments: tuple[Any, ...]
) -> Sequence[Any]:
    """Call a function on arrays as they are seen in here: `replay.run`, each time the first."""
    seen = borrow(stream, names, arguments[: len(names)])
    return give(*function(*seen, *arguments[len(names) :]))


def _as_kernels_take_it(argument: Any) -> Any:
    """Give addresses for arrays, in tuples too."""
    if isinstance(argument, DeviceArray):
        return argument.address
    if isinstance(argument, tuple):
        return type(argument)(*map(_as_kernels_take_it, argument))
    return argument


def launch(
    place: Place, kernel: str, view: str, format_name: str, width: int, blocks: int,
    *arguments: Any, shared: int = 0, together: bool = False,
) -> None:  # fmt: skip
    """Run a kernel to its end."""
    function = getattr(_VIEWS[view], f"{kernel}_{view}")
    access = FORMATS[format_name].itemsize * width
    slots = shared // (access * THREADS)
    if together and blocks > RUNNING:
        raise RuntimeError(f"{blocks} blocks launched together, of which {RUNNING} can run at once")
    arguments = tuple(map(_as_kernels_take_it, arguments))
    run_blocks(
        function, min(blocks, MOST_BLOCKS), THREADS, arguments, slots=slots, together=together
    )
