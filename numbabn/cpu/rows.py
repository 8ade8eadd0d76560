"""Kernels on rows ``[N, S, C]``: a row holds one value of each channel, or ``fold`` of each.

Column ``j`` belongs to channel ``j // fold``: short planes are rows of ``C * S`` columns. A tile is
some rows of a block of columns; the sums of each column stay in registers while a tile goes by.
Tiles are taken in pieces, whose sums are merged: the tree of a sum depends on the shape alone.

As with planes, a tile of the block before is written, then that of the next block is summed.
"""

import numpy as np
from numba import prange

from .arguments import number, set_number
from .compilation import inlined, kernel, primitive
from .intrinsics import (
    LANES,
    as_computed,
    get,
    missing,
    moved,
    nothing,
    put,
    store_fence,
)
from .vector import (
    element,
    finish_backward,
    finish_forward,
    first_number,
    gather,
    gradient_columns,
    gradient_run,
    lead,
    merge,
    moments,
    normalize_columns,
    normalize_run,
    of_thread,
    product_columns,
    running_affine,
    scatter,
    share,
    spares_of,
    sum_columns,
    sum_of,
)

ROW_TILE = 8  # rows that are taken in one go
ROW_AHEAD = 4  # tiles from what is summed to what is fetched
ROW_PIECE = 256  # tiles of rows that are summed together, at least ...
ROW_PIECES = 64  # ... and pieces of rows, at most
COLUMNS = 64  # of a tile: four lines of float32
SPARE = COLUMNS + LANES  # elements of a spare row
CONSTANTS = 5  # numbers per column that writing takes, at most
PARTIAL = 3  # numbers that are left of a piece of a channel: count, mean and M2, or two sums


