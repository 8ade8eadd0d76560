"""How much a block takes, how its threads lie, and which variant runs.

What decides the order of sums, a piece's size and the place of threads in it, depends on the shape,
the format and how much moves at a time, which strides and alignment allow: the same arrays give the
same bits whatever the number of blocks and multiprocessors. What does not, the number of blocks
and the variant, may depend on the GPU.
"""

from .arguments import Shape
from .formats import LANES, THREADS, WARP

# Accesses of a thread within a piece: few enough that float32 holds their sum, and that small
# arrays have pieces for every multiprocessor; 64 KB for a block.
DEPTH = 16


def _exponent(count: int) -> int:
    """Of the smallest power of two that is no less."""
    return (count - 1).bit_length()


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _planes(sizes: tuple[int, int, int], width: int) -> Shape:
    N, C, S = sizes
    across = min(_exponent(_ceil(S, width)), _exponent(THREADS))
    below = THREADS >> across
    side = width << across
    per_row = _ceil(S, side)  # accesses of a thread along a plane
    if per_row < DEPTH:
        planes, places = below * (DEPTH // per_row), S
    else:
        planes, places = 1, side * DEPTH
    per_plane = _ceil(S, places)
    rounds = _ceil(min(S, places), side) * _ceil(min(N, planes), below)
    pieces = per_plane * _ceil(N, planes)
    return Shape(N, C, S, planes, places, per_plane, pieces, C, across, below, rounds)


def _rows(sizes: tuple[int, int, int], width: int) -> Shape:
    N, C, S = sizes
    across = min(_exponent(_ceil(C, width)), _exponent(min(WARP, THREADS // LANES)))
    below = THREADS >> across
    rows = below * DEPTH
    rounds = _ceil(min(S, rows), below)
    per_plane = _ceil(S, rows)
    groups = _ceil(C, width << across)
    return Shape(N, C, S, 1, rows, per_plane, N * per_plane, groups, across, below, rounds)


def shape_of(view: str, sizes: tuple[int, int, int], width: int) -> Shape:
    """Cut ``[N, C, S]`` into pieces, `width` numbers at a time."""
    return (_planes if view == "planes" else _rows)(sizes, width)


def is_whole(shape: Shape) -> bool:
    """Choose the variant: one block that sums a channel and writes it at once, or several.

    Several take two launches: sums, of which the last block of each channel makes one, and then
    all of them write.
    """
    return shape.pieces == 1
