"""Kernels on rows ``[N, S, C]``: a row holds one value of each channel.

Rows are summed, the sums of some columns in registers, then rows are written, those read last
first: what the cache still holds of them is not read again. Blocks of columns that are written
while the next are summed, as with planes, read memory once, but in short pieces far apart, and were
slower. Sums are taken in pieces of the rows and merged: their tree depends on the shape alone.
Rows of fewer channels than a vector has lanes are summed `fold` at a time, as one long row.
"""

import numpy as np
from numba import prange

from .arguments import number, set_number
from .compilation import inlined, kernel, primitive
from .intrinsics import (
    LANES,
    computed,
    front,
    get,
    load,
    missing,
    moved,
    put,
    spread,
    store,
    store_fence,
)
from .vector import (
    COLUMNS,
    column_moments,
    element,
    finish_backward,
    finish_forward,
    first_number,
    gather,
    gradient_block,
    merge,
    merge_columns,
    moments,
    normalize_block,
    product_columns,
    product_few_columns,
    product_of,
    running_affine,
    scatter,
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


def partials_row(columns: int) -> int:
    """Numbers that are left of a piece of all columns: twice as many."""
    return 2 * -(-columns // LANES) * LANES


def tiling(rows: int) -> tuple[int, int]:
    """Rows of a piece, and pieces; none of no rows."""
    pieces = max(1, min(ROW_PIECES, rows // ROW_PIECE))
    piece = max(1, -(-rows // (pieces * ROW_TILE))) * ROW_TILE
    return piece, -(-rows // piece)


@inlined
def _tile(shape, row, stop):
    """Where a row lies, rows of all n counted together, and how many are taken in one go."""
    n, s = row // shape.S, row % shape.S
    return n, s, min(shape.tile, min(shape.S - s, stop - row))


@inlined
def _constants(memory, shape, target, k):
    """Per column, the constant ``k`` of five that writing takes.

    Those of the last columns also lie before the first: a line may hold the end of a row, or all of
    it, and the beginning of the next. Where rows are written as one, the constants repeat. They
    begin as far behind a line as the target, so that both are met in whole lines.
    """
    size = shape.C * shape.group // LANES * LANES + 4 * LANES
    return moved(memory.constants.data, k * size + LANES + front(target.data))


@inlined
def _sums(memory, shape, k):
    """Per column of a block, shift, total and squares, or mean, total and product."""
    return moved(memory.sums.data, k * (shape.block + LANES))


@inlined
def _partial(memory, shape, piece, k, c):
    """Where a piece's means and M2, or its two sums, are kept, from column ``c`` on."""
    row = -(-shape.C * shape.fold // LANES) * LANES
    return moved(memory.partials.data, (2 * piece + k) * row + c)


@inlined
def _start_sums(memory, shape, width):
    """Set the sums of columns to 0."""
    for k in range(0, width, LANES):
        store(_sums(memory, shape, 1), k, spread(0.0))
        store(_sums(memory, shape, 2), k, spread(0.0))


@inlined
def _rows_of(shape, piece):
    """First and last of the rows of a piece, `fold` taken as one."""
    return piece * shape.piece, min((piece + 1) * shape.piece, shape.N * shape.S // shape.fold)


@inlined
def _summed_tile(shape, row, stop):
    """`_tile` of rows that are summed, where `fold` of those that lie in memory are one."""
    n, s, rows = _tile(shape, row, stop)
    return n, s * shape.fold, rows


@inlined
def _ahead(view, shape, n, c, s):
    """Where the rows lie that will be summed some tiles later."""
    tile = shape.tile * shape.fold
    s += shape.ahead * tile
    if s >= shape.S:
        s -= shape.S
        n += 1
    if n >= shape.N or s + tile > shape.S:
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
    """First column, columns and piece of what a thread sums in one go."""
    width = shape.C * shape.fold
    blocks = -(-width // shape.block)
    piece, c = task // blocks, task % blocks * shape.block
    return c, min(shape.block, width - c), piece


@inlined
def _tasks(shape):
    """Blocks of columns of each piece."""
    return -(-shape.C * shape.fold // shape.block) * shape.pieces


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
                run, step * shape.fold, moved(ahead, at), x.ds * shape.fold, rows,
                moved(shift, at), moved(total, at), moved(squares, at),
            )  # fmt: skip
        else:
            sum_few_columns(
                run, step, moved(ahead, at), x.ds, rows, count,
                moved(shift, at), moved(total, at), moved(squares, at),
            )  # fmt: skip
        at += count


@inlined
def _keep_moments(memory, shape, piece, c, width):
    """Keep the moments of columns of a piece."""
    start, stop = _rows_of(shape, piece)
    column_moments(
        width, stop - start, _sums(memory, shape, 0), _sums(memory, shape, 1),
        _sums(memory, shape, 2), _partial(memory, shape, piece, 0, c),
        _partial(memory, shape, piece, 1, c),
    )  # fmt: skip


@inlined
def _columns_of(shape, t):
    """First and last column that a thread finishes."""
    first, last = share(-(-shape.C // LANES), t, shape.threads)
    return first * LANES, min(last * LANES, shape.C)


@primitive
def _sum_rows(x, memory, shape, task):
    """Take the moments of a block of columns of a piece."""
    c, width, piece = _task(shape, task)
    row, stop = _rows_of(shape, piece)
    n, s, _ = _summed_tile(shape, row, stop)
    for k in range(width):
        put(_sums(memory, shape, 0), k, first_number(element(x, n, c + k, s), 0))
    _start_sums(memory, shape, width)
    while row < stop:
        n, s, rows = _summed_tile(shape, row, stop)
        _sum_tile(x, memory, shape, n, c, width, s, rows)
        row += rows
    _keep_moments(memory, shape, piece, c, width)


@inlined
def _merged_moments(memory, shape, c):
    """Mean and M2 of sixteen columns, of all pieces."""
    start, stop = _rows_of(shape, 0)
    count = np.float64(stop - start)
    mean, m2 = load(_partial(memory, shape, 0, 0, c), 0), load(_partial(memory, shape, 0, 1, c), 0)
    for piece in range(1, shape.pieces):
        start, stop = _rows_of(shape, piece)
        mean_b = load(_partial(memory, shape, piece, 0, c), 0)
        m2_b = load(_partial(memory, shape, piece, 1, c), 0)
        count, mean, m2 = merge_columns(count, mean, m2, np.float64(stop - start), mean_b, m2_b)
    return mean, m2


@inlined
def _folded(shape):
    """Columns that were summed, and first and last of the rows that were not: fewer than `fold`."""
    rows = shape.N * shape.S
    return shape.C * shape.fold if shape.pieces else 0, rows // shape.fold * shape.fold, rows


@inlined
def _loose_moments(x, c, start, stop):
    """Mean and M2 of a channel of some rows."""
    shift = first_number(element(x, 0, c, start), 0)
    total = squares = 0.0
    for s in range(start, stop):
        d = np.float64(computed(element(x, 0, c, s), 0)) - shift
        total, squares = total + d, squares + d * d
    return moments(np.float64(stop - start), shift, total, squares)


@primitive
def _fold_moments(x, memory, shape):
    """Mean and M2 of each channel: of its columns, and of the rows that are in none."""
    width, start, stop = _folded(shape)
    means, m2s = _partial(memory, shape, 0, 0, 0), _partial(memory, shape, 0, 1, 0)
    for k in range(0, width, LANES):
        merged = _merged_moments(memory, shape, k)
        store(means, k, merged[0])
        store(m2s, k, merged[1])
    count, half = np.float64(start // shape.fold), width // 2
    while half >= shape.C:
        for k in range(0, half, LANES):
            a, b = load(means, k), load(m2s, k)
            merged = merge_columns(count, a, b, count, load(means, half + k), load(m2s, half + k))
            store(means, k, merged[1])
            store(m2s, k, merged[2])
        count, half = 2 * count, half // 2
    for c in range(shape.C):
        if start == stop:
            mean, m2 = get(means, c), get(m2s, c)
        else:
            mean, m2 = _loose_moments(x, c, start, stop)
            if width:
                loose = np.float64(stop - start)
                _, mean, m2 = merge(count, get(means, c), get(m2s, c), loose, mean, m2)
        put(_sums(memory, shape, 0), c, mean)
        put(_sums(memory, shape, 1), c, m2)


@inlined
def _take_moments(x, memory, shape, c):
    """Put mean and M2 of sixteen channels, or of all where rows are folded, into two sums."""
    if shape.fold > 1:
        _fold_moments(x, memory, shape)
    else:
        merged = _merged_moments(memory, shape, c)
        store(_sums(memory, shape, 0), 0, merged[0])
        store(_sums(memory, shape, 1), 0, merged[1])


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
def _spans(shape, start, stop):
    """Count a thread's spans, of which each has a piece's rows or more, or all there are.

    The next one begins in the line in which this one ends, and must not reach beyond it.
    """
    return max(1, (stop - start) // (shape.piece * shape.fold))


@inlined
def _span(shape, start, stop, k):
    """First and last row of the thread's span ``k``: those read last come first."""
    rows = shape.piece * shape.fold
    last = stop - k * rows
    return (start if k + 1 == _spans(shape, start, stop) else last - rows), last


@primitive
def _normalize_share(maps, memory, shape, rectify, t):
    """Write a thread's rows."""
    start, stop = share(shape.N * shape.S, t, shape.threads)
    for k in range(_spans(shape, start, stop)):
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
        for at in range(c - shape.C, -LANES - 1, -shape.C):
            put(constants, at, value)


@primitive
def _finish_forward(maps, memory, shape, parameters, settings, t):
    """Save the statistics of a thread's columns, and what writing them takes."""
    first, last = _columns_of(shape, t)
    mean, m2 = _sums(memory, shape, 0), _sums(memory, shape, 1)
    for at in range(first, last, LANES):
        _take_moments(maps.x, memory, shape, at)
        for k in range(min(LANES, last - at)):
            values = finish_forward(
                maps.x, at + k, shape.N * shape.S, get(mean, k), get(m2, k), parameters, settings
            )
            _set_constants(memory, shape, maps.y, at + k, values)


@primitive
def _sum_share(x, memory, shape, t):
    """Sum a thread's pieces of whole columns, or blocks of columns of them."""
    first, last = share(_tasks(shape), t, shape.threads)
    for task in range(first, last):
        _sum_rows(x, spares_of(memory, t), shape, task)


@kernel("Forward", "Parameters", "Settings")
def forward_rows(maps, parameters, settings, memory, shape):
    """Statistics, normalize and running averages."""
    for t in prange(shape.threads):
        _sum_share(maps.x, memory, shape, t)
    for t in prange(shape.threads):
        _finish_forward(maps, spares_of(memory, t), shape, parameters, settings, t)
    for t in prange(shape.threads):
        _normalize_share(maps, memory, shape, settings.rectify, t)


@kernel("Forward", "Numbers", "Numbers")
def statistics_rows(maps, mean, m2, memory, shape):
    """Mean and M2 of each channel."""
    for t in prange(shape.threads):
        _sum_share(maps.x, memory, shape, t)
    for c in range(0, shape.C, LANES):
        _take_moments(maps.x, memory, shape, c)
        for k in range(min(LANES, shape.C - c)):
            set_number(mean, c + k, get(_sums(memory, shape, 0), k))
            set_number(m2, c + k, get(_sums(memory, shape, 1), k))


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
    dy, x, mask, spares, fold = maps.dy, maps.x, maps.mask, memory.spares, shape.fold
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
                dy_run, dy_step * fold, x_run, x_step * fold,
                moved(ahead_dy, at), dy.ds * fold, moved(ahead_x, at), x.ds * fold,
                mask.data, bit + at * mask.dc, mask.ds * fold, mask.dc,
                rows, moved(mean, at), moved(total, at), moved(product, at),
            )  # fmt: skip
        else:
            product_few_columns(
                dy_run, dy_step, x_run, x_step, moved(ahead_dy, at), dy.ds, moved(ahead_x, at),
                x.ds, mask.data, bit + at * mask.dc, mask.ds, mask.dc,
                rows, count, moved(mean, at), moved(total, at), moved(product, at),
            )  # fmt: skip
        at += count


@inlined
def _keep_products(memory, shape, piece, c, width):
    """Keep the sums of columns of a piece."""
    for k in range(0, width, LANES):
        store(_partial(memory, shape, piece, 0, c), k, load(_sums(memory, shape, 1), k))
        store(_partial(memory, shape, piece, 1, c), k, load(_sums(memory, shape, 2), k))


@primitive
def _product_rows(maps, gradients, memory, shape, task):
    """Sum dy, and dy * (x - mean), of a block of columns of a piece."""
    c, width, piece = _task(shape, task)
    row, stop = _rows_of(shape, piece)
    for k in range(width):
        put(_sums(memory, shape, 0), k, number(gradients.mean, (c + k) % shape.C))
    _start_sums(memory, shape, width)
    while row < stop:
        n, s, rows = _summed_tile(shape, row, stop)
        _product_tile(maps, memory, shape, n, c, width, s, rows)
        row += rows
    _keep_products(memory, shape, piece, c, width)


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
    for k in range(_spans(shape, start, stop)):
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


@inlined
def _total_products(memory, shape, c):
    """Both sums of sixteen columns, of all pieces."""
    total = product = spread(0.0)
    for piece in range(shape.pieces):
        total = total + load(_partial(memory, shape, piece, 0, c), 0)
        product = product + load(_partial(memory, shape, piece, 1, c), 0)
    return total, product


@primitive
def _fold_products(maps, gradients, memory, shape):
    """Both sums of each channel: of its columns, and of the rows that are in none."""
    width, start, stop = _folded(shape)
    totals, products = _partial(memory, shape, 0, 0, 0), _partial(memory, shape, 0, 1, 0)
    for k in range(0, width, LANES):
        sums = _total_products(memory, shape, k)
        store(totals, k, sums[0])
        store(products, k, sums[1])
    half = width // 2
    while half >= shape.C:
        for k in range(0, half, LANES):
            store(totals, k, load(totals, k) + load(totals, half + k))
            store(products, k, load(products, k) + load(products, half + k))
        half //= 2
    mask = maps.mask
    for c in range(shape.C):
        total = product = 0.0
        if width:
            total, product = get(totals, c), get(products, c)
        for s in range(start, stop):
            g, gd = product_of(
                element(maps.dy, 0, c, s), element(maps.x, 0, c, s), mask.data,
                c * mask.dc + s * mask.ds, number(gradients.mean, c),
            )  # fmt: skip
            total, product = total + g, product + gd
        put(_sums(memory, shape, 0), c, total)
        put(_sums(memory, shape, 1), c, product)


@inlined
def _take_products(maps, gradients, memory, shape, c):
    """Put both sums of sixteen channels, or of all where rows are folded, into two sums."""
    if shape.fold > 1:
        _fold_products(maps, gradients, memory, shape)
    else:
        sums = _total_products(memory, shape, c)
        store(_sums(memory, shape, 0), 0, sums[0])
        store(_sums(memory, shape, 1), 0, sums[1])


@primitive
def _finish_backward(maps, gradients, memory, shape, t):
    """Save the gradients by a thread's weights and biases, and what writing dx takes."""
    first, last = _columns_of(shape, t)
    totals, products = _sums(memory, shape, 0), _sums(memory, shape, 1)
    for at in range(first, last, LANES):
        _take_products(maps, gradients, memory, shape, at)
        for k in range(min(LANES, last - at)):
            c = at + k
            values = finish_backward(
                maps.x, c, shape.N * shape.S, get(totals, k), get(products, k), gradients
            )
            _set_constants(memory, shape, maps.dx, c, values)


@primitive
def _product_share(maps, gradients, memory, shape, t):
    """Sum a thread's pieces of whole columns, or blocks of columns of them."""
    first, last = share(_tasks(shape), t, shape.threads)
    for task in range(first, last):
        _product_rows(maps, gradients, spares_of(memory, t), shape, task)


@kernel("Backward", "Gradients", "Flag")
def backward_rows(maps, gradients, training, memory, shape):
    """Gradients by x, weight, bias and residual."""
    for t in prange(shape.threads):
        _product_share(maps, gradients, memory, shape, t)
    for t in prange(shape.threads):
        _finish_backward(maps, gradients, spares_of(memory, t), shape, t)
    for t in prange(shape.threads):
        _gradient_share(maps, memory, shape, training, t)