def tiling(N: int, S: int) -> tuple[int, int, int, int]:
    """Rows of a tile, tiles of one n, tiles of a piece, pieces."""
    cuts = -(-S // ROW_TILE)
    piece = max(ROW_PIECE, -(-N * cuts // ROW_PIECES))
    return ROW_TILE, cuts, piece, -(-N * cuts // piece)


@inlined
def _start(shape, piece):
    """Where a piece begins, and its tiles."""
    t = piece * shape.piece
    return t // shape.cuts, t % shape.cuts * ROW_TILE, min(shape.piece, shape.N * shape.cuts - t)


@inlined
def _next(shape, n, s):
    """Where the next tile begins."""
    s += ROW_TILE
    return (n, s) if s < shape.S else (n + 1, 0)


@inlined
def _first(shape, block):
    """First column of a block."""
    return max(0, block * shape.block - shape.offset)


@inlined
def _width(shape, block):
    """Columns of a block; 0 if there is no such block."""
    last = min(block * shape.block - shape.offset + shape.block, shape.C * shape.fold)
    return max(0, last - _first(shape, block)) if block >= 0 else 0


@inlined
def _channel(shape, block):
    """First channel of a block."""
    return _first(shape, block) // shape.fold


@inlined
def _constants(memory, shape, x, k):
    """Per column of a block, the constant ``k`` of five that writing takes."""
    return as_computed(moved(memory.work.data, k * shape.block), x.data)


@inlined
def _partial(work, shape, piece, k):
    """Where the sums of a piece of the block's channel ``k`` are kept."""
    channels = shape.block // shape.fold
    return moved(work.data, CONSTANTS * shape.block + (piece * channels + k) * PARTIAL)


@inlined
def _sums(memory, shape, k):
    """Per column of a block, shift, total and squares, or mean, total and product."""
    return moved(memory.sums.data, k * (shape.block + LANES))


@inlined
def _kept(slab, shape, n, s, j):
    """Where the slab keeps what was read at row (n, s) and column ``j`` of the block."""
    if missing(slab.data):
        return slab.data
    return moved(slab.data, (n * shape.S + s) * shape.block + j)


@inlined
def _ahead(view, shape, width, j, n, s, at):
    """Where the tile lies that will be summed some tiles later."""
    at += ROW_AHEAD * COLUMNS
    while at >= width:
        at -= -(-width // COLUMNS) * COLUMNS
        s += ROW_TILE
    if s >= shape.S:
        s -= shape.S
        n += 1
    if at < 0 or s >= shape.S or n >= shape.N:
        return view.data
    return element(view, n, j + at, s)


@inlined
def _near_row(view, n, j, s, size, spares, k):
    """Pointer to a row's columns from ``j`` on; if they lie apart, to a copy in spare row ``k``."""
    at = element(view, n, j, s)
    if view.dc == 1 or missing(at):
        return at
    gather(at, view.dc, moved(spares.data, k * SPARE), size)
    return moved(spares.data, k * SPARE)


@inlined
def _near_tile(view, n, j, s, rows, count, spares, k):
    """Pointer to some rows of some columns, and the step from row to row; copied if need be."""
    at = element(view, n, j, s)
    if view.dc == 1 or missing(at):
        return at, view.ds
    spare = moved(spares.data, (4 + k * ROW_TILE) * SPARE)
    for r in range(rows):
        gather(element(view, n, j, s + r), view.dc, moved(spare, r * SPARE), count)
    return spare, SPARE


@inlined
def _written(view, n, j, s, at, width, streaming):
    """First and last column to write of a tile's row; lines of the target are not cut in two."""
    skip = lead(element(view, n, j, s)) if streaming else 0
    first = at + skip if at > 0 else 0
    last = at + COLUMNS + skip if at + COLUMNS < width else width
    return min(first, width), min(last, width)


@inlined
def _uniform(view):
    """Whether the lines of all rows begin at the same columns."""
    return view.dc == 1 and view.ds % LANES == 0


@inlined
def _group(view, n, j, s, i, last, streaming):
    """How many of the columns from `i` on to write together, so that lines are not cut in two."""
    skip = lead(element(view, n, j + i, s)) if streaming else 0
    return min(skip if skip else LANES, last - i)


@inlined
def _normalize_tile(maps, memory, shape, j, width, n, s, rows, at, rectify):
    """Write some rows' columns from `at` on, of the block that begins with column ``j``."""
    x, residual, y = maps.x, maps.residual, maps.y
    streaming = shape.streaming and y.dc == 1
    high = _constants(memory, shape, x, 0)
    scale = _constants(memory, shape, x, 1)
    low = _constants(memory, shape, x, 2)
    if missing(maps.mask.data) and _uniform(y):
        i, last = _written(y, n, j, s, at, width, streaming)
        x_run, x_step = _kept(memory.slab, shape, n, s, i), shape.block
        if missing(x_run):
            x_run, x_step = _near_tile(x, n, j + i, s, rows, last - i, memory.spares, 0)
        residual_run, residual_step = _near_tile(
            residual, n, j + i, s, rows, last - i, memory.spares, 1
        )
        first = i
        while i < last:
            count = _group(y, n, j, s, i, last, streaming)
            normalize_columns(
                moved(x_run, i - first), x_step,
                residual_run if missing(residual_run) else moved(residual_run, i - first),
                residual_step, element(y, n, j + i, s), y.ds, maps.mask.data, rows, count,
                moved(high, i), moved(scale, i), moved(low, i), rectify, streaming,
            )  # fmt: skip
            i += count
    else:
        for r in range(rows):
            _normalize_row(maps, memory, shape, j, width, n, s + r, at, high, scale, low, rectify)


@primitive
def _normalize_row(maps, memory, shape, j, width, n, s, at, high, scale, low, rectify):
    """Write one row's columns from `at` on, of the block that begins with column ``j``."""
    y, mask, spares = maps.y, maps.mask, memory.spares
    streaming = shape.streaming and y.dc == 1
    first, last = _written(y, n, j, s, at, width, streaming)
    size = last - first
    x_row = _kept(memory.slab, shape, n, s, first)
    if missing(x_row):
        x_row = _near_row(maps.x, n, j + first, s, size, spares, 0)
    y_row = element(y, n, j + first, s)
    if y.dc != 1:
        y_row = moved(spares.data, 2 * SPARE)
    normalize_run(
        x_row, _near_row(maps.residual, n, j + first, s, size, spares, 1), y_row,
        mask.data, n * mask.dn + (j + first) * mask.dc + s * mask.ds, mask.dc, size,
        moved(high, first), moved(scale, first), moved(low, first), rectify, streaming,
    )  # fmt: skip
    if y.dc != 1:
        scatter(y_row, element(y, n, j + first, s), y.dc, size)


@inlined
def _sum_tile(x, memory, shape, j, width, n, s, rows, at):
    """Sum some rows' columns from `at` on, of the block that begins with column ``j``."""
    end = min(at + COLUMNS, width)
    run, step = _near_tile(x, n, j + at, s, rows, end - at, memory.spares, 0)
    ahead = _ahead(x, shape, width, j, n, s, at)
    shift, total, squares = (
        _sums(memory, shape, 0),
        _sums(memory, shape, 1),
        _sums(memory, shape, 2),
    )
    for i in range(at, end, LANES):
        sum_columns(
            moved(run, i - at), step, moved(ahead, i - at), x.ds,
            _kept(memory.slab, shape, n, s, i), shape.block, rows, min(LANES, end - i),
            moved(shift, i), moved(total, i), moved(squares, i),
        )  # fmt: skip


@primitive
def _start_sums(x, memory, shape, block, piece):
    """Choose each channel's shift, and set the sums to 0."""
    n, s, _ = _start(shape, piece)
    shift, total, squares = (
        _sums(memory, shape, 0),
        _sums(memory, shape, 1),
        _sums(memory, shape, 2),
    )
    for at in range(0, _width(shape, block), shape.fold):
        first = first_number(element(x, n, _first(shape, block) + at, s), 0)
        for k in range(at, at + shape.fold):
            put(shift, k, first)
            put(total, k, 0.0)
            put(squares, k, 0.0)


@primitive
def _finish_sums(memory, shape, block, piece, rows):
    """Turn the sums of a piece's columns into count, mean and M2 of its channels."""
    shift, total, squares = (
        _sums(memory, shape, 0),
        _sums(memory, shape, 1),
        _sums(memory, shape, 2),
    )
    for at in range(0, _width(shape, block), shape.fold):
        mean, m2 = moments(
            rows * shape.fold,
            get(shift, at),
            sum_of(total, at, shape.fold),
            sum_of(squares, at, shape.fold),
        )
        partial = _partial(memory.work, shape, piece, at // shape.fold)
        put(partial, 0, np.float64(rows * shape.fold))
        put(partial, 1, mean)
        put(partial, 2, m2)


@primitive
def _forward_piece(maps, memory, shape, block, before, piece, rectify):
    """Write a piece of block `before`, and sum that piece of `block`; -1 is none."""
    writes, sums = _width(shape, before), _width(shape, block)
    if sums:
        _start_sums(maps.x, memory, shape, block, piece)
    count = 0
    n, s, tiles = _start(shape, piece)
    for _ in range(tiles):
        rows = min(ROW_TILE, shape.S - s)
        for at in range(0, max(writes, sums), COLUMNS):
            if at < writes:
                _normalize_tile(
                    maps, memory, shape, _first(shape, before), writes, n, s, rows, at, rectify
                )
            if at < sums:
                _sum_tile(maps.x, memory, shape, _first(shape, block), sums, n, s, rows, at)
        count += rows
        n, s = _next(shape, n, s)
    if sums:
        _finish_sums(memory, shape, block, piece, count)


@primitive
def _merged(work, shape, k):
    """Count, mean and M2 of a channel."""
    partial = _partial(work, shape, 0, k)
    count, mean, m2 = get(partial, 0), get(partial, 1), get(partial, 2)
    for piece in range(1, shape.pieces):
        partial = _partial(work, shape, piece, k)
        count, mean, m2 = merge(count, mean, m2, get(partial, 0), get(partial, 1), get(partial, 2))
    return count, mean, m2


@primitive
def _set_constants(memory, shape, x, k, values):
    """Write what writing a channel takes for each of its columns."""
    for i, value in enumerate(values):
        constants = _constants(memory, shape, x, i)
        for j in range(k * shape.fold, (k + 1) * shape.fold):
            put(constants, j, value)


@primitive
def _finish_forward(x, memory, shape, parameters, settings, block):
    """Save a block's statistics, and what writing it takes."""
    for k in range(_width(shape, block) // shape.fold):
        c = _channel(shape, block) + k
        count, mean, m2 = _merged(memory.work, shape, k)
        constants = finish_forward(x, c, count, mean, m2, parameters, settings)
        _set_constants(memory, shape, x, k, constants)


@primitive
def _blocks(shape):
    return -(-(shape.C * shape.fold + shape.offset) // shape.block)


@primitive
def _rounds(shape):
    """How often the threads set out: once per block that they share, and once to write the last."""
    return _blocks(shape) + 1 if shape.together else 1


@primitive
def _forward_round(maps, parameters, settings, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        memory = spares_of(memory, t)
        first, last = share(shape.pieces, t, shape.threads)
        for piece in range(first, last):
            _forward_piece(maps, memory, shape, block, block - 1, piece, settings.rectify)
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            for piece in range(shape.pieces):
                _forward_piece(maps, memory, shape, summed, written, piece, settings.rectify)
            _finish_forward(maps.x, memory, shape, parameters, settings, summed)
    store_fence()


@kernel("Forward", "Parameters", "Settings")
def forward_rows(maps, parameters, settings, memory, shape):
    """Statistics, normalize and running averages."""
    for block in range(_rounds(shape)):
        for t in prange(shape.threads):
            _forward_round(maps, parameters, settings, memory, shape, block, t)
        if shape.together:
            _finish_forward(maps.x, memory, shape, parameters, settings, block)


@primitive
def _statistics_share(maps, memory, shape, t):
    first, last = share(shape.pieces, t, shape.threads)
    for piece in range(first, last):
        _forward_piece(maps, memory, shape, 0, -1, piece, False)


@kernel("Forward", "Numbers", "Numbers")
def statistics_rows(maps, mean, m2, memory, shape):
    """Mean and M2 of each channel; one block holds all columns."""
    for t in prange(shape.threads):
        _statistics_share(maps, spares_of(memory, t), shape, t)
    for c in range(shape.C):
        _, channel_mean, channel_m2 = _merged(memory.work, shape, c)
        set_number(mean, c, channel_mean)
        set_number(m2, c, channel_m2)


@primitive
def _side_by_side(maps):
    """Whether columns lie side by side in every map."""
    residual = missing(maps.residual.data) or maps.residual.dc == 1
    return residual and maps.x.dc == 1 and maps.y.dc == 1


@primitive
def _normalize_share(maps, memory, shape, rectify, t):
    """Write a thread's rows; a block is one row, or some without a gap between them."""
    if _side_by_side(maps):
        joined = shape.block // (shape.C * shape.fold)
        cuts = -(-shape.S // joined)
        first, last = share(shape.N * cuts, t, shape.threads)
        for row in range(first, last):
            n, s = row // cuts, row % cuts * joined
            normalize_run(
                element(maps.x, n, 0, s), element(maps.residual, n, 0, s), element(maps.y, n, 0, s),
                maps.mask.data, 0, 1, min(joined, shape.S - s) * shape.C * shape.fold,
                _constants(memory, shape, maps.x, 0),
                _constants(memory, shape, maps.x, 1),
                _constants(memory, shape, maps.x, 2),
                rectify, shape.streaming,
            )  # fmt: skip
    else:
        first, last = share(shape.N * shape.S, t, shape.threads)
        for row in range(first, last):
            for at in range(0, shape.block, COLUMNS):
                n, s = row // shape.S, row % shape.S
                _normalize_tile(maps, memory, shape, 0, shape.block, n, s, 1, at, rectify)
    store_fence()


@kernel("Forward", "Parameters", "Settings")
def normalize_rows(maps, parameters, settings, memory, shape):
    """Normalize by running statistics."""
    for c in range(shape.block // shape.fold):
        constants = running_affine(maps.x, c % shape.C, parameters, settings)
        _set_constants(memory, shape, maps.x, c, constants)
    for t in prange(shape.threads):
        _normalize_share(maps, spares_of(memory, t), shape, settings.rectify, t)


@inlined
def _product_tile(maps, memory, shape, j, width, n, s, rows, at):
    """Sum some rows' columns from `at` on, of the block that begins with column ``j``."""
    end = min(at + COLUMNS, width)
    dy, x, mask = maps.dy, maps.x, maps.mask
    dy_run, dy_step = _near_tile(dy, n, j + at, s, rows, end - at, memory.spares, 0)
    x_run, x_step = _near_tile(x, n, j + at, s, rows, end - at, memory.spares, 1)
    ahead_dy = _ahead(dy, shape, width, j, n, s, at)
    ahead_x = _ahead(x, shape, width, j, n, s, at)
    mean, total, product = (
        _sums(memory, shape, 0),
        _sums(memory, shape, 1),
        _sums(memory, shape, 2),
    )
    for i in range(at, end, LANES):
        product_columns(
            moved(dy_run, i - at), dy_step, moved(x_run, i - at), x_step,
            moved(ahead_dy, i - at), dy.ds, moved(ahead_x, i - at), x.ds,
            _kept(memory.slab, shape, n, s, i), _kept(memory.slab, shape, shape.N + n, s, i),
            shape.block, mask.data, n * mask.dn + (j + i) * mask.dc + s * mask.ds, mask.ds, mask.dc,
            rows, min(LANES, end - i), moved(mean, i), moved(total, i), moved(product, i),
        )  # fmt: skip


@inlined
def _gradient_tile(maps, memory, shape, j, width, n, s, rows, at, training):
    """Write some rows' columns from `at` on, of the block that begins with column ``j``."""
    dy, x, dx = maps.dy, maps.x, maps.dx
    streaming = shape.streaming and dx.dc == 1
    dy_high = _constants(memory, shape, x, 0)
    high = _constants(memory, shape, x, 1)
    slope = _constants(memory, shape, x, 2)
    scale = _constants(memory, shape, x, 3)
    low = _constants(memory, shape, x, 4)
    gated = missing(maps.mask.data) or not missing(memory.slab.data)
    if gated and missing(maps.dresidual.data) and training and _uniform(dx):
        i, last = _written(dx, n, j, s, at, width, streaming)
        dy_run, dy_step = _kept(memory.slab, shape, n, s, i), shape.block
        x_run, x_step = _kept(memory.slab, shape, shape.N + n, s, i), shape.block
        if missing(x_run):
            dy_run, dy_step = _near_tile(dy, n, j + i, s, rows, last - i, memory.spares, 0)
            x_run, x_step = _near_tile(x, n, j + i, s, rows, last - i, memory.spares, 1)
        first = i
        while i < last:
            count = _group(dx, n, j, s, i, last, streaming)
            gradient_columns(
                moved(dy_run, i - first), dy_step, moved(x_run, i - first), x_step,
                element(dx, n, j + i, s), dx.ds, maps.mask.data, rows, count,
                moved(dy_high, i), moved(high, i), moved(slope, i), moved(scale, i), moved(low, i),
                streaming,
            )  # fmt: skip
            i += count
    else:
        for r in range(rows):
            _gradient_row(
                maps,
                memory,
                shape,
                j,
                width,
                n,
                s + r,
                at,
                (dy_high, high, slope, scale, low),
                training,
            )


@primitive
def _gradient_row(maps, memory, shape, j, width, n, s, at, constants, training):
    """Write one row's columns from `at` on, of the block that begins with column ``j``."""
    spares, dx, dresidual, mask = memory.spares, maps.dx, maps.dresidual, maps.mask
    dy_high, high, slope, scale, low = constants
    streaming = shape.streaming and dx.dc == 1
    first, last = _written(dx, n, j, s, at, width, streaming)
    size = last - first
    dy_row = _kept(memory.slab, shape, n, s, first)
    x_row = _kept(memory.slab, shape, shape.N + n, s, first)
    bits = nothing(mask.data)  # dy in the slab has gone through the ReLU
    if missing(x_row):
        bits = mask.data
        dy_row = _near_row(maps.dy, n, j + first, s, size, spares, 0)
        x_row = _near_row(maps.x, n, j + first, s, size, spares, 1)
    dx_row = element(dx, n, j + first, s)
    if dx.dc != 1:
        dx_row = moved(spares.data, 2 * SPARE)
    residual_row = element(dresidual, n, j + first, s)
    if not missing(residual_row) and dresidual.dc != 1:
        residual_row = moved(spares.data, 3 * SPARE)
    gradient_run(
        dy_row, x_row, dx_row, residual_row,
        bits, n * mask.dn + (j + first) * mask.dc + s * mask.ds, mask.dc, size,
        moved(dy_high, first), moved(high, first), moved(slope, first), moved(scale, first),
        moved(low, first), training, streaming,
    )  # fmt: skip
    if dx.dc != 1:
        scatter(dx_row, element(dx, n, j + first, s), dx.dc, size)
    if not missing(residual_row) and dresidual.dc != 1:
        scatter(residual_row, element(dresidual, n, j + first, s), dresidual.dc, size)


@primitive
def _start_products(gradients, memory, shape, block):
    """Set each column's mean, and its sums to 0."""
    mean, total, product = (
        _sums(memory, shape, 0), _sums(memory, shape, 1), _sums(memory, shape, 2)
    )  # fmt: skip
    for at in range(0, _width(shape, block), shape.fold):
        channel_mean = number(gradients.mean, (_first(shape, block) + at) // shape.fold)
        for k in range(at, at + shape.fold):
            put(mean, k, channel_mean)
            put(total, k, 0.0)
            put(product, k, 0.0)


@primitive
def _finish_products(memory, shape, block, piece):
    """Add up the columns of each channel."""
    total, product = _sums(memory, shape, 1), _sums(memory, shape, 2)
    for at in range(0, _width(shape, block), shape.fold):
        partial = _partial(memory.work, shape, piece, at // shape.fold)
        put(partial, 0, sum_of(total, at, shape.fold))
        put(partial, 1, sum_of(product, at, shape.fold))


@primitive
def _backward_piece(maps, gradients, memory, shape, block, before, piece, training):
    """Write a piece of block `before`, and sum that piece of `block`; -1 is none."""
    writes, sums = _width(shape, before), _width(shape, block)
    _start_products(gradients, memory, shape, block)
    n, s, tiles = _start(shape, piece)
    for _ in range(tiles):
        rows = min(ROW_TILE, shape.S - s)
        for at in range(0, max(writes, sums), COLUMNS):
            if at < writes:
                _gradient_tile(
                    maps, memory, shape, _first(shape, before), writes, n, s, rows, at, training
                )
            if at < sums:
                _product_tile(maps, memory, shape, _first(shape, block), sums, n, s, rows, at)
        n, s = _next(shape, n, s)
    _finish_products(memory, shape, block, piece)


@primitive
def _finish_backward(x, gradients, memory, shape, block):
    """Save a block's gradients by weight and bias, and what writing it takes."""
    for k in range(_width(shape, block) // shape.fold):
        c = _channel(shape, block) + k
        total, product = 0.0, 0.0
        for piece in range(shape.pieces):
            partial = _partial(memory.work, shape, piece, k)
            total += get(partial, 0)
            product += get(partial, 1)
        count = shape.N * shape.S * shape.fold
        constants = finish_backward(x, c, count, total, product, gradients)
        _set_constants(memory, shape, x, k, constants)


@primitive
def _backward_round(maps, gradients, training, memory, shape, block, t):
    """Take a thread's share of a block and of the block before, or its own blocks one by one."""
    if shape.together:
        memory = spares_of(memory, t)
        first, last = share(shape.pieces, t, shape.threads)
        for piece in range(first, last):
            _backward_piece(maps, gradients, memory, shape, block, block - 1, piece, training)
    else:
        memory = of_thread(memory, t)
        first, last = share(_blocks(shape), t, shape.threads)
        for block in range(first, last + 1):
            summed, written = block if block < last else -1, block - 1 if block > first else -1
            for piece in range(shape.pieces):
                _backward_piece(maps, gradients, memory, shape, summed, written, piece, training)
            _finish_backward(maps.x, gradients, memory, shape, summed)
    store_fence()


@kernel("Backward", "Gradients", "Flag")
def backward_rows(maps, gradients, training, memory, shape):
    """Gradients by x, weight, bias and residual."""
    for block in range(_rounds(shape)):
        for t in prange(shape.threads):
            _backward_round(maps, gradients, training, memory, shape, block, t)
        if shape.together:
            _finish_backward(maps.x, gradients, memory, shape, block)
