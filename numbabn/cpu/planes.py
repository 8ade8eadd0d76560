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
from .compilation import kernel, primitive
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


@primitive
def tiling(shape):
    """Tiles of a plane, elements of a tile, tiles of a channel, tiles of a piece, pieces."""
    cuts = -(-shape.S // PLANE_TILE)
    tiles = shape.N * cuts
    size = max(PLANE_PIECE, -(-tiles // PLANE_PIECES))
    return cuts, -(-shape.S // (cuts * LANES)) * LANES, tiles, size, -(-tiles // size)


@primitive
def _tile(shape, t):
    """Plane, first place and size of a channel's tile ``t``."""
    cuts, size, _, _, _ = tiling(shape)
    s = t % cuts * size
    return t // cuts, s, min(size, shape.S - s)


@primitive
def _tiles_of(shape, piece):
    _, _, tiles, size, _ = tiling(shape)
    return range(piece * size, min(piece * size + size, tiles))


@primitive
def _constants(work, k):
    """Where the constants of the block's channel ``k`` are kept."""
    return moved(work.data, k * CONSTANTS)


@primitive
def _set_constants(work, k, values):
    for i, value in enumerate(values):
        put(_constants(work, k), i, np.float64(value))


@primitive
def _partial(work, shape, k, piece):
    """Where the sums of a piece of the block's channel ``k`` are kept."""
    pieces = tiling(shape)[4]
    return moved(work.data, shape.block * CONSTANTS + (k * pieces + piece) * PARTIAL)


@primitive
def _kept(slab, shape, k, n, s):
    """Where the slab keeps what was read at (n, s) of the block's channel ``k``."""
    if missing(slab.data):
        return slab.data
    return moved(slab.data, (k * shape.N + n) * shape.S + s)


@primitive
def _ahead(view, shape, c, t):
    """Where the tile lies that will be summed some tiles later, maybe of the next channel."""
    tiles = tiling(shape)[2]
    t += PLANE_AHEAD
    if t >= tiles and c + 1 < shape.C:
        t -= tiles
        c += 1
    n, s, _ = _tile(shape, min(t, tiles - 1))
    return element(view, n, c, s)


@primitive
def _near(view, n, c, s, size, spares, k):
    """Pointer to a run; if its elements lie apart, to a copy in spare tile ``k``."""
    at = element(view, n, c, s)
    if view.ds == 1 or missing(at):
        return at
    gather(at, view.ds, moved(spares.data, k * SPARE), size)
    return moved(spares.data, k * SPARE)


@primitive
def _written(view, shape, t, n, c, s, size, streaming):
    """First and last place to write of a tile: lines of the target are cut only between pieces.

    Another thread may be ahead by then with the slab of the next piece.
    """
    if not streaming:
        return s, s + size
    piece = tiling(shape)[3]
    skip = lead(element(view, n, c, 0))
    first = s if s == 0 or t % piece == 0 else s + skip
    last = s + size if (t + 1) % piece == 0 else s + size + skip
    return min(first, shape.S), min(last, shape.S)


@primitive
def _normalize_tile(maps, slab, spares, shape, c, k, t, held, rectify):
    n, s, size = _tile(shape, t)
    y, mask = maps.y, maps.mask
    streaming = shape.streaming and y.ds == 1
    s, end = _written(y, shape, t, n, c, s, size, streaming)
    size = end - s
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


@primitive
def _sum_tile(x, slab, spares, shape, c, k, t, shift, sums):
    n, s, size = _tile(shape, t)
    run = _near(x, n, c, s, size, spares, 0)
    return sum_run(run, _ahead(x, shape, c, t), _kept(slab, shape, k, n, s), size, shift, sums)


@primitive
def _forward_piece(maps, memory, shape, block, before, k, piece, rectify):
    """Write a piece of block `before`'s channel `k`, and sum that piece of `block`'s; -1 is none."""
    x, slab, spares = maps.x, memory.slab, memory.spares
    last, c = before * shape.block + k, block * shape.block + k
    writes, sums = 0 <= last < shape.C and before >= 0, block >= 0 and c < shape.C
    constants = _constants(memory.work, k)
    held = (
        spread(rounded(get(constants, 0), x.data)),
        spread(rounded(get(constants, 1), x.data)),
        spread(rounded(get(constants, 2), x.data)),
    )
    n, s, _ = _tile(shape, _tiles_of(shape, piece).start)
    first = first_number(element(x, n, c, s), 0) if sums else 0.0
    shift, zero = spread(first), spread(0.0)
    found = zero, zero, zero, zero
    count = 0
    for t in _tiles_of(shape, piece):
        if writes:
            _normalize_tile(maps, slab, spares, shape, last, k, t, held, rectify)
        if sums:
            found = _sum_tile(x, slab, spares, shape, c, k, t, shift, found)
            count += _tile(shape, t)[2]
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
    for piece in range(1, tiling(shape)[4]):
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
        tasks = shape.block * tiling(shape)[4]
        first, last = share(tasks, t, shape.threads)
        _forward_tasks(maps, spares_of(memory, t), shape, block, block - 1, first, last, settings.rectify)
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            tasks = shape.block * tiling(shape)[4]
            _forward_tasks(maps, memory, shape, summed, written, 0, tasks, settings.rectify)
            if block < last:
                _finish_forward(maps.x, memory, shape, parameters, settings, block)
    store_fence()


@primitive
def _forward_tasks(maps, memory, shape, block, before, first, last, rectify):
    """Take pieces of channels of two blocks."""
    pieces = tiling(shape)[4]
    for task in range(first, last):
        _forward_piece(
            maps, memory, shape, block, before, task // pieces, task % pieces, rectify
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
        first, last = share(shape.C * tiling(shape)[4], t, shape.threads)
        _forward_tasks(maps, spares_of(memory, t), shape, 0, -1, first, last, False)
    for c in range(shape.C):
        _, channel_mean, channel_m2 = _merged(memory.work, shape, c)
        set_number(mean, c, channel_mean)
        set_number(m2, c, channel_m2)


@primitive
def _normalize_planes(maps, parameters, settings, memory, shape, first, last):
    """Write the planes ``first`` to ``last``, counted as they lie: channels, then the batch."""
    for plane in range(first, last):
        n, c = plane // shape.C, plane % shape.C
        high, scale, low = running_affine(maps.x, c, parameters, settings)
        held = spread(high), spread(scale), spread(low)
        cuts = tiling(shape)[0]
        for t in range(n * cuts, n * cuts + cuts):
            _normalize_tile(
                maps, memory.slab, memory.spares, shape, c, 0, t, held, settings.rectify
            )
    store_fence()


@kernel("Forward", "Parameters", "Settings")
def normalize_planes(maps, parameters, settings, memory, shape):
    """Normalize by running statistics."""
    for t in prange(shape.threads):
        first, last = share(shape.N * shape.C, t, shape.threads)
        _normalize_planes(
            maps, parameters, settings, spares_of(memory, t), shape, first, last
        )


@primitive
def _product_tile(maps, slab, spares, shape, c, k, t, mean, sums):
    n, s, size = _tile(shape, t)
    dy, x, mask = maps.dy, maps.x, maps.mask
    return product_run(
        _near(dy, n, c, s, size, spares, 0), _near(x, n, c, s, size, spares, 1),
        _ahead(dy, shape, c, t), _ahead(x, shape, c, t),
        _kept(slab, shape, k, n, s), _kept(slab, shape, shape.block + k, n, s),
        mask.data, n * mask.dn + c * mask.dc + s * mask.ds, mask.ds,
        size, mean, sums,
    )  # fmt: skip


@primitive
def _gradient_tile(maps, slab, spares, shape, c, k, t, held, training):
    n, s, size = _tile(shape, t)
    dx, dresidual, mask = maps.dx, maps.dresidual, maps.mask
    streaming = shape.streaming and dx.ds == 1
    s, end = _written(dx, shape, t, n, c, s, size, streaming)
    size = end - s
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
    """Write a piece of block `before`'s channel `k`, and sum that piece of `block`'s; -1 is none."""
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
    for t in _tiles_of(shape, piece):
        if writes:
            _gradient_tile(maps, slab, spares, shape, last, k, t, held, training)
        if sums:
            found = _product_tile(maps, slab, spares, shape, c, k, t, mean, found)
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
        for piece in range(tiling(shape)[4]):
            partial = _partial(memory.work, shape, k, piece)
            total += get(partial, 0)
            product += get(partial, 1)
        count = shape.N * shape.S
        _set_constants(memory.work, k, finish_backward(x, c, count, total, product, gradients))


@primitive
def _backward_round(maps, gradients, training, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        tasks = shape.block * tiling(shape)[4]
        first, last = share(tasks, t, shape.threads)
        _backward_tasks(
            maps, gradients, training, spares_of(memory, t), shape, block, block - 1, first, last
        )
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            tasks = shape.block * tiling(shape)[4]
            _backward_tasks(maps, gradients, training, memory, shape, summed, written, 0, tasks)
            if block < last:
                _finish_backward(maps.x, gradients, memory, shape, block)
    store_fence()


@primitive
def _backward_tasks(maps, gradients, training, memory, shape, block, before, first, last):
    """Take pieces of channels of two blocks."""
    pieces = tiling(shape)[4]
    for task in range(first, last):
        k, piece = task // pieces, task % pieces
        _backward_piece(maps, gradients, memory, shape, block, before, k, piece, training)


@kernel("Backward", "Gradients", "Flag")
def backward_planes(maps, gradients, training, memory, shape):
    """Gradients by x, weight, bias and residual."""
    for block in range(_rounds(shape)):
        for t in prange(shape.threads):
            _backward_round(maps, gradients, training, memory, shape, block, t)
        if shape.together:
            _finish_backward(maps.x, gradients, memory, shape, block)
