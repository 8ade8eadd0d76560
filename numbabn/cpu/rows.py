"""Kernels on rows ``[N, S, C]``: a row holds one value of each channel, or ``fold`` of each.

The grid of tasks is pieces of rows by blocks of columns; a column's sums stay in cache while a
piece goes by. Column ``j`` belongs to channel ``j // fold``: short planes are rows of ``C * S``
columns.
"""

import numpy as np
from numba import prange

from .schedule import ROW_BLOCK, ROW_PIECE, ROW_TILE, kernel, primitive
from .vector import (
    affine,
    computed,
    finish_columns,
    gate,
    gradient_affine,
    input_gradient_columns,
    load,
    merge_columns,
    merge_equal,
    normalize_columns,
    pack,
    place,
    reserve,
    start_columns,
    store,
    sum_columns,
    sum_products_columns,
)

PIECE = ROW_TILE * ROW_PIECE


@primitive
def _grid(shape):
    """Rows, columns, pieces of rows, blocks of columns."""
    N, C, S, fold = shape
    M, W = N * S, C * fold
    return M, W, -(-M // PIECE), -(-W // ROW_BLOCK)


@primitive
def _at(view, shape, m, j):
    """Index of column ``j`` of row ``m``."""
    S = shape[2]
    if S == 1:
        return place(view, m, j, 0)
    return place(view, m // S, j, m % S)


@primitive
def _spare(view):
    """Room for a row that has to be gathered; none if rows lie in memory as they are."""
    return np.empty(0 if view.dc == 1 else ROW_BLOCK, view.data.dtype)


@primitive
def _gate_spare(mask, x):
    """Room for a row of dy through the ReLU."""
    return np.empty(0 if mask is None else ROW_BLOCK, x.data.dtype)


@primitive
def _row(view, shape, m, j, size, spare):
    return load(view, _at(view, shape, m, j), view.dc, size, spare)


@primitive
def _gated_row(dy, mask, shape, m, j, size, spare, gated):
    row = _row(dy, shape, m, j, size, spare)
    if mask is None:
        return row
    gate(row, mask.data, _at(mask, shape, m, j), mask.dc, gated)
    return gated


@primitive
def _block(shape, task):
    """First and last row, first and last column of a task; tasks of one piece are neighbours."""
    M, W, _, blocks = _grid(shape)
    first, j = task // blocks * PIECE, task % blocks * ROW_BLOCK
    return first, min(first + PIECE, M), j, min(j + ROW_BLOCK, W)


@primitive
def _fill(columns, j, fold, c, value):
    """Set those of the columns ``j, j + 1, ...`` that belong to channel ``c``."""
    columns[max(c * fold - j, 0) : c * fold + fold - j] = value


@primitive
def _block_moments(x, shape, first, last, j, mean, m2):  # mean, m2 [block], zeros
    size = mean.size
    spare = _spare(x)
    shift, total, squares = np.empty(size), np.empty(size), np.empty(size)
    for start in range(first, last, ROW_TILE):
        stop = min(start + ROW_TILE, last)
        start_columns(_row(x, shape, start, j, size, spare), shift)
        total[:] = 0.0
        squares[:] = 0.0
        for m in range(start, stop):
            sum_columns(_row(x, shape, m, j, size, spare), shift, total, squares)
        finish_columns(stop - start, shift, total, squares)
        merge_columns(start - first, mean, m2, stop - start, total, squares)


@kernel
def statistics_rows(x, shape, mean, m2):  # x [N, S, C]; mean, m2 [C], written
    M, W, pieces, blocks = _grid(shape)
    C, fold = shape[1], shape[3]
    means, m2s = np.zeros((pieces, W)), np.zeros((pieces, W))
    for task in prange(pieces * blocks):
        first, last, j, end = _block(shape, task)
        piece = task // blocks
        _block_moments(x, shape, first, last, j, means[piece, j:end], m2s[piece, j:end])
    for piece in range(1, pieces):
        first = piece * PIECE
        rows = min(PIECE, M - first)
        merge_columns(first, means[0], m2s[0], rows, means[piece], m2s[piece])
    for c in prange(C):
        columns = slice(c * fold, c * fold + fold)
        mean[c], m2[c] = merge_equal(M, means[0, columns], m2s[0, columns])


@kernel
def normalize_rows(
    x,  # [N, S, C]
    residual,  # [N, S, C] or None
    y,  # [N, S, C], written
    mask,  # bits [N, S, C], written, or None; only beside a mask
    shape,  # N, C, S, fold
    mean,  # [C], as invstd, weight and bias
    invstd,
    weight,
    bias,
    relu,
):
    _, _, pieces, blocks = _grid(shape)
    fold = shape[3]
    for task in prange(pieces * blocks):
        first, last, j, end = _block(shape, task)
        size = end - j
        high, scale, shift = computed(size, x.data), computed(size, x.data), computed(size, x.data)
        for c in range(j // fold, (end - 1) // fold + 1):
            channel = affine(x, mean[c], invstd[c], weight[c], bias[c])
            _fill(high, j, fold, c, channel[0])
            _fill(scale, j, fold, c, channel[1])
            _fill(shift, j, fold, c, channel[2])
        x_spare, y_spare = _spare(x), _spare(y)
        for m in range(first, last):
            x_row = _row(x, shape, m, j, size, x_spare)
            at = _at(y, shape, m, j)
            y_row = reserve(y, at, y.dc, size, y_spare)
            if residual is None:
                normalize_columns(x_row, None, y_row, high, scale, shift, relu)
            else:
                residual_row = _row(residual, shape, m, j, size, _spare(residual))
                normalize_columns(x_row, residual_row, y_row, high, scale, shift, relu)
            store(y, at, y.dc, y_row)
            if mask is not None:
                pack(y_row, mask.data, _at(mask, shape, m, j), mask.dc)


@kernel
def backward_reduce_rows(
    dy,  # [N, S, C]
    x,  # [N, S, C]
    mask,  # bits [N, S, C] or None
    shape,  # N, C, S, fold
    mean,  # [C]
    total,  # [C], written: the sum of dy
    product,  # [C], written: the sum of dy * (x - mean)
):
    _, W, pieces, blocks = _grid(shape)
    C, fold = shape[1], shape[3]
    totals, products = np.zeros((pieces, W)), np.zeros((pieces, W))
    for task in prange(pieces * blocks):
        first, last, j, end = _block(shape, task)
        piece, size = task // blocks, end - j
        means = np.empty(size)
        for c in range(j // fold, (end - 1) // fold + 1):
            _fill(means, j, fold, c, mean[c])
        x_spare, dy_spare, gated = _spare(x), _spare(dy), _gate_spare(mask, x)[:size]
        for m in range(first, last):
            sum_products_columns(
                _gated_row(dy, mask, shape, m, j, size, dy_spare, gated),
                _row(x, shape, m, j, size, x_spare),
                means,
                totals[piece, j:end],
                products[piece, j:end],
            )
    for c in prange(C):
        columns = slice(c * fold, c * fold + fold)
        total[c], product[c] = 0.0, 0.0
        for piece in range(pieces):
            total[c] += totals[piece, columns].sum()
            product[c] += products[piece, columns].sum()


@kernel
def dx_rows(
    dy,  # [N, S, C]
    x,  # [N, S, C]
    dx,  # [N, S, C], written
    mask,  # bits [N, S, C] or None
    dresidual,  # [N, S, C], written, or None; only beside a mask
    shape,  # N, C, S, fold
    mean,  # [C], as invstd, weight, total and product
    invstd,
    weight,
    total,
    product,
    training,
):
    _, _, pieces, blocks = _grid(shape)
    N, _, S, fold = shape
    count = N * S * fold
    for task in prange(pieces * blocks):
        first, last, j, end = _block(shape, task)
        size = end - j
        dy_high, high = computed(size, x.data), computed(size, x.data)
        slope, scale, shift = computed(size, x.data), computed(size, x.data), computed(size, x.data)
        for c in range(j // fold, (end - 1) // fold + 1):
            channel = gradient_affine(
                x, mean[c], invstd[c], weight[c], total[c] / count, product[c] / count
            )
            _fill(dy_high, j, fold, c, channel[0])
            _fill(high, j, fold, c, channel[1])
            _fill(slope, j, fold, c, channel[2])
            _fill(scale, j, fold, c, channel[3])
            _fill(shift, j, fold, c, channel[4])
        zeros = computed(size, x.data)
        zeros[:] = 0
        x_spare, dy_spare, dx_spare = _spare(x), _spare(dy), _spare(dx)
        gate_spare = _gate_spare(mask, x)
        for m in range(first, last):
            gated = gate_spare[:size]
            if dresidual is not None:
                at = _at(dresidual, shape, m, j)
                gated = reserve(dresidual, at, dresidual.dc, size, gate_spare)
            dy_row = _gated_row(dy, mask, shape, m, j, size, dy_spare, gated)
            if dresidual is not None:
                store(dresidual, _at(dresidual, shape, m, j), dresidual.dc, dy_row)
            at = _at(dx, shape, m, j)
            dx_row = reserve(dx, at, dx.dc, size, dx_spare)
            if training:
                x_row = _row(x, shape, m, j, size, x_spare)
                input_gradient_columns(dy_row, x_row, dx_row, dy_high, high, slope, scale, shift)
            else:
                normalize_columns(dy_row, None, dx_row, zeros, scale, zeros, False)
            store(dx, at, dx.dc, dx_row)
