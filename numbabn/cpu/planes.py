"""Kernels on planes ``[N, C, S]``: a channel's values lie in N runs of S.

A long plane is cut into tiles; short planes of a group of channels make one tile. A channel's tiles
are taken in pieces, whose sums are merged: the tree of a sum depends on the shape alone.

Forward and backward go through blocks of channels as through a pipe: a tile of the block before is
written, then the same tile of the next block is summed, so that memory is read and written at once.
A slab keeps what was summed until it is written, where a block is too large for a cache to keep it.

Results go past the caches in whole lines. Where a plane ends within a line, the line is left to the
next plane, which starts there: a line in two parts would first have to be read, and a store that
waits for memory holds up all the stores behind it.
"""

import numpy as np
from numba import prange

from .arguments import number, set_number
from .compilation import inlined, kernel, primitive
from .intrinsics import LANES, front, get, missing, moved, nothing, put, store_fence
from .vector import (
    CONSTANTS,
    SUMS,
    both_sums,
    element,
    fetch_run,
    finish_backward,
    finish_forward,
    first_number,
    gather,
    gradient_run,
    keep_front,
    keep_gated_front,
    lead,
    merge,
    moments,
    normalize_run,
    of_thread,
    product_planes,
    running_affine,
    scatter,
    share,
    spares_of,
    sum_planes,
)

PLANE_TILE = 1024  # elements of a plane that are taken in one go, at most
PLANE_GROUP = 1024  # elements of a group of short planes, about
PLANE_PIECE = 1 << 14  # elements of a channel that are summed together, at least ...
PLANE_PIECES = 64  # ... and pieces of a channel, at most
PLANE_AHEAD = 1536  # elements from what is summed to what is fetched, about
SPARE = PLANE_TILE + LANES  # elements of a spare tile
PARTIAL = 3  # numbers left of a piece of a channel: count, mean and M2, or two sums


