"""How much a block takes, how its threads lie, and which variant runs.

What decides the order of sums, a piece's size and the place of threads in it, depends on the shape,
the format and how much moves at a time, which strides and alignment allow: the same arrays give the
same bits whatever the number of blocks and multiprocessors. What does not, the number of blocks
and the variant, depends on the GPU.
"""

import math
from functools import lru_cache
from typing import NamedTuple

from ..layout import Plan
from .arguments import Shape
from .formats import FORMATS, LANES, THREADS, WARP

TURNS = 4  # accesses that a thread makes before it uses the first
# Accesses that a thread holds, of all arrays together: 96 KB of a block, of which two find room in
# the 228 KB of an H200's multiprocessor beside what they share. Of planes the last four accesses
# stay in registers.
DEPTH = 24
# Blocks to cut for: two for each of an H200's 132 multiprocessors.
BLOCKS = 264
NARROWEST = 64  # bytes that threads side by side take of a row, at least: memory moves as many


def _exponent(count: int) -> int:
    """Of the smallest power of two that is no less."""
    return (count - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _depth(accesses: int, arrays: int, whole: int) -> int:
    """How many accesses a thread makes in a piece, at most.

    Few, where else some blocks had no piece; but a channel of a few accesses is one piece, since
    waiting for another block takes as long as they do.
    """
    depth, most = TURNS, DEPTH // arrays
    while depth < most and accesses > depth * THREADS * BLOCKS:
        depth += TURNS
    return max(depth, whole) if whole <= 2 * TURNS else depth


def _planes(sizes: tuple[int, int, int], width: int, arrays: int) -> Shape:
    N, C, S = sizes
    accesses = _ceil(S, width)  # of a plane
    crew = _exponent(THREADS)
    across = min(_exponent(accesses), _exponent(WARP))
    if _ceil(accesses, 1 << across) * _ceil(N, WARP >> across) <= TURNS:
        crew = _exponent(WARP)
    across = min(_exponent(accesses), crew)
    below = 1 << crew - across
    side = width << across
    per_row = _ceil(S, side)  # accesses of a thread along a plane
    depth = _depth(N * C * accesses, arrays, per_row * _ceil(N, below))
    if per_row <= depth:
        most = below * (depth // per_row)
        planes = _ceil(_ceil(N, _ceil(N, most)), below) * below  # as many in each piece
        places = S
    else:
        planes, places = 1, side * _ceil(per_row, _ceil(per_row, depth))
    per_plane = _ceil(S, places)
    along = _ceil(min(S, places), side)
    rounds = along * _ceil(min(N, planes), below)
    pieces = per_plane * _ceil(N, planes)
    groups = _ceil(C, THREADS >> crew)
    return Shape(
        N, C, S, planes, places, per_plane, pieces, groups, crew, across, below,
        1 << across, along, rounds, 0, 1,
    )  # fmt: skip


def _rows(sizes: tuple[int, int, int], width: int, arrays: int, across: int) -> Shape:
    N, C, S = sizes
    below = THREADS >> across
    depth = _depth(N * S * _ceil(C, width), arrays, _ceil(S, below))
    per_plane = _ceil(S, below * depth)
    rows = _ceil(_ceil(S, per_plane), below) * below
    per_plane = _ceil(S, rows)
    pieces, columns = N * per_plane, width << across
    rounds = _ceil(min(S, rows), below)
    return Shape(
        N, C, S, 1, rows, per_plane, pieces, _ceil(C, columns), _exponent(THREADS), across, below,
        1 << across, rounds, rounds, _beside(pieces), _ceil(columns, pieces),
    )  # fmt: skip


def bundle(S: int, lanes: int) -> int:
    """How many planes side by side end with an access: a power of two."""
    return lanes // math.gcd(S, lanes)


def is_short(sizes: tuple[int, int, int], lanes: int) -> bool:
    """Whether planes without a gap are taken some channels at a time, that accesses may be full.

    Each access is of two channels at most, and a block's threads cover those channels' places.
    """
    _, C, S = sizes
    channels = bundle(S, lanes)
    fits = lanes <= S and channels * S <= THREADS * lanes
    return fits and channels > 1 and C % channels == 0


def _short(sizes: tuple[int, int, int], width: int, arrays: int) -> Shape:
    N, C, S = sizes
    channels = bundle(S, width)
    side = channels * S // width
    below = THREADS // side
    depth = _depth(N * C * S // width, arrays, _ceil(N, below))
    pieces = _ceil(N, below * depth)
    planes = _ceil(_ceil(N, pieces), below) * below
    pieces, rounds = _ceil(N, planes), _ceil(min(N, planes), below)
    return Shape(
        N, C, S, planes, S, 1, pieces, C // channels, _exponent(THREADS), 0, below, side, rounds,
        rounds, _exponent(channels), 1,
    )  # fmt: skip


def _beside(pieces: int) -> int:
    return _exponent(THREADS) - min(_exponent(pieces), _exponent(THREADS))


def _rows_at_best(sizes: tuple[int, int, int], width: int, itemsize: int, arrays: int) -> Shape:
    """Take as many columns side by side as leave every block a task, and can be held."""
    widest = min(_exponent(_ceil(sizes[1], width)), _exponent(min(WARP, THREADS // LANES)))
    narrowest = min(widest, _exponent(_ceil(NARROWEST, width * itemsize)))
    ways = [_rows(sizes, width, arrays, across) for across in range(widest, narrowest - 1, -1)]
    held = [each for each in ways if each.pieces <= BLOCKS]
    full = [each for each in held if each.groups * each.pieces >= BLOCKS]
    return (full or held[-1:] or ways)[0]


def shape_of(
    view: str, sizes: tuple[int, int, int], width: int, itemsize: int, arrays: int
) -> Shape:
    """Cut ``[N, C, S]`` into pieces, `width` numbers at a time, for sums over so many arrays."""
    if view == "planes":
        return _planes(sizes, width, arrays)
    if view == "short":
        return _short(sizes, width, arrays)
    return _rows_at_best(sizes, width, itemsize, arrays)


def slots_of(shape: Shape, view: str, arrays: int) -> int:
    """How many accesses a thread holds in shared memory."""
    turns = _ceil(shape.rounds, TURNS) * TURNS
    return arrays * (turns - TURNS if view == "planes" else turns)


class Cut(NamedTuple):
    """How the work of a call is cut."""

    view: str  # "planes", "rows", or "short": planes of which several share an access
    width: int  # numbers moved at a time
    shape: Shape
    tasks: int  # pieces of all channels
    held: int  # bytes of shared memory in which a block holds a piece
    summed: int  # bytes that are read for the sums


@lru_cache(maxsize=1024)
def cut(plan: Plan, format_name: str, offsets: tuple[int, ...], arrays: int) -> Cut:
    """Choose how many numbers move at a time, and cut the work accordingly.

    `offsets` are bytes behind an aligned address; the sums are of so many arrays.
    """
    lanes, itemsize = FORMATS[format_name].lanes, FORMATS[format_name].itemsize
    N, C, S = plan.shape
    view, width = plan.kind, _width(plan, lanes, itemsize, offsets)
    gaps = [*offsets, *([dn * itemsize for dn, _, _ in plan.steps] if N > 1 else [])]
    full = not any(gap % (lanes * itemsize) for gap in gaps)
    if (
        width < lanes
        and view == "planes"
        and plan.adjoining
        and full
        and is_short(plan.shape, lanes)
    ):
        view, width = "short", lanes
    shape = shape_of(view, plan.shape, width, itemsize, arrays)
    held = slots_of(shape, view, arrays) * THREADS * width * itemsize
    return Cut(view, width, shape, shape.groups * shape.pieces, held, arrays * N * C * S * itemsize)


def _width(plan: Plan, lanes: int, itemsize: int, offsets: tuple[int, ...]) -> int:
    """Choose how many numbers move at a time: as many as lie aligned in every array."""
    N, C, S = plan.shape
    planes = plan.kind == "planes"
    numbers = [S if planes else C, *(offset // itemsize for offset in offsets)]
    width = lanes
    for dn, dc, ds in plan.steps:
        inner, between = (ds, dc) if planes else (dc, ds)
        if inner != 1 and numbers[0] != 1:
            width = 1
        numbers += [dn] if N > 1 else []
        numbers += [between] if (C if planes else S) > 1 else []
    while any(number % width for number in numbers):
        width //= 2
    return width


def is_held(shape: Shape, capacity: int) -> bool:
    """Choose the variant: whether x is read once, and held until all of a channel is summed.

    The blocks of a channel wait for one another, so that all of them must run at once. Else there
    are two sweeps, the second of which reads x again.
    """
    return shape.pieces <= capacity


def first_lasting(tasks: int, nbytes: int, cache: int) -> int:
    """Of a first sweep, choose from which task on L2 is to keep what it reads.

    It keeps half as much as it has room for: each of its two halves may hold a copy.
    """
    return max(0, tasks - tasks * (cache // 2) // max(nbytes, 1))
