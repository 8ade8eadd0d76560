"""Kernels on rows ``[N, S, C]``: a row holds one value of each channel.

Rows are summed, the sums of some columns in registers, then rows are written, those read last
first: what the cache still holds of them is not read again. Blocks of columns that are written
while the next are summed, as with planes, read memory once, but in short pieces far apart, and were
slower. Sums are taken in pieces of the rows and merged: their tree depends on the shape alone.
"""

from numba import prange

from .arguments import number, set_number
from .compilation import inlined, kernel, primitive
from .intrinsics import LANES, front, get, missing, moved, put, store_fence
from .vector import (
    COLUMNS,
    element,
    finish_backward,
    finish_forward,
    first_number,
    gather,
    gradient_block,
    merged_moments,
    merged_products,
    moments,
    normalize_block,
    product_columns,
    product_few_columns,
    running_affine,
    scatter,
    set_moments,
    set_products,
    share,
    spares_of,
    sum_columns,
    sum_few_columns,
)

ROW_PIECE = 1024  # rows that are summed together, at least ...
ROW_PIECES = 64  # ... and pieces of rows, at most
ROW_TILE = 16  # rows that are taken in one go, at most; they divide a piece
ROW_JOINED = 512  # columns of short rows without a gap that are written as one, at least
ROW_AHEAD = 4096  # elements from what is summed to what is fetched, about
SPARE = COLUMNS + LANES  # elements of a spare row
SPARES = 4 * ROW_TILE  # spare rows: a tile of each map


