"""How kernels are launched in Numba's simulator."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import numpy as np

from ..layout import View
from ..libraries import Place
from . import planes, rows
from .arguments import Map, Memory
from .formats import FORMATS, MOST_BLOCKS, THREADS
from .simulator import Flat, flat, flat_bytes, run
from .workspace import Workspace


class _Simulated(Workspace):
    def _allocate(self, place: Place) -> tuple[Any, ...]:
        partials, sums, counters = self.sizes
        return np.full(partials, np.nan), np.full(sums, np.nan), np.zeros(counters, np.int32)

    def _memory(self) -> Memory:
        partials, sums, counters = self.arrays
        wide = FORMATS["float64"]
        return Memory(Flat(wide, 1, partials), Flat(wide, 1, sums), counters)


@cache
def workspace(device: int, stream: int) -> Workspace:
    """Give a stream's memory."""
    return _Simulated()


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


def on_device(ordinal: int) -> AbstractContextManager[None]:
    """Do nothing: there is one device."""
    return nullcontext()


def launch(
    place: Place, kernel: str, view: str, format_name: str, width: int, blocks: int,
    *arguments: Any,
) -> None:  # fmt: skip
    """Run a kernel to its end."""
    module = planes if view == "planes" else rows
    run(getattr(module, f"{kernel}_{view}"), min(blocks, MOST_BLOCKS), THREADS, arguments)
