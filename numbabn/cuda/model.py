"""What a call should take on a GPU, from what it moves, and what runs at once; and what bounds it.

Of three bounds the largest counts: the bytes that memory moves, the instructions that warps issue,
and the time that a block takes for a piece, by the blocks that one place has after another. The
constants are estimates until they have been held against measured times: `numbabn predict
--against`.
"""

import math
from typing import NamedTuple

import numpy as np

from .. import cuda
from ..layout import arrange
from ..libraries import DeviceArray, Place, form_of
from .compilation import Code, Variant, compiled
from .formats import ACCESS, FORMATS, THREADS, WARP
from .schedule import TURNS, Cut, cut, is_held


class GPU(NamedTuple):
    """What a call depends on."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    registers: int  # of a multiprocessor
    shared: int  # bytes of shared memory of a multiprocessor
    threads: int  # of a multiprocessor, at most
    cache: int  # bytes of L2
    copy: float  # bytes a second that a copy reads and writes
    clock: float  # cycles a second


GPUS = {
    each.name: each
    for each in (
        GPU("A100", (8, 0), 108, 1 << 16, 164 << 10, 2048, 40 << 20, 1.75e12, 1.41e9),
        GPU("H100", (9, 0), 132, 1 << 16, 228 << 10, 2048, 50 << 20, 2.9e12, 1.755e9),
        GPU("H200", (9, 0), 132, 1 << 16, 228 << 10, 2048, 60 << 20, 4.3e12, 1.755e9),
    )
}

RESERVED = 1 << 10  # bytes of shared memory that each block takes beyond its own
UNIT = 256  # registers are given to a warp so many at a time
# Seconds. None is measured by this project yet.
LAUNCH = 2e-6  # from the end of what ran before to a kernel's first load, and its end
LATENCY = 8e-7  # of a load while memory is busy
SUMS = 6e-7  # of a block's sums and constants
WAIT = 1.5e-6  # of blocks for one another, once all have come
WRITE = 1e-7  # of a turn's stores, which nothing waits for
ISSUED = 0.6 * 4  # instructions that a multiprocessor issues in a cycle, of four at most
# Instructions of a thread for a full access to each array, without residual and mask: for the sums
# and for the results, by eye from the machine code for sm_90.
INSTRUCTIONS = {
    ("forward", 8): (75, 60), ("forward", 4): (48, 42), ("forward", 2): (48, 42),
    ("backward", 8): (90, 95), ("backward", 4): (60, 65), ("backward", 2): (60, 65),
}  # fmt: skip
# By operation: reads of arrays of x's size for the sums, and for the results; and writes.
TRAFFIC = {"forward": (1, 1, 1), "inference": (0, 1, 1), "backward": (2, 2, 1)}
KERNELS = {
    "forward": ("statistics", "normalize"),
    "inference": ("normalize",),
    "backward": ("products", "gradient"),
}


class Prediction(NamedTuple):
    """Of one call."""

    variant: str
    cut: Cut
    resident: int  # blocks of a multiprocessor
    registers: int  # of a thread
    waves: int  # of blocks, one after another
    nbytes: int  # that memory moves
    bounds: dict[str, float]  # seconds
    launches: int

    @property
    def bound(self) -> str:
        """What takes longest."""
        longest = max(self.bounds, key=lambda name: self.bounds[name])
        return "launch" if self.launches * LAUNCH > self.bounds[longest] else longest

    @property
    def seconds(self) -> float:
        """Device time."""
        return self.launches * LAUNCH + max(self.bounds.values())


def resident_blocks(code: Code, dynamic: int, gpu: GPU) -> int:
    """Count the blocks of a kernel that a multiprocessor holds at once."""
    warps = THREADS // WARP
    per_warp = -(-code.registers * WARP // UNIT) * UNIT
    return min(
        gpu.registers // (per_warp * warps),
        gpu.shared // (code.shared + dynamic + RESERVED),
        gpu.threads // THREADS,
    )


def cut_of(op: str, shape: tuple[int, ...], axis: int, dtype: np.dtype[np.generic]) -> Cut:
    """Cut a call on contiguous arrays as it will be."""
    strides = tuple(np.cumprod((dtype.itemsize, *shape[:0:-1]))[::-1].tolist())
    place = Place(None, 0, 0, False)
    array = DeviceArray(None, place, 0, form_of(shape, strides, dtype))
    count = 3 if op == "backward" else 2
    layout = arrange(cuda, axis % len(shape), (array,) * (count - 1), (array,))
    sums, _, _ = TRAFFIC[op]
    return cut(layout.plan, dtype.name, (0,) * count, max(sums, 1))


def predict(
    op: str, shape: tuple[int, ...], axis: int, dtype: np.dtype[np.generic], gpu: GPU
) -> Prediction:
    """Predict a call's device time on contiguous arrays that no cache holds.

    Parameters
    ----------
    op : {"forward", "inference", "backward"}
    shape, axis, dtype
        Of x.
    gpu : GPU
        Kernels are compiled for its compute capability; it need not be here.
    """
    work = cut_of(op, shape, axis, dtype)
    view = work.view
    if op != "inference":
        code = compiled(Variant(op, view, dtype.name, work.width), gpu.capability)
        resident = resident_blocks(code, work.held, gpu)
        if is_held(work.shape, resident * gpu.multiprocessors):
            return _held(op, view, work, dtype.itemsize, code, resident, gpu)
    return _swept(op, view, work, dtype.name, gpu)


def _issue(op: str, part: int, cut: Cut, itemsize: int, gpu: GPU) -> float:
    """Seconds in which a part's instructions are issued."""
    N, C, S = cut.shape[:3]
    costs = INSTRUCTIONS["forward" if op == "inference" else op, ACCESS // itemsize]
    # What is not the numbers' own arithmetic takes as long for a narrow access.
    cost = costs[part] * (0.5 + 0.5 * cut.width * itemsize / ACCESS)
    warps = N * C * S / cut.width / WARP
    return warps * cost / (gpu.multiprocessors * gpu.clock * ISSUED)


def _held(
    op: str, view: str, cut: Cut, itemsize: int, code: Code, resident: int, gpu: GPU
) -> Prediction:
    shape = cut.shape
    sums, _, writes = TRAFFIC[op]
    size = math.prod(shape[:3]) * itemsize
    waves = -(-cut.tasks // (resident * gpu.multiprocessors))
    turns = -(-shape.rounds // TURNS)
    waits = 0 if shape.pieces == 1 else 2 if view == "rows" else 1
    piece = turns * (LATENCY + WRITE) + SUMS + waits * WAIT
    nbytes = (sums + writes) * size
    issue = _issue(op, 0, cut, itemsize, gpu) + _issue(op, 1, cut, itemsize, gpu)
    bounds = {"memory": nbytes / gpu.copy, "instructions": issue, "latency": waves * piece}
    return Prediction("held", cut, resident, code.registers, waves, nbytes, bounds, 1)


def _swept(op: str, view: str, cut: Cut, format_name: str, gpu: GPU) -> Prediction:
    shape, itemsize = cut.shape, FORMATS[format_name].itemsize
    sums, reads, writes = TRAFFIC[op]
    size = math.prod(shape[:3]) * itemsize
    # Half of the cache keeps what was read: each of its two halves may hold a copy.
    again = reads * size - min(sums * size, gpu.cache // 2)
    partials = 2 * 8 * 3 * shape.C * shape.pieces  # written and read
    moved = [sums * size + partials, again + writes * size][-len(KERNELS[op]) :]
    turns = -(-shape.rounds // TURNS)
    bounds = dict.fromkeys(("memory", "instructions", "latency"), 0.0)
    waves, registers, resident = 0, 0, 0
    for part, (kernel, nbytes) in enumerate(zip(KERNELS[op], moved, strict=True)):
        code = compiled(Variant(kernel, view, format_name, cut.width), gpu.capability)
        resident = resident_blocks(code, 0, gpu)
        registers = max(registers, code.registers)
        own = -(-cut.tasks // (resident * gpu.multiprocessors))
        bounds["memory"] += nbytes / gpu.copy
        bounds["instructions"] += _issue(op, part - len(moved), cut, itemsize, gpu)
        bounds["latency"] += own * (turns * (LATENCY + WRITE) + SUMS)
        waves += own
    variant, launches = ("swept twice", 3) if sums else ("one sweep", 1)
    total = sum(moved)
    return Prediction(variant, cut, resident, registers, waves, total, bounds, launches)