def tiling(rows: int) -> tuple[int, int]:
    """Rows of a piece, and pieces."""
    pieces = max(1, min(ROW_PIECES, rows // ROW_PIECE))
    piece = -(-rows // (pieces * ROW_TILE)) * ROW_TILE
    return piece, -(-rows // piece)


@inlined
def _tile(shape, row, stop):
    """Where a row lies, rows of all n counted together, and how many are taken in one go."""
    n, s = row // shape.S, row % shape.S
    return n, s, min(shape.tile, min(shape.S - s, stop - row))


@inlined
def _constants(memory, shape, target, k):
    """Per column, the constant ``k`` of five that writing takes.

    Those of the last columns also lie before the first: a line may hold the end of a row and the
    beginning of the next. Where rows are written as one, the constants repeat. They begin as far
    behind a line as the target, so that both are met in whole lines.
    """
    size = shape.C * shape.group // LANES * LANES + 4 * LANES
    return moved(memory.constants.data, k * size + LANES + front(target.data))


@inlined
def _sums(memory, shape, k):
    """Per column of a block, shift, total and squares, or mean, total and product."""
    return moved(memory.sums.data, k * (shape.block + LANES))


@inlined
def _ahead(view, shape, n, c, s):
    """Where the rows lie that will be summed some tiles later."""
    s += shape.ahead * shape.tile
    if s >= shape.S:
        s -= shape.S
        n += 1
    if n >= shape.N or s + shape.tile > shape.S:
        return view.data
    return element(view, n, c, s)


@inlined
def _near(view, n, c, s, rows, count, spares, k):
    """Pointer to some rows of some columns, and the step from row to row; copied if need be."""
    at = element(view, n, c, s)
    if view.dc == 1 or missing(at):
        return at, view.ds
    spare = moved(spares.data, k * ROW_TILE * SPARE)
    for r in range(rows):
        gather(element(view, n, c, s + r), view.dc, moved(spare, r * SPARE), count)
    return spare, SPARE


@inlined
def _target(view, n, c, s, spares, k):
    """Pointer to rows to write, and the step from row to row, or to spare rows."""
    at = element(view, n, c, s)
    if view.dc == 1 or missing(at):
        return at, view.ds
    return moved(spares.data, k * ROW_TILE * SPARE), SPARE


@inlined
def _put_back(view, n, c, s, rows, count, spare):
    """Write what lies in spare rows to where it belongs."""
    if view.dc != 1 and not missing(view.data):
        for r in range(rows):
            scatter(moved(spare, r * SPARE), element(view, n, c, s + r), view.dc, count)


@inlined
def _side_by_side(a, b, c, d):
    """Whether columns lie side by side in every map."""
    return (
        (missing(a.data) or a.dc == 1) and (missing(b.data) or b.dc == 1)
        and (missing(c.data) or c.dc == 1) and (missing(d.data) or d.dc == 1)
    )  # fmt: skip


@inlined
def _task(shape, task):
    """First column, columns, piece, and first and last row of what a thread sums in one go."""
    blocks = -(-shape.C // shape.block)
    piece, c = task // blocks, task % blocks * shape.block
    start = piece * shape.piece
    stop = min(start + shape.piece, shape.N * shape.S)
    return c, min(shape.block, shape.C - c), piece, start, stop


@inlined
def _tasks(shape):
    """Blocks of columns of each piece."""
    return -(-shape.C // shape.block) * shape.pieces


# Statistics, normalize, forward.


@inlined
def _sum_tile(x, memory, shape, n, c, width, s, rows):
    shift, total = _sums(memory, shape, 0), _sums(memory, shape, 1)
    squares, ahead = _sums(memory, shape, 2), _ahead(x, shape, n, c, s)
    at = 0
    while at < width:
        count = COLUMNS if at + COLUMNS <= width else min(LANES, width - at)
        run, step = _near(x, n, c + at, s, rows, count, memory.spares, 0)
        if count == COLUMNS:
            sum_columns(
                run, step, moved(ahead, at), x.ds, rows,
                moved(shift, at), moved(total, at), moved(squares, at),
            )  # fmt: skip
        else:
            sum_few_columns(
                run, step, moved(ahead, at), x.ds, rows, count,
                moved(shift, at), moved(total, at), moved(squares, at),
            )  # fmt: skip
        at += count


@primitive
def _sum_rows(x, memory, shape, task):
    """Take the moments of a block of columns of a piece."""
    c, width, piece, start, stop = _task(shape, task)
    shift, total, squares = (
        _sums(memory, shape, 0),
        _sums(memory, shape, 1),
        _sums(memory, shape, 2),
    )
    n, s, _ = _tile(shape, start, stop)
    for k in range(width):
        put(shift, k, first_number(element(x, n, c + k, s), 0))
        put(total, k, 0.0)
        put(squares, k, 0.0)
    row = start
    while row < stop:
        n, s, rows = _tile(shape, row, stop)
        _sum_tile(x, memory, shape, n, c, width, s, rows)
        row += rows
    for k in range(width):
        mean, m2 = moments(stop - start, get(shift, k), get(total, k), get(squares, k))
        set_moments(memory, shape, c + k, piece, stop - start, mean, m2)


@inlined
def _joined(shape, row, stop):
    """Where a row lies, how many joined rows to write in one go, and how many are joined."""
    n, s, rows = _tile(shape, row, stop)
    if shape.group == 1:
        return n, s, rows, 1
    if stop - row < shape.group:
        return n, s, 1, stop - row
    return n, s, min(shape.tile, (stop - row) // shape.group), shape.group


@inlined
def _normalize_tile(maps, memory, shape, n, s, rows, join, fronts, tails, rectify):
    x, residual, y, mask = maps.x, maps.residual, maps.y, maps.mask
    # Only what has to be copied needs to be cut.
    width = join * shape.C
    size = width if _side_by_side(x, residual, y, y) else COLUMNS
    for c in range(0, width, size):
        count = min(size, width - c)
        run, step = _near(x, n, c, s, rows, count, memory.spares, 0)
        plus, plus_step = _near(residual, n, c, s, rows, count, memory.spares, 1)
        to, to_step = _target(y, n, c, s, memory.spares, 2)
        normalize_block(
            run, step * join, plus, plus_step * join, to, to_step * join,
            mask.data, n * mask.dn + c * mask.dc + s * mask.ds, mask.ds * join, mask.dc,
            rows, count, fronts, tails,
            moved(_constants(memory, shape, y, 0), c), moved(_constants(memory, shape, y, 1), c),
            moved(_constants(memory, shape, y, 2), c), rectify, shape.streaming and y.dc == 1,
        )  # fmt: skip
        _put_back(y, n, c, s, rows, count, to)


@inlined
def _lines(shape, rows, first, last):
    """From which row on a tile's lines begin before it, and how many rows leave their last line.

    `first`, `last`: whether the tile is a thread's first or last.
    """
    if not shape.adjoining:
        return rows, 0
    return (1 if first else 0), (rows - 1 if last else rows)


@inlined
def _span(shape, start, stop, k):
    """First and last row of the thread's span ``k``: those read last come first."""
    last = stop - k * shape.piece
    return max(start, last - shape.piece), last


@primitive
def _normalize_share(maps, memory, shape, rectify, t):
    """Write a thread's rows."""
    start, stop = share(shape.N * shape.S, t, shape.threads)
    for k in range(-(-(stop - start) // shape.piece)):
        row, last = _span(shape, start, stop, k)
        while row < last:
            n, s, rows, join = _joined(shape, row, last)
            after = row + rows * join
            fronts, tails = _lines(shape, rows, row == start, after == stop)
            _normalize_tile(
                maps, spares_of(memory, t), shape, n, s, rows, join, fronts, tails, rectify
            )
            row = after
    store_fence()


@inlined
def _set_constants(memory, shape, target, c, values):
    for k, value in enumerate(values):
        constants = _constants(memory, shape, target, k)
        for join in range(shape.group):
            put(constants, join * shape.C + c, value)
        if c >= shape.C - LANES:
            put(constants, c - shape.C, value)


@primitive
def _finish_forward(maps, memory, shape, parameters, settings, first, last):
    """Save the statistics of some channels, and what writing them takes."""
    for c in range(first, last):
        count, mean, m2 = merged_moments(memory, shape, c)
        values = finish_forward(maps.x, c, count, mean, m2, parameters, settings)
        _set_constants(memory, shape, maps.y, c, values)


@primitive
def _forward_share(maps, memory, shape, parameters, settings, t):
    """Sum a thread's share; whole columns are finished at once."""
    first, last = share(_tasks(shape), t, shape.threads)
    for task in range(first, last):
        _sum_rows(maps.x, spares_of(memory, t), shape, task)
        if shape.pieces == 1:
            c, width, _, _, _ = _task(shape, task)
            _finish_forward(maps, memory, shape, parameters, settings, c, c + width)


@primitive
def _finish_forward_share(maps, memory, shape, parameters, settings, t):
    first, last = share(shape.C, t, shape.threads)
    _finish_forward(maps, memory, shape, parameters, settings, first, last)


@kernel("Forward", "Parameters", "Settings")
def forward_rows(maps, parameters, settings, memory, shape):
    """Statistics, normalize and running averages."""
    for t in prange(shape.threads):
        _forward_share(maps, memory, shape, parameters, settings, t)
    if shape.pieces > 1:
        for t in prange(shape.threads):
            _finish_forward_share(maps, memory, shape, parameters, settings, t)
    for t in prange(shape.threads):
        _normalize_share(maps, memory, shape, settings.rectify, t)


@primitive
def _statistics_share(x, memory, shape, t):
    first, last = share(_tasks(shape), t, shape.threads)
    for task in range(first, last):
        _sum_rows(x, spares_of(memory, t), shape, task)


@kernel("Forward", "Numbers", "Numbers")
def statistics_rows(maps, mean, m2, memory, shape):
    """Mean and M2 of each channel."""
    for t in prange(shape.threads):
        _statistics_share(maps.x, memory, shape, t)
    for c in range(shape.C):
        _, channel_mean, channel_m2 = merged_moments(memory, shape, c)
        set_number(mean, c, channel_mean)
        set_number(m2, c, channel_m2)


@primitive
def _prepare_normalize(maps, memory, shape, parameters, settings, t):
    first, last = share(shape.C, t, shape.threads)
    for c in range(first, last):
        values = running_affine(maps.x, c, parameters, settings)
        _set_constants(memory, shape, maps.y, c, values)


@kernel("Forward", "Parameters", "Settings")
def normalize_rows(maps, parameters, settings, memory, shape):
    """Normalize by running statistics."""
    for t in prange(shape.threads):
        _prepare_normalize(maps, memory, shape, parameters, settings, t)
    for t in prange(shape.threads):
        _normalize_share(maps, memory, shape, settings.rectify, t)


# Backward.


@inlined
def _product_tile(maps, memory, shape, n, c, width, s, rows):
    dy, x, mask, spares = maps.dy, maps.x, maps.mask, memory.spares
    mean, total, product = _sums(memory, shape, 0), _sums(memory, shape, 1), _sums(memory, shape, 2)
    ahead_dy, ahead_x = _ahead(dy, shape, n, c, s), _ahead(x, shape, n, c, s)
    bit = n * mask.dn + c * mask.dc + s * mask.ds
    at = 0
    while at < width:
        count = COLUMNS if at + COLUMNS <= width else min(LANES, width - at)
        dy_run, dy_step = _near(dy, n, c + at, s, rows, count, spares, 0)
        x_run, x_step = _near(x, n, c + at, s, rows, count, spares, 1)
        if count == COLUMNS:
            product_columns(
                dy_run, dy_step, x_run, x_step, moved(ahead_dy, at), dy.ds, moved(ahead_x, at),
                x.ds, mask.data, bit + at * mask.dc, mask.ds, mask.dc,
                rows, moved(mean, at), moved(total, at), moved(product, at),
            )  # fmt: skip
        else:
            product_few_columns(
                dy_run, dy_step, x_run, x_step, moved(ahead_dy, at), dy.ds, moved(ahead_x, at),
                x.ds, mask.data, bit + at * mask.dc, mask.ds, mask.dc,
                rows, count, moved(mean, at), moved(total, at), moved(product, at),
            )  # fmt: skip
        at += count


@primitive
def _product_rows(maps, gradients, memory, shape, task):
    """Sum dy, and dy * (x - mean), of a block of columns of a piece."""
    c, width, piece, start, stop = _task(shape, task)
    mean, total, product = _sums(memory, shape, 0), _sums(memory, shape, 1), _sums(memory, shape, 2)
    for k in range(width):
        put(mean, k, number(gradients.mean, c + k))
        put(total, k, 0.0)
        put(product, k, 0.0)
    row = start
    while row < stop:
        n, s, rows = _tile(shape, row, stop)
        _product_tile(maps, memory, shape, n, c, width, s, rows)
        row += rows
    for k in range(width):
        set_products(memory, shape, c + k, piece, get(total, k), get(product, k))


@inlined
def _gradient_tile(maps, memory, shape, n, s, rows, join, fronts, tails, training):
    dx, dresidual, mask, spares = maps.dx, maps.dresidual, maps.mask, memory.spares
    width = join * shape.C
    size = width if _side_by_side(maps.dy, maps.x, dx, dresidual) else COLUMNS
    for c in range(0, width, size):
        count = min(size, width - c)
        dy_run, dy_step = _near(maps.dy, n, c, s, rows, count, spares, 0)
        x_run, x_step = _near(maps.x, n, c, s, rows, count, spares, 1)
        to, to_step = _target(dx, n, c, s, spares, 2)
        passed_on, passed_on_step = _target(dresidual, n, c, s, spares, 3)
        gradient_block(
            dy_run, dy_step * join, x_run, x_step * join, to, to_step * join,
            passed_on, passed_on_step * join,
            mask.data, n * mask.dn + c * mask.dc + s * mask.ds, mask.ds * join, mask.dc,
            rows, count, fronts, tails,
            moved(_constants(memory, shape, dx, 0), c), moved(_constants(memory, shape, dx, 1), c),
            moved(_constants(memory, shape, dx, 2), c), moved(_constants(memory, shape, dx, 3), c),
            moved(_constants(memory, shape, dx, 4), c), training, shape.streaming and dx.dc == 1,
        )  # fmt: skip
        _put_back(dx, n, c, s, rows, count, to)
        _put_back(dresidual, n, c, s, rows, count, passed_on)


@primitive
def _gradient_share(maps, memory, shape, training, t):
    """Write a thread's rows."""
    start, stop = share(shape.N * shape.S, t, shape.threads)
    for k in range(-(-(stop - start) // shape.piece)):
        row, last = _span(shape, start, stop, k)
        while row < last:
            n, s, rows, join = _joined(shape, row, last)
            after = row + rows * join
            fronts, tails = _lines(shape, rows, row == start, after == stop)
            _gradient_tile(
                maps, spares_of(memory, t), shape, n, s, rows, join, fronts, tails, training
            )
            row = after
    store_fence()


@primitive
def _finish_backward(maps, gradients, memory, shape, first, last):
    """Save the gradients by some weights and biases, and what writing dx takes."""
    for c in range(first, last):
        total, product = merged_products(memory, shape, c)
        values = finish_backward(maps.x, c, shape.N * shape.S, total, product, gradients)
        _set_constants(memory, shape, maps.dx, c, values)


@primitive
def _backward_share(maps, gradients, memory, shape, t):
    """Sum a thread's share; whole columns are finished at once."""
    first, last = share(_tasks(shape), t, shape.threads)
    for task in range(first, last):
        _product_rows(maps, gradients, spares_of(memory, t), shape, task)
        if shape.pieces == 1:
            c, width, _, _, _ = _task(shape, task)
            _finish_backward(maps, gradients, memory, shape, c, c + width)


@primitive
def _finish_backward_share(maps, gradients, memory, shape, t):
    first, last = share(shape.C, t, shape.threads)
    _finish_backward(maps, gradients, memory, shape, first, last)


@kernel("Backward", "Gradients", "Flag")
def backward_rows(maps, gradients, training, memory, shape):
    """Gradients by x, weight, bias and residual."""
    for t in prange(shape.threads):
        _backward_share(maps, gradients, memory, shape, t)
    if shape.pieces > 1:
        for t in prange(shape.threads):
            _finish_backward_share(maps, gradients, memory, shape, t)
    for t in prange(shape.threads):
        _gradient_share(maps, memory, shape, training, t)
