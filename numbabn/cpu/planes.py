"""Kernels on planes ``[N, C, S]``: a channel's values lie in N runs of S.

A run is cut into tiles, and a channel's tiles are taken in pieces, whose sums are merged: the tree
of a sum depends on the shape alone.

Forward and backward go through blocks of channels as through a pipe: a tile of the block before is
written, then the same tile of the next block is summed, so that memory is read and written at once.
A slab keeps what was summed until it is written: a channel's planes lie far apart, often at
distances that share a few sets of the cache.
"""

import numpy as np
from numba import prange

from .arguments import number, set_number
from .compilation import inlined, kernel, primitive
from .intrinsics import (
    LANES,
    get,
    missing,
    moved,
    nothing,
    put,
    rounded,
    spread,
    store_fence,
    together,
)
from .vector import (
    element,
    finish_backward,
    finish_forward,
    first_number,
    gather,
    gradient_run,
    lead,
    merge,
    moments,
    normalize_run,
    of_thread,
    product_run,
    running_affine,
    scatter,
    share,
    spares_of,
    sum_run,
)

PLANE_TILE = 256  # elements of a plane that are taken in one go
PLANE_PIECE = 64  # tiles of a channel that are summed together, at least ...
PLANE_PIECES = 64  # ... and pieces of a channel, at most
PLANE_AHEAD = 5  # tiles from what is summed to what is fetched: 5 KB of float32
CONSTANTS = 5  # numbers per channel that writing takes, at most
PARTIAL = 3  # numbers that are left of a piece: count, mean and M2, or two sums
SPARE = PLANE_TILE + LANES  # elements of a spare tile


