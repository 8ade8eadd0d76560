"""How a call's work is cut: blocks that fit in a cache, threads, and the memory that they need.

Nothing here changes a bit of the results. The tree of every sum follows from the shape alone
(`planes.tiling`, `rows.tiling`); a plan says only in which order its branches are taken.
"""

import os
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ..layout import Layout, View
from . import planes, rows
from .arguments import Memory, Shape
from .compilation import threads_for
from .intrinsics import LANES, LINE

# numba compiles no 16-bit floats: kernels take the integers that hold their bits.
_STORED = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
    np.dtype(np.float16): "uint16",
    np.dtype(ml_dtypes.bfloat16): "int16",
}
_SWEEPS = {"statistics": 1, "normalize": 2, "forward": 2, "backward": 3}
_SUMMED = {"statistics": 1, "normalize": 0, "forward": 1, "backward": 2}
STREAM_BYTES = 1 << 20  # results larger than this go past the caches
JOINED = 512  # columns, at least, of the rows without a gap between them that are taken as one
POOL_BYTES = 1 << 26  # workspace that a thread keeps from call to call


@cache
def cache_bytes(level: int) -> int:
    """Size of a cache, of level 2 or 3, as the system or the environment tells it."""
    told = os.environ.get(f"NUMBABN_L{level}_BYTES")
    if told:
        return int(told)
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == str(level):
            size = (index / "size").read_text().strip()
            return int(size.rstrip("KM")) << {"K": 10, "M": 20}.get(size[-1], 0)
    return {2: 1 << 20, 3: 1 << 24}[level]


class Plan(NamedTuple):
    """A kernel's last arguments, and for which stored dtype it is compiled."""

    stored: str
    memory: Memory
    shape: Shape


class _Cut(NamedTuple):
    """A shape, and elements per thread, or in all, of each part of the memory."""

    shape: Shape
    slab: int
    spares: int
    sums: int
    work: int


def _cut_planes(operation: str, N: int, C: int, S: int, itemsize: int, threads: int) -> _Cut:
    summed = _SUMMED[operation]
    channel = N * S * itemsize * summed
    x_bytes = N * C * S * itemsize
    fits = cache_bytes(3) // 2
    # A thread's own channels must be many, or one of them has less to do than another.
    together = threads > 1 and (4 * threads > C or channel * threads > fits)
    block = 1
    if operation == "statistics" or (together and channel > fits):
        together, block = True, C
    tiling = planes.tiling(N, S)
    streaming = x_bytes > STREAM_BYTES
    shape = Shape(N, C, S, 1, block, together, threads, streaming, 0, *tiling)
    pieces = shape.pieces
    slab = N * S * summed * block if block == 1 and x_bytes > STREAM_BYTES else 0
    return _Cut(
        shape, slab, 4 * planes.SPARE, 0, block * (planes.CONSTANTS + pieces * planes.PARTIAL)
    )


def _cut_rows(
    operation: str, N: int, C: int, S: int, fold: int, itemsize: int, threads: int, offset: int
) -> _Cut:
    summed, width, M = _SUMMED[operation], C * fold, N * S
    x_bytes = M * width * itemsize
    fits = cache_bytes(3) // 2
    together, block = True, width
    if operation == "normalize":
        block = width * -(-JOINED // width)
    elif operation != "statistics":
        # Whole channels, and whole tiles if that is possible.
        unit = fold * max(1, rows.COLUMNS // fold)
        wanted = max(1, cache_bytes(2) // 2 // (M * unit * itemsize * summed)) * unit
        most = -(-width // (2 * threads)) // unit * unit
        if threads == 1:
            together, block = False, min(width, max(wanted, unit))
        elif most >= unit and M * unit * itemsize * summed * threads <= fits:
            together, block = False, min(wanted, most)
        elif M * unit * itemsize * summed <= fits:
            block = unit
    tiling = rows.tiling(N, S)
    streaming = x_bytes > STREAM_BYTES
    offset = offset if streaming and fold == 1 and block < width else 0
    shape = Shape(N, C, S, fold, block, together, threads, streaming, offset, *tiling)
    pieces = shape.pieces
    fused = block < width or not together
    slab = M * block * summed if fused and x_bytes > STREAM_BYTES else 0
    return _Cut(
        shape, slab, (4 + 2 * rows.ROW_TILE) * rows.SPARE, 3 * (block + LANES),
        block * rows.CONSTANTS + LANES + pieces * (block // fold) * rows.PARTIAL,
    )  # fmt: skip


class _Pool(threading.local):
    """Workspace that each of the caller's threads keeps: fresh memory page-faults on every call."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)
        self.plans: dict[Any, Plan] = {}

    def plan(self, cut: _Cut, dtype: Any) -> Plan:
        """Give a kernel its workspace, cut from the buffer that all the thread's calls share."""
        plan = self.plans.get((cut, dtype))
        if plan is not None:
            return plan
        shape = cut.shape
        parts = (
            (cut.slab, dtype.itemsize, not shape.together),
            (cut.spares, dtype.itemsize, True),
            (cut.sums, 8, True),
            (cut.work, 8, not shape.together),
        )
        # A line more, so that no two threads write to one.
        sizes = [(-(-size * itemsize // LINE) + 1) * LINE for size, itemsize, _ in parts]
        counts = [shape.threads if each else 1 for _, _, each in parts]
        total = sum(size * count for size, count in zip(sizes, counts, strict=True))
        buffer = self.buffer
        if total > buffer.size:
            buffer = _aligned(total)
            self.plans.clear()
            self.buffer = buffer if total <= POOL_BYTES else np.empty(0, np.uint8)
        views: list[View | None] = []
        at = 0
        for (elements, itemsize, _), size, count in zip(parts, sizes, counts, strict=True):
            part = buffer[at : at + size * count]
            views.append(View(part, size // itemsize, 0, 0) if elements else None)
            at += part.size
        plan = Plan(_STORED[dtype], Memory(*views), shape)
        if total <= self.buffer.size and len(self.plans) < 256:
            self.plans[cut, dtype] = plan
        return plan


_pool = _Pool()


def _aligned(nbytes: int) -> Any:
    buffer = np.empty(nbytes + LINE, np.uint8)
    start = -buffer.ctypes.data % LINE
    return buffer[start : start + nbytes]


@lru_cache(maxsize=256)
def _cut(
    operation: str,
    kind: str,
    sizes: tuple[int, int, int, int],
    itemsize: int,
    threads: int,
    offset: int,
) -> _Cut:
    N, C, S, fold = sizes
    if kind == "planes":
        return _cut_planes(operation, N, C, S, itemsize, threads)
    return _cut_rows(operation, N, C, S, fold, itemsize, threads, offset)


def plan(operation: str, layout: Layout) -> Plan:
    """Cut a call's work, and find memory for it."""
    dtype = next(view for view in layout.views if view is not None).array.dtype
    N, C, S, fold = layout.shape
    nbytes = N * C * S * fold * dtype.itemsize
    threads = threads_for(nbytes * _SWEEPS[operation])
    cut = _cut(
        operation, layout.kind, layout.shape, dtype.itemsize, threads, _offset(layout, nbytes)
    )
    return _pool.plan(cut, dtype)


def _offset(layout: Layout, nbytes: int) -> int:
    """Elements from the first line of the first view to its first element."""
    if layout.kind == "planes" or nbytes <= STREAM_BYTES:
        return 0
    array = layout.views[0].array  # type: ignore[union-attr]
    line = min(LINE, LANES * array.itemsize)
    return int(array.ctypes.data % line // array.itemsize)