def tiling(N: int, S: int) -> tuple[int, int, int, int]:
    """Elements of a tile, tiles of a plane, tiles of a piece, pieces of a channel."""
    cuts = -(-S // PLANE_TILE)
    tile = S if cuts == 1 else -(-S // (cuts * LANES)) * LANES
    piece = max(-(-PLANE_PIECE // tile), -(-N * cuts // PLANE_PIECES))
    return tile, cuts, piece, -(-N * cuts // piece)


def slab_row(group: int, S: int) -> int:
    """Elements that the slab has for a group of planes, the front of their first line included."""
    return LANES + -(-group * S // LANES) * LANES


@inlined
def _start(shape, piece):
    """Plane and place where a piece begins, and its tiles."""
    t = piece * shape.piece
    return t // shape.cuts, t % shape.cuts * shape.tile, min(shape.piece, shape.N * shape.cuts - t)


@inlined
def _next(shape, n, s):
    """Plane and place of the next tile."""
    s += shape.tile
    return (n, s) if s < shape.S else (n + 1, 0)


@inlined
def _channels(shape, block, k):
    """First channel, and channels, of the group at ``k`` of a block; none if there is no such."""
    c = block * shape.block + k
    return c, max(0, min(shape.group, shape.C - c)) if block >= 0 else 0


@inlined
def _constants(memory, k):
    """Constants of the block's channel ``k``; those of the channel before the block lie before."""
    return moved(memory.constants.data, (k + 1) * CONSTANTS)


@inlined
def _partial(memory, shape, k, piece):
    """Where the sums of a piece of the block's channel ``k`` are kept."""
    return moved(memory.partials.data, (k * shape.pieces + piece) * PARTIAL)


@inlined
def _set_moments(memory, shape, k, piece, count, mean, m2):
    """Keep a piece's moments."""
    at = _partial(memory, shape, k, piece)
    put(at, 0, np.float64(count))
    put(at, 1, mean)
    put(at, 2, m2)


@inlined
def _set_products(memory, shape, k, piece, total, product):
    """Keep a piece's sums of dy, and of dy * (x - mean)."""
    at = _partial(memory, shape, k, piece)
    put(at, 0, total)
    put(at, 1, product)


@inlined
def _merged_moments(memory, shape, k):
    """Count, mean and M2 of a channel."""
    at = _partial(memory, shape, k, 0)
    count, mean, m2 = get(at, 0), get(at, 1), get(at, 2)
    for piece in range(1, shape.pieces):
        at = _partial(memory, shape, k, piece)
        count, mean, m2 = merge(count, mean, m2, get(at, 0), get(at, 1), get(at, 2))
    return count, mean, m2


@inlined
def _merged_products(memory, shape, k):
    """Add up what is left of a channel's pieces."""
    total, product = 0.0, 0.0
    for piece in range(shape.pieces):
        at = _partial(memory, shape, k, piece)
        total += get(at, 0)
        product += get(at, 1)
    return total, product


@inlined
def _kept(memory, shape, summed, n, k):
    """Where the slab keeps the group at ``k`` of a block, of the first or the second input."""
    data = memory.slab.data
    if missing(data):
        return data
    groups = -(-shape.block // shape.group)
    row = (summed * groups + k // shape.group) * shape.N + n
    return moved(data, row * shape.row + LANES)


@inlined
def _ahead(view, shape, n, c, s):
    """Where the tile lies that will be summed some tiles later, maybe of the next group."""
    s += shape.ahead * shape.tile
    while s >= shape.S:
        s -= shape.cuts * shape.tile
        n += 1
    if n >= shape.N:
        n -= shape.N
        c += shape.group
    if s < 0 or n >= shape.N or c >= shape.C:
        return view.data
    return element(view, n, c, s)


@inlined
def _near(view, n, c, start, stop, spares, k):
    """Pointer to planes from channel ``c`` on, or to a copy in a spare tile."""
    at = element(view, n, c, 0)
    if view.ds == 1 or missing(at):
        return at
    spare = moved(spares.data, k * SPARE)
    gather(moved(at, start * view.ds), view.ds, spare, stop - start)
    return moved(spare, -start)


@inlined
def _target(view, n, c, start, spares, k):
    """Pointer to planes to write, or to a spare tile."""
    at = element(view, n, c, 0)
    return at if view.ds == 1 or missing(at) else moved(spares.data, k * SPARE - start)


@inlined
def _put_back(view, n, c, start, stop, tile):
    """Write what lies in a spare tile to where it belongs."""
    if view.ds != 1 and not missing(view.data):
        at = moved(element(view, n, c, 0), start * view.ds)
        scatter(moved(tile, start), at, view.ds, stop - start)


@inlined
def _written(view, shape, n, c, count, s, first, last, scope):
    """First and last number to write of a tile, counted from its first plane.

    `scope` are the channels whose planes one thread after the other writes, lines that two of them
    share included. Within a plane lines are cut in two only between pieces: another thread may be
    ahead by then with the slab of the next piece.
    """
    stop, whole, end = 0, count * shape.S, s + shape.tile
    if shape.streaming and view.ds == 1:
        at = element(view, n, c, 0)
        if shape.adjoining and c + count < scope[1]:
            whole -= front(moved(at, whole))
        skip = lead(moved(at, s))
        if shape.adjoining and s == 0 and c > scope[0]:
            s = -front(at)
        elif s > 0 and not first:
            s += skip
        stop = whole if end >= shape.S else end if last else end + skip
    else:
        stop = whole if end >= shape.S else end
    return min(s, whole), min(stop, whole)


@inlined
def _normalize_tile(maps, memory, shape, n, c, k, start, stop, rectify):
    y, mask, spares = maps.y, maps.mask, memory.spares
    x_run = _kept(memory, shape, 0, n, k)
    if missing(x_run):
        x_run = _near(maps.x, n, c, start, stop, spares, 0)
    y_run = _target(y, n, c, start, spares, 2)
    normalize_run(
        x_run, _near(maps.residual, n, c, start, stop, spares, 1), y_run,
        mask.data, n * mask.dn + c * mask.dc, mask.ds, start, stop, shape.S,
        _constants(memory, k), rectify, shape.streaming and y.ds == 1,
    )  # fmt: skip
    _put_back(y, n, c, start, stop, y_run)


@inlined
def _sum_tile(x, y, memory, shape, n, c, k, count, piece, s, inner):
    """Sum a tile of `count` channels. `inner`: the planes before belong to the same thread."""
    size = min(shape.tile, shape.S - s)
    ahead = _ahead(x, shape, n, c, s)
    slab = _kept(memory, shape, 0, n, k)
    if not missing(slab):
        if s == 0 and inner:
            keep_front(slab, element(x, n, c, 0), front(element(y, n, c, 0)))
        slab = moved(slab, s)
    sum_planes(
        moved(_near(x, n, c, s, s + size, memory.spares, 0), s), ahead, x.dc, slab, shape.S,
        count, size, _partial(memory, shape, k, piece), shape.pieces * PARTIAL, memory.sums.data,
    )  # fmt: skip


@inlined
def _start_sums(memory, count):
    """Set the sums of a group to 0."""
    for i in range(count * SUMS):
        put(memory.sums.data, i, 0.0)


@primitive
def _forward_piece(maps, memory, shape, scope, block, before, k, piece, rectify):
    """Write a piece of the group at `k` of block `before`, sum that of `block`; -1 is none."""
    last, writes = _channels(shape, before, k)
    c, sums = _channels(shape, block, k)
    inner = shape.adjoining and c > scope[0]
    n, s, tiles = _start(shape, piece)
    _start_sums(memory, sums)
    for j in range(sums):
        first = first_number(element(maps.x, n, c + j, s), 0)
        put(_partial(memory, shape, k + j, piece), 0, first)
    places = 0
    for t in range(tiles):
        if writes:
            start, stop = _written(maps.y, shape, n, last, writes, s, t == 0, t == tiles - 1, scope)
            if not missing(maps.residual.data):
                fetch_run(_ahead(maps.residual, shape, n, last, s), stop - start)
            _normalize_tile(maps, memory, shape, n, last, k, start, stop, rectify)
        if sums:
            _sum_tile(maps.x, maps.y, memory, shape, n, c, k, sums, piece, s, inner)
        places += min(shape.tile, shape.S - s)
        n, s = _next(shape, n, s)
    for j in range(sums):
        total, squares = both_sums(memory.sums.data, j)
        shift = get(_partial(memory, shape, k + j, piece), 0)
        mean, m2 = moments(places, shift, total, squares)
        _set_moments(memory, shape, k + j, piece, places, mean, m2)


@primitive
def _keep_last_constants(memory, shape):
    """Put the constants of a block's last channel where the next block looks for them."""
    for i in range(CONSTANTS):
        put(_constants(memory, -1), i, get(_constants(memory, shape.block - 1), i))


@inlined
def _set_constants(memory, k, values):
    for i, value in enumerate(values):
        put(_constants(memory, k), i, value)


@primitive
def _finish_forward(x, memory, shape, parameters, settings, block):
    """Save a block's statistics, and what writing it takes."""
    _keep_last_constants(memory, shape)
    for k in range(min(shape.block, shape.C - block * shape.block)):
        c = block * shape.block + k
        count, mean, m2 = _merged_moments(memory, shape, k)
        values = finish_forward(x, c, count, mean, m2, parameters, settings)
        _set_constants(memory, k, values)


@primitive
def _blocks(shape):
    return -(-shape.C // shape.block)


@primitive
def _rounds(shape):
    """How often the threads set out: once per block that they share, and once to write the last."""
    return _blocks(shape) + 1 if shape.together else 1


@primitive
def _forward_tasks(maps, memory, shape, scope, block, before, first, last, rectify):
    """Take pieces of groups of two blocks."""
    for task in range(first, last):
        k, piece = task // shape.pieces * shape.group, task % shape.pieces
        _forward_piece(maps, memory, shape, scope, block, before, k, piece, rectify)


@inlined
def _tasks(shape):
    """Pieces of groups of a block."""
    return -(-shape.block // shape.group) * shape.pieces


@primitive
def _forward_round(maps, parameters, settings, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        first, last = share(_tasks(shape), t, shape.threads)
        _forward_tasks(
            maps, spares_of(memory, t), shape, (0, shape.C), block, block - 1, first, last,
            settings.rectify,
        )  # fmt: skip
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        scope = first * shape.block, min(last * shape.block, shape.C)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            _forward_tasks(
                maps, memory, shape, scope, summed, written, 0, _tasks(shape), settings.rectify
            )
            if block < last:
                _finish_forward(maps.x, memory, shape, parameters, settings, block)
    store_fence()


@kernel("Forward", "Parameters", "Settings")
def forward_planes(maps, parameters, settings, memory, shape):
    """Statistics, normalize and running averages."""
    for block in range(_rounds(shape)):
        for t in prange(shape.threads):
            _forward_round(maps, parameters, settings, memory, shape, block, t)
        if shape.together:
            _finish_forward(maps.x, memory, shape, parameters, settings, block)


@kernel("Forward", "Numbers", "Numbers")
def statistics_planes(maps, mean, m2, memory, shape):
    """Mean and M2 of each channel; one block holds all channels."""
    for t in prange(shape.threads):
        first, last = share(_tasks(shape), t, shape.threads)
        _forward_tasks(maps, spares_of(memory, t), shape, (0, shape.C), 0, -1, first, last, False)
    for c in range(shape.C):
        _, channel_mean, channel_m2 = _merged_moments(memory, shape, c)
        set_number(mean, c, channel_mean)
        set_number(m2, c, channel_m2)


@primitive
def _side_by_side(maps):
    """Whether the places of a plane lie side by side in every map."""
    residual = missing(maps.residual.data) or maps.residual.ds == 1
    return residual and maps.x.ds == 1 and maps.y.ds == 1


@primitive
def _normalize_share(maps, memory, shape, rectify, first, last):
    """Write the planes ``first`` to ``last``, counted as they lie: channels, then the batch."""
    # Only what has to be copied needs to be cut.
    size = shape.S if _side_by_side(maps) else shape.tile
    while first < last:
        n, c = first // shape.C, first % shape.C
        count = min(shape.C - c, last - first) if shape.adjoining else 1
        for s in range(0, shape.S, size):
            stop = count * shape.S if size == shape.S else min(s + size, shape.S)
            _normalize_tile(maps, memory, shape, n, c, c, s, stop, rectify)
        first += count
    store_fence()


@kernel("Forward", "Parameters", "Settings")
def normalize_planes(maps, parameters, settings, memory, shape):
    """Normalize by running statistics."""
    for c in range(shape.C):
        _set_constants(memory, c, running_affine(maps.x, c, parameters, settings))
    for t in prange(shape.threads):
        first, last = share(shape.N * shape.C, t, shape.threads)
        _normalize_share(maps, spares_of(memory, t), shape, settings.rectify, first, last)


@inlined
def _product_tile(maps, memory, shape, n, c, k, count, piece, s, inner):
    """Sum a tile of `count` channels. `inner`: the planes before belong to the same thread."""
    size = min(shape.tile, shape.S - s)
    dy, x, mask, spares = maps.dy, maps.x, maps.mask, memory.spares
    ahead_dy, ahead_x = _ahead(dy, shape, n, c, s), _ahead(x, shape, n, c, s)
    slab_dy, slab_x = _kept(memory, shape, 0, n, k), _kept(memory, shape, 1, n, k)
    bit = n * mask.dn + c * mask.dc
    if not missing(slab_x):
        if s == 0 and inner:
            keep_gated_front(
                slab_dy, slab_x, element(dy, n, c, 0), element(x, n, c, 0),
                mask.data, bit, mask.ds, front(element(maps.dx, n, c, 0)),
            )  # fmt: skip
        slab_dy, slab_x = moved(slab_dy, s), moved(slab_x, s)
    product_planes(
        moved(_near(dy, n, c, s, s + size, spares, 0), s), ahead_dy, dy.dc,
        moved(_near(x, n, c, s, s + size, spares, 1), s), ahead_x, x.dc,
        slab_dy, slab_x, shape.S, mask.data, bit + s * mask.ds, mask.dc, mask.ds,
        count, size, _partial(memory, shape, k, piece), shape.pieces * PARTIAL, memory.sums.data,
    )  # fmt: skip


@inlined
def _gradient_tile(maps, memory, shape, n, c, k, start, stop, training):
    dx, dresidual, mask, spares = maps.dx, maps.dresidual, maps.mask, memory.spares
    dy_run, x_run = _kept(memory, shape, 0, n, k), _kept(memory, shape, 1, n, k)
    bits = nothing(mask.data)  # dy in the slab has gone through the ReLU
    if missing(x_run):
        bits = mask.data
        dy_run = _near(maps.dy, n, c, start, stop, spares, 0)
        x_run = _near(maps.x, n, c, start, stop, spares, 1)
    dx_run = _target(dx, n, c, start, spares, 2)
    residual_run = _target(dresidual, n, c, start, spares, 3)
    gradient_run(
        dy_run, x_run, dx_run, residual_run, bits, n * mask.dn + c * mask.dc, mask.ds,
        start, stop, shape.S, _constants(memory, k), training, shape.streaming and dx.ds == 1,
    )  # fmt: skip
    _put_back(dx, n, c, start, stop, dx_run)
    _put_back(dresidual, n, c, start, stop, residual_run)


@primitive
def _backward_piece(maps, gradients, memory, shape, scope, block, before, k, piece, training):
    """Write a piece of the group at `k` of block `before`, sum that of `block`; -1 is none."""
    last, writes = _channels(shape, before, k)
    c, sums = _channels(shape, block, k)
    inner = shape.adjoining and c > scope[0]
    n, s, tiles = _start(shape, piece)
    _start_sums(memory, sums)
    for j in range(sums):
        put(_partial(memory, shape, k + j, piece), 0, number(gradients.mean, c + j))
    for t in range(tiles):
        if writes:
            start, stop = _written(
                maps.dx, shape, n, last, writes, s, t == 0, t == tiles - 1, scope
            )
            _gradient_tile(maps, memory, shape, n, last, k, start, stop, training)
        if sums:
            _product_tile(maps, memory, shape, n, c, k, sums, piece, s, inner)
        n, s = _next(shape, n, s)
    for j in range(sums):
        total, product = both_sums(memory.sums.data, j)
        _set_products(memory, shape, k + j, piece, total, product)


@primitive
def _finish_backward(x, gradients, memory, shape, block):
    """Save a block's gradients by weight and bias, and what writing it takes."""
    _keep_last_constants(memory, shape)
    for k in range(min(shape.block, shape.C - block * shape.block)):
        c = block * shape.block + k
        total, product = _merged_products(memory, shape, k)
        values = finish_backward(x, c, shape.N * shape.S, total, product, gradients)
        _set_constants(memory, k, values)


@primitive
def _backward_tasks(maps, gradients, training, memory, shape, scope, block, before, first, last):
    """Take pieces of groups of two blocks."""
    for task in range(first, last):
        k, piece = task // shape.pieces * shape.group, task % shape.pieces
        _backward_piece(maps, gradients, memory, shape, scope, block, before, k, piece, training)


@primitive
def _backward_round(maps, gradients, training, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        first, last = share(_tasks(shape), t, shape.threads)
        _backward_tasks(
            maps, gradients, training, spares_of(memory, t), shape, (0, shape.C), block, block - 1,
            first, last,
        )  # fmt: skip
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        scope = first * shape.block, min(last * shape.block, shape.C)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            _backward_tasks(
                maps, gradients, training, memory, shape, scope, summed, written,
                0, _tasks(shape),
            )  # fmt: skip
            if block < last:
                _finish_backward(maps.x, gradients, memory, shape, block)
    store_fence()


@kernel("Backward", "Gradients", "Flag")
def backward_planes(maps, gradients, training, memory, shape):
    """Gradients by x, weight, bias and residual."""
    for block in range(_rounds(shape)):
        for t in prange(shape.threads):
            _backward_round(maps, gradients, training, memory, shape, block, t)
        if shape.together:
            _finish_backward(maps.x, gradients, memory, shape, block)