def tiling(N: int, S: int) -> tuple[int, int, int, int]:
    """Elements of a tile, tiles of a plane, tiles of a piece, pieces of a channel."""
    cuts = -(-S // PLANE_TILE)
    tile = -(-S // (cuts * LANES)) * LANES
    piece = max(PLANE_PIECE, -(-N * cuts // PLANE_PIECES))
    return tile, cuts, piece, -(-N * cuts // piece)


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
def _constants(work, k):
    """Where the constants of the block's channel ``k`` are kept."""
    return moved(work.data, k * CONSTANTS)


@inlined
def _set_constants(work, k, values):
    for i, value in enumerate(values):
        put(_constants(work, k), i, np.float64(value))


@inlined
def _partial(work, shape, k, piece):
    """Where the sums of a piece of the block's channel ``k`` are kept."""
    return moved(work.data, shape.block * CONSTANTS + (k * shape.pieces + piece) * PARTIAL)


@inlined
def _kept(slab, shape, k, n, s):
    """Where the slab keeps what was read at (n, s) of the block's channel ``k``."""
    if missing(slab.data):
        return slab.data
    return moved(slab.data, (k * shape.N + n) * shape.S + s)


@inlined
def _ahead(view, shape, n, c, s):
    """Where the tile lies that will be summed some tiles later, maybe of the next channel."""
    s += PLANE_AHEAD * shape.tile
    while s >= shape.S:
        s -= shape.cuts * shape.tile
        n += 1
    if n >= shape.N:
        n -= shape.N
        c += 1
    if s < 0 or n >= shape.N or c >= shape.C:
        return view.data
    return element(view, n, c, s)


@inlined
def _near(view, n, c, s, size, spares, k):
    """Pointer to a run; if its elements lie apart, to a copy in spare tile ``k``."""
    at = element(view, n, c, s)
    if view.ds == 1 or missing(at):
        return at
    gather(at, view.ds, moved(spares.data, k * SPARE), size)
    return moved(spares.data, k * SPARE)


@inlined
def _written(view, shape, n, c, s, first, last, streaming):
    """Where to begin and to end writing a tile, the `first` or `last` of a piece or neither.

    Lines of the target are cut only between pieces: another thread may be ahead by then with the
    slab of the next piece.
    """
    end = min(s + shape.tile, shape.S)
    if not streaming:
        return s, end
    skip = lead(element(view, n, c, 0))
    if s > 0 and not first:
        s = min(s + skip, shape.S)
    return s, end if last else min(end + skip, shape.S)


@inlined
def _normalize_tile(maps, slab, spares, shape, n, c, k, s, end, held, rectify, streaming):
    size = end - s
    y, mask = maps.y, maps.mask
    x_run = _kept(slab, shape, k, n, s)
    if missing(x_run):
        x_run = _near(maps.x, n, c, s, size, spares, 0)
    y_run = element(y, n, c, s)
    if y.ds != 1:
        y_run = moved(spares.data, 2 * SPARE)
    normalize_run(
        x_run, _near(maps.residual, n, c, s, size, spares, 1), y_run,
        mask.data, n * mask.dn + c * mask.dc + s * mask.ds, mask.ds,
        size, held[0], held[1], held[2], rectify, streaming,
    )  # fmt: skip
    if y.ds != 1:
        scatter(y_run, element(y, n, c, s), y.ds, size)


@inlined
def _sum_tile(x, slab, spares, shape, n, c, k, s, shift, sums):
    size = min(shape.tile, shape.S - s)
    run = _near(x, n, c, s, size, spares, 0)
    return sum_run(run, _ahead(x, shape, n, c, s), _kept(slab, shape, k, n, s), size, shift, sums)


@primitive
def _forward_piece(maps, memory, shape, block, before, k, piece, rectify):
    """Write a piece of block `before`'s channel `k`, sum that piece of `block`'s; -1 is none."""
    x, slab, spares = maps.x, memory.slab, memory.spares
    last, c = before * shape.block + k, block * shape.block + k
    writes, sums = 0 <= last < shape.C and before >= 0, block >= 0 and c < shape.C
    constants = _constants(memory.work, k)
    held = (
        spread(rounded(get(constants, 0), x.data)),
        spread(rounded(get(constants, 1), x.data)),
        spread(rounded(get(constants, 2), x.data)),
    )
    streaming = shape.streaming and maps.y.ds == 1
    n, s, tiles = _start(shape, piece)
    first = first_number(element(x, n, c, s), 0) if sums else 0.0
    shift, zero = spread(first), spread(0.0)
    found = zero, zero, zero, zero
    count = 0
    for t in range(tiles):
        if writes:
            begin, end = _written(maps.y, shape, n, last, s, t == 0, t == tiles - 1, streaming)
            _normalize_tile(
                maps, slab, spares, shape, n, last, k, begin, end, held, rectify, streaming
            )
        if sums:
            found = _sum_tile(x, slab, spares, shape, n, c, k, s, shift, found)
            count += min(shape.tile, shape.S - s)
        n, s = _next(shape, n, s)
    if sums:
        partial = _partial(memory.work, shape, k, piece)
        mean, m2 = moments(
            count, first, together(found[0] + found[2]), together(found[1] + found[3])
        )
        put(partial, 0, np.float64(count))
        put(partial, 1, mean)
        put(partial, 2, m2)


@primitive
def _merged(work, shape, k):
    """Count, mean and M2 of a channel."""
    partial = _partial(work, shape, k, 0)
    count, mean, m2 = get(partial, 0), get(partial, 1), get(partial, 2)
    for piece in range(1, shape.pieces):
        partial = _partial(work, shape, k, piece)
        count, mean, m2 = merge(count, mean, m2, get(partial, 0), get(partial, 1), get(partial, 2))
    return count, mean, m2


@primitive
def _finish_forward(x, memory, shape, parameters, settings, block):
    """Save a block's statistics, and what writing it takes."""
    for k in range(min(shape.block, shape.C - block * shape.block)):
        c = block * shape.block + k
        count, mean, m2 = _merged(memory.work, shape, k)
        values = finish_forward(x, c, count, mean, m2, parameters, settings)
        _set_constants(memory.work, k, values)


@primitive
def _blocks(shape):
    return -(-shape.C // shape.block)


@primitive
def _rounds(shape):
    """How often the threads set out: once per block that they share, and once to write the last."""
    return _blocks(shape) + 1 if shape.together else 1


@primitive
def _forward_round(maps, parameters, settings, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        tasks = shape.block * shape.pieces
        first, last = share(tasks, t, shape.threads)
        _forward_tasks(
            maps, spares_of(memory, t), shape, block, block - 1, first, last, settings.rectify
        )
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            tasks = shape.block * shape.pieces
            _forward_tasks(maps, memory, shape, summed, written, 0, tasks, settings.rectify)
            if block < last:
                _finish_forward(maps.x, memory, shape, parameters, settings, block)
    store_fence()


@primitive
def _forward_tasks(maps, memory, shape, block, before, first, last, rectify):
    """Take pieces of channels of two blocks."""
    for task in range(first, last):
        _forward_piece(
            maps, memory, shape, block, before, task // shape.pieces, task % shape.pieces, rectify
        )


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
        first, last = share(shape.C * shape.pieces, t, shape.threads)
        _forward_tasks(maps, spares_of(memory, t), shape, 0, -1, first, last, False)
    for c in range(shape.C):
        _, channel_mean, channel_m2 = _merged(memory.work, shape, c)
        set_number(mean, c, channel_mean)
        set_number(m2, c, channel_m2)


@primitive
def _side_by_side(maps):
    """Whether the places of a plane lie side by side in every map."""
    residual = missing(maps.residual.data) or maps.residual.ds == 1
    return residual and maps.x.ds == 1 and maps.y.ds == 1


@primitive
def _normalize_planes(maps, parameters, settings, memory, shape, first, last):
    """Write the planes ``first`` to ``last``, counted as they lie: channels, then the batch."""
    for plane in range(first, last):
        n, c = plane // shape.C, plane % shape.C
        high, scale, low = running_affine(maps.x, c, parameters, settings)
        held = spread(high), spread(scale), spread(low)
        streaming = shape.streaming and maps.y.ds == 1
        # Only what has to be copied needs to be cut.
        size = shape.S if _side_by_side(maps) else shape.tile
        for s in range(0, shape.S, size):
            _normalize_tile(
                maps, memory.slab, memory.spares, shape, n, c, 0, s, min(s + size, shape.S),
                held, settings.rectify, streaming,
            )  # fmt: skip
    store_fence()


@kernel("Forward", "Parameters", "Settings")
def normalize_planes(maps, parameters, settings, memory, shape):
    """Normalize by running statistics."""
    for t in prange(shape.threads):
        first, last = share(shape.N * shape.C, t, shape.threads)
        _normalize_planes(maps, parameters, settings, spares_of(memory, t), shape, first, last)


@inlined
def _product_tile(maps, slab, spares, shape, n, c, k, s, mean, sums):
    size = min(shape.tile, shape.S - s)
    dy, x, mask = maps.dy, maps.x, maps.mask
    return product_run(
        _near(dy, n, c, s, size, spares, 0), _near(x, n, c, s, size, spares, 1),
        _ahead(dy, shape, n, c, s), _ahead(x, shape, n, c, s),
        _kept(slab, shape, k, n, s), _kept(slab, shape, shape.block + k, n, s),
        mask.data, n * mask.dn + c * mask.dc + s * mask.ds, mask.ds,
        size, mean, sums,
    )  # fmt: skip


@inlined
def _gradient_tile(maps, slab, spares, shape, n, c, k, s, end, held, training, streaming):
    size = end - s
    dx, dresidual, mask = maps.dx, maps.dresidual, maps.mask
    dy_run, x_run = _kept(slab, shape, k, n, s), _kept(slab, shape, shape.block + k, n, s)
    bits = nothing(mask.data)  # dy in the slab has gone through the ReLU
    if missing(x_run):
        bits = mask.data
        dy_run = _near(maps.dy, n, c, s, size, spares, 0)
        x_run = _near(maps.x, n, c, s, size, spares, 1)
    dx_run = element(dx, n, c, s)
    if dx.ds != 1:
        dx_run = moved(spares.data, 2 * SPARE)
    residual_run = element(dresidual, n, c, s)
    if not missing(residual_run) and dresidual.ds != 1:
        residual_run = moved(spares.data, 3 * SPARE)
    gradient_run(
        dy_run, x_run, dx_run, residual_run,
        bits, n * mask.dn + c * mask.dc + s * mask.ds, mask.ds,
        size, held[0], held[1], held[2], held[3], held[4], training, streaming,
    )  # fmt: skip
    if dx.ds != 1:
        scatter(dx_run, element(dx, n, c, s), dx.ds, size)
    if not missing(residual_run) and dresidual.ds != 1:
        scatter(residual_run, element(dresidual, n, c, s), dresidual.ds, size)


@primitive
def _backward_piece(maps, gradients, memory, shape, block, before, k, piece, training):
    """Write a piece of block `before`'s channel `k`, sum that piece of `block`'s; -1 is none."""
    x, slab, spares = maps.x, memory.slab, memory.spares
    last, c = before * shape.block + k, block * shape.block + k
    writes, sums = 0 <= last < shape.C and before >= 0, block >= 0 and c < shape.C
    constants = _constants(memory.work, k)
    held = (
        spread(rounded(get(constants, 0), x.data)),
        spread(rounded(get(constants, 1), x.data)),
        spread(rounded(get(constants, 2), x.data)),
        spread(rounded(get(constants, 3), x.data)),
        spread(rounded(get(constants, 4), x.data)),
    )
    mean, zero = spread(number(gradients.mean, c) if sums else 0.0), spread(0.0)
    found = zero, zero
    streaming = shape.streaming and maps.dx.ds == 1
    n, s, tiles = _start(shape, piece)
    for t in range(tiles):
        if writes:
            begin, end = _written(maps.dx, shape, n, last, s, t == 0, t == tiles - 1, streaming)
            _gradient_tile(
                maps, slab, spares, shape, n, last, k, begin, end, held, training, streaming
            )
        if sums:
            found = _product_tile(maps, slab, spares, shape, n, c, k, s, mean, found)
        n, s = _next(shape, n, s)
    if sums:
        partial = _partial(memory.work, shape, k, piece)
        put(partial, 0, together(found[0]))
        put(partial, 1, together(found[1]))


@primitive
def _finish_backward(x, gradients, memory, shape, block):
    """Save a block's gradients by weight and bias, and what writing it takes."""
    for k in range(min(shape.block, shape.C - block * shape.block)):
        c = block * shape.block + k
        total, product = 0.0, 0.0
        for piece in range(shape.pieces):
            partial = _partial(memory.work, shape, k, piece)
            total += get(partial, 0)
            product += get(partial, 1)
        count = shape.N * shape.S
        _set_constants(memory.work, k, finish_backward(x, c, count, total, product, gradients))


@primitive
def _backward_round(maps, gradients, training, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        tasks = shape.block * shape.pieces
        first, last = share(tasks, t, shape.threads)
        _backward_tasks(
            maps, gradients, training, spares_of(memory, t), shape, block, block - 1, first, last
        )
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            tasks = shape.block * shape.pieces
            _backward_tasks(maps, gradients, training, memory, shape, summed, written, 0, tasks)
            if block < last:
                _finish_backward(maps.x, gradients, memory, shape, block)
    store_fence()


@primitive
def _backward_tasks(maps, gradients, training, memory, shape, block, before, first, last):
    """Take pieces of channels of two blocks."""
    for task in range(first, last):
        k, piece = task // shape.pieces, task % shape.pieces
        _backward_piece(maps, gradients, memory, shape, block, before, k, piece, training)


@kernel("Backward", "Gradients", "Flag")
def backward_planes(maps, gradients, training, memory, shape):
    """Gradients by x, weight, bias and residual."""
    for block in range(_rounds(shape)):
        for t in prange(shape.threads):
            _backward_round(maps, gradients, training, memory, shape, block, t)
        if shape.together:
            _finish_backward(maps.x, gradients, memory, shape, block)
