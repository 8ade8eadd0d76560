"""How kernels are launched in Numba's simulator."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np

from ..layout import View
from ..libraries import DeviceArray, Place
from . import planes, rows
from .arguments import Map, Memory
from .formats import FORMATS, MOST_BLOCKS, THREADS
from .simulator import Flat, flat, flat_bytes, run


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
    """Pass what blocks share."""
    wide = partial(flat, "float64", 1)
    return Memory(
        wide(partials.address, 0, partials.size - 1),
        wide(sums.address, 0, sums.size - 1),
        flat_bytes(counters.address, counters.nbytes).view(np.int32),
    )


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
