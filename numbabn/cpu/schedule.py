"""How a call's work is cut: blocks that fit in a cache, threads, and the memory that they need.

Nothing here changes a bit of the results. The tree of every sum follows from the shape alone
(`planes.tiling`, `rows.tiling`); a plan says only in which order its branches are taken.
"""

import math
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numba.extending import register_jitable

from ..layout import Layout, View, see
from ..threads import Team, team_for
from . import planes, rows
from .arguments import Memory, Shape
from .intrinsics import LANES, LINE
from .vector import COLUMNS, CONSTANTS, SUMS

# numba compiles no 16-bit floats: kernels take the integers that hold their bits.
STORED = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float64): "float64",
    np.dtype(np.float16): "uint16",
    np.dtype(ml_dtypes.bfloat16): "int16",
}
SWEEPS = {"statistics": 1, "normalize": 2, "forward": 2, "backward": 3}
SUMMED = {"statistics": 1, "normalize": 1, "forward": 1, "backward": 2}
PIPED = ("forward", "backward")
FOLDS_ROWS = True  # many rows of few channels are summed as one
POOL_BYTES = 1 << 26  # workspace that a thread keeps from call to call ...
PLANS = 256  # ... and plans


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
    """A kernel's last arguments, for which stored dtype it is compiled, and who runs it."""

    stored: str
    team: Team
    memory: Memory
    shape: Shape


class Cut(NamedTuple):
    """A shape, and elements per thread, or in all, of each part of the memory."""

    shape: Shape
    slab: int
    spares: int
    sums: int
    constants: int
    partials: int


# numba compiles these, too. `summed`: how many inputs are summed; `piped`: whether one block is
# written while the next is summed; `l2`, `l3`: bytes of the caches.


def cut_planes(
    N: int, C: int, S: int, adjoining: bool, itemsize: int, threads: int,
    summed: int, piped: bool, l2: int, l3: int,
) -> Cut:  # fmt: skip
    """Cut planes."""
    channel = N * S * itemsize * summed
    streaming = N * C * S * itemsize > l3 // 4
    adjoining = adjoining and S >= LANES
    # A thread's own channels must be many, or one of them has less to do than another.
    together = threads > 1 and (4 * threads > C or channel * threads > l3 // 2)
    group = min(-(-planes.PLANE_GROUP // S), -(-C // (4 * threads))) if adjoining else 1
    block = group
    if not piped or (together and channel > l3 // 2):
        together, block = True, C
    tile, cuts, piece, pieces = planes.tiling(N, S)
    if together and block < C:
        block = min(C, group * -(-threads // pieces))
    row = planes.slab_row(group, S)
    ahead = -(-planes.PLANE_AHEAD // (summed * tile * group))
    shape = Shape(
        N, C, S, block, group, together, threads, streaming, adjoining, tile, cuts, piece, pieces,
        ahead, row, 1,
    )  # fmt: skip
    slab = -(-block // group) * N * row * summed
    if not _pays(slab * itemsize, shape, l2, l3):
        slab = 0
    return Cut(
        shape, slab, 4 * planes.SPARE, group * SUMS,
        (block + 1) * CONSTANTS + LANES, block * pieces * planes.PARTIAL,
    )  # fmt: skip


def cut_rows(
    N: int, C: int, S: int, adjoining: bool, itemsize: int, threads: int,
    summed: int, piped: bool, l2: int, l3: int,
) -> Cut:  # fmt: skip
    """Cut rows."""
    streaming = N * C * S * itemsize > l3 // 4
    # Short rows: so many are summed as one that its columns are blocks of them.
    fold = COLUMNS if adjoining and C < LANES else 1
    width = C * fold
    piece, pieces = rows.tiling(N * S // fold)
    # Threads take pieces of whole rows, or blocks of columns where the pieces are too few.
    blocks = -(-2 * threads // max(1, pieces)) if threads > 1 else 1
    block = -(-width // (blocks * COLUMNS)) * COLUMNS
    ahead = -(-rows.ROW_AHEAD // (rows.ROW_TILE * min(block, width)))
    group = min(-(-rows.ROW_JOINED // C), N * S) if adjoining else 1
    shape = Shape(
        N, C, S, block, group, True, threads, streaming, adjoining,
        rows.ROW_TILE, 0, piece, pieces, ahead, 0, fold,
    )  # fmt: skip
    return Cut(
        shape, 0, rows.SPARES * rows.SPARE, 3 * (block + LANES),
        CONSTANTS * (group * C + 4 * LANES), pieces * rows.partials_row(width),
    )  # fmt: skip


def _pays(nbytes: int, shape: Shape, l2: int, l3: int) -> bool:
    """Whether a slab of so many bytes pays: what L2 keeps needs none, what L3 loses neither."""
    blocks = -(-shape.C // shape.block)
    copies = 1 if shape.together else shape.threads
    return (
        shape.streaming and blocks > copies and l2 * 3 // 8 < nbytes and nbytes * copies <= l3 // 2
    )


def rooms(cut: Cut, itemsize: int) -> tuple[int, int, int, int, int]:
    """Bytes of each part of the memory, in whole lines."""
    computed = 8 if itemsize == 8 else 4
    return (
        _lines(cut.slab * itemsize), _lines(cut.spares * itemsize), _lines(cut.sums * 8),
        _lines(cut.constants * computed), _lines(cut.partials * 8),
    )  # fmt: skip


def _lines(nbytes: int) -> int:
    # A line more, so that no two threads write to one.
    return (-(-nbytes // LINE) + 1) * LINE


for _function in (
    see, cut_planes, cut_rows, rooms, _lines, _pays,
    planes.tiling, planes.slab_row, rows.tiling, rows.partials_row,
):  # fmt: skip
    register_jitable(_function)


class _Pool(threading.local):
    """Workspace that each of the caller's threads keeps: fresh memory page-faults on every call."""

    def __init__(self) -> None:
        self.buffer = np.empty(0, np.uint8)
        self.plans: dict[Any, Plan] = {}

    def plan(self, cut: Cut, dtype: Any, team: Team, key: Any) -> Plan:
        """Give a kernel its workspace, cut from the buffer that all the thread's calls share."""
        shape, itemsize = cut.shape, dtype.itemsize
        computed = 8 if itemsize == 8 else 4
        alone = not shape.together
        parts = (
            (cut.slab, itemsize, alone), (cut.spares, itemsize, True), (cut.sums, 8, True),
            (cut.constants, computed, alone), (cut.partials, 8, alone),
        )  # fmt: skip
        sizes = rooms(cut, itemsize)
        counts = [shape.threads if each else 1 for _, _, each in parts]
        total = sum(size * count for size, count in zip(sizes, counts, strict=True))
        buffer = self.buffer
        if total > buffer.size:
            buffer = _aligned(total)
            if total <= POOL_BYTES:
                self.plans.clear()
                self.buffer = buffer
        views: list[View | None] = []
        at = 0
        for (elements, itemsize, _), size, count in zip(parts, sizes, counts, strict=True):
            part = buffer[at : at + size * count]
            views.append(View(part, size // itemsize, 0, 0) if elements else None)
            at += part.size
        plan = Plan(STORED[dtype], team, Memory(*views), shape)
        if total <= self.buffer.size:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            self.plans[key] = plan
        return plan


_pool = _Pool()


def _aligned(nbytes: int) -> Any:
    buffer = np.empty(nbytes + LINE, np.uint8)
    start = -buffer.ctypes.data % LINE
    return buffer[start : start + nbytes]


def _cut(
    operation: str,
    kind: str,
    sizes: tuple[int, int, int],
    adjoining: bool,
    itemsize: int,
    threads: int,
) -> Cut:
    cut = cut_planes if kind == "planes" else cut_rows
    return cut(
        *sizes, adjoining, itemsize, threads,
        SUMMED[operation], operation in PIPED, cache_bytes(2), cache_bytes(3),
    )  # fmt: skip


def plan(operation: str, layout: Layout) -> Plan:
    """Cut a call's work, and find memory for it."""
    kind, sizes, adjoining, dtype, _, _, _ = layout
    team = team_for(math.prod(sizes) * dtype.itemsize * SWEEPS[operation])
    key = operation, kind, sizes, adjoining, dtype, team
    found = _pool.plans.get(key)
    if found is None:
        cut = _cut(operation, kind, sizes, adjoining, dtype.itemsize, team.threads)
        found = _pool.plan(cut, dtype, team, key)
    return found


def forget() -> None:
    """Plan anew what is called next."""
    _pool.plans.clear()
