"""Kernels on planes ``[N, C, S]``: a channel's values lie in N stretches of S.

A plane is cut into tiles and a channel's tiles are taken in pieces. A piece is one task; where
channels are many, all the pieces of a channel are one task, so that the second sweep over them
finds them in cache.
"""

import numpy as np
from numba import prange

from .intrinsics import as_computed
from .schedule import PLANE_PIECE, PLANE_TILE, kernel, primitive
from .vector import (
    affine,
    gate,
    gradient_affine,
    input_gradient,
    load,
    merge,
    moments,
    normalize,
    pack,
    place,
    products,
    reserve,
    store,
)


@primitive
def _tiles(shape):
    N, _, S, _ = shape
    return N * -(-S // PLANE_TILE)


@primitive
def _pieces(shape):
    return -(-_tiles(shape) // PLANE_PIECE)


@primitive
def _tiles_of(shape, piece):
    first = piece * PLANE_PIECE
    return range(first, min(first + PLANE_PIECE, _tiles(shape)))


@primitive
def _tile(shape, t):
    """Plane, first place and size of a channel's tile ``t``."""
    S = shape[2]
    cuts = -(-S // PLANE_TILE)
    start = t % cuts * PLANE_TILE
    return t // cuts, start, min(PLANE_TILE, S - start)


@primitive
def _spare(view):
    """Room for a row that has to be gathered; none if rows lie in memory as they are."""
    return np.empty(0 if view.ds == 1 else PLANE_TILE, view.data.dtype)


@primitive
def _gate_spare(mask, x):
    """Room for a row of dy through the ReLU."""
    return np.empty(0 if mask is None else PLANE_TILE, x.data.dtype)


@primitive
def _row(view, n, c, s, size, spare):
    return load(view, place(view, n, c, s), view.ds, size, spare)


@primitive
def _piece_moments(x, shape, c, piece, spare):
    count, mean, m2 = 0, 0.0, 0.0
    for t in _tiles_of(shape, piece):
        n, s, size = _tile(shape, t)
        tile_mean, tile_m2 = moments(_row(x, n, c, s, size, spare))
        count, mean, m2 = merge(count, mean, m2, size, tile_mean, tile_m2)
    return count, mean, m2


@primitive
def _normalize_piece(x, residual, y, mask, shape, c, piece, mean, invstd, weight, bias, relu):
    high, scale, shift = affine(x, mean, invstd, weight, bias)
    x_spare, y_spare = _spare(x), _spare(y)
    for t in _tiles_of(shape, piece):
        n, s, size = _tile(shape, t)
        x_row = _row(x, n, c, s, size, x_spare)
        at = place(y, n, c, s)
        y_row = reserve(y, at, y.ds, size, y_spare)
        if residual is None:
            normalize(x_row, None, y_row, high, scale, shift, relu)
        else:
            residual_row = _row(residual, n, c, s, size, _spare(residual))
            normalize(x_row, residual_row, y_row, high, scale, shift, relu)
        store(y, at, y.ds, y_row)
        if mask is not None:
            pack(y_row, mask.data, place(mask, n, c, s), mask.ds)


@primitive
def _gated_row(dy, mask, n, c, s, size, spare, gated):
    row = _row(dy, n, c, s, size, spare)
    if mask is None:
        return row
    gate(row, mask.data, place(mask, n, c, s), mask.ds, gated)
    return gated


@primitive
def _piece_products(dy, x, mask, shape, c, piece, mean):
    total, product = 0.0, 0.0
    x_spare, dy_spare, gate_spare = _spare(x), _spare(dy), _gate_spare(mask, x)
    for t in _tiles_of(shape, piece):
        n, s, size = _tile(shape, t)
        dy_row = _gated_row(dy, mask, n, c, s, size, dy_spare, gate_spare[:size])
        tile_total, tile_product = products(dy_row, _row(x, n, c, s, size, x_spare), mean)
        total += tile_total
        product += tile_product
    return total, product


@primitive
def _dx_piece(
    dy, x, dx, mask, dresidual, shape, c, piece, mean, invstd, weight, total, product, training
):
    count = shape[0] * shape[2]
    dy_high, high, slope, scale, shift = gradient_affine(
        x, mean, invstd, weight, total / count, product / count
    )
    zero = as_computed(0.0, x.data)
    x_spare, dy_spare, dx_spare = _spare(x), _spare(dy), _spare(dx)
    gate_spare = _gate_spare(mask, x)
    for t in _tiles_of(shape, piece):
        n, s, size = _tile(shape, t)
        gated = gate_spare[:size]
        if dresidual is not None:
            gated = reserve(dresidual, place(dresidual, n, c, s), dresidual.ds, size, gate_spare)
        dy_row = _gated_row(dy, mask, n, c, s, size, dy_spare, gated)
        if dresidual is not None:
            store(dresidual, place(dresidual, n, c, s), dresidual.ds, dy_row)
        at = place(dx, n, c, s)
        dx_row = reserve(dx, at, dx.ds, size, dx_spare)
        if training:
            x_row = _row(x, n, c, s, size, x_spare)
            input_gradient(dy_row, x_row, dx_row, dy_high, high, slope, scale, shift)
        else:
            normalize(dy_row, None, dx_row, zero, scale, zero, False)
        store(dx, at, dx.ds, dx_row)


@kernel
def statistics_planes(x, shape, mean, m2):  # x [N, C, S]; mean, m2 [C]
    C, pieces = shape[1], _pieces(shape)
    counts = np.empty((C, pieces), np.int64)
    means = np.empty((C, pieces))
    m2s = np.empty((C, pieces))
    for task in prange(C * pieces):
        c, piece = task % C, task // C
        counts[c, piece], means[c, piece], m2s[c, piece] = _piece_moments(
            x, shape, c, piece, _spare(x)
        )
    for c in range(C):
        count, mean[c], m2[c] = 0, 0.0, 0.0
        for piece in range(pieces):
            count, mean[c], m2[c] = merge(
                count, mean[c], m2[c], counts[c, piece], means[c, piece], m2s[c, piece]
            )


@kernel
def normalize_planes(
    x,  # [N, C, S]
    residual,  # [N, C, S] or None
    y,  # [N, C, S]
    mask,  # bits [N, C, S] or None
    shape,  # N, C, S, 1
    mean,  # [C], as invstd, weight and bias
    invstd,
    weight,
    bias,
    relu,
):
    C = shape[1]
    for task in prange(C * _pieces(shape)):
        c, piece = task % C, task // C
        _normalize_piece(
            x, residual, y, mask, shape, c, piece, mean[c], invstd[c], weight[c], bias[c], relu
        )


@kernel
def forward_planes(
    x,  # [N, C, S]
    residual,  # [N, C, S] or None
    y,  # [N, C, S]
    mask,  # bits [N, C, S] or None
    shape,  # N, C, S, 1
    weight,  # [C]
    bias,  # [C]
    eps,
    relu,
    mean,  # [C], written
    m2,  # [C], written
):
    pieces = _pieces(shape)
    for c in prange(shape[1]):
        count, channel_mean, channel_m2 = 0, 0.0, 0.0
        spare = _spare(x)
        for piece in range(pieces):
            part_count, part_mean, part_m2 = _piece_moments(x, shape, c, piece, spare)
            count, channel_mean, channel_m2 = merge(
                count, channel_mean, channel_m2, part_count, part_mean, part_m2
            )
        mean[c], m2[c] = channel_mean, channel_m2
        invstd = 1.0 / np.sqrt(channel_m2 / count + eps)
        for piece in range(pieces):
            _normalize_piece(
                x, residual, y, mask, shape, c, piece, mean[c], invstd, weight[c], bias[c], relu
            )


@kernel
def backward_reduce_planes(
    dy,  # [N, C, S]
    x,  # [N, C, S]
    mask,  # bits [N, C, S] or None
    shape,  # N, C, S, 1
    mean,  # [C]
    total,  # [C], written: the sum of dy
    product,  # [C], written: the sum of dy * (x - mean)
):
    C, pieces = shape[1], _pieces(shape)
    totals = np.empty((C, pieces))
    products = np.empty((C, pieces))
    for task in prange(C * pieces):
        c, piece = task % C, task // C
        totals[c, piece], products[c, piece] = _piece_products(
            dy, x, mask, shape, c, piece, mean[c]
        )
    for c in range(C):
        total[c], product[c] = 0.0, 0.0
        for piece in range(pieces):
            total[c] += totals[c, piece]
            product[c] += products[c, piece]


@kernel
def dx_planes(
    dy,  # [N, C, S]
    x,  # [N, C, S]
    dx,  # [N, C, S], written
    mask,  # bits [N, C, S] or None
    dresidual,  # [N, C, S], written, or None; only beside a mask
    shape,  # N, C, S, 1
    mean,  # [C], as invstd, weight, total and product
    invstd,
    weight,
    total,
    product,
    training,
):
    C = shape[1]
    for task in prange(C * _pieces(shape)):
        c, piece = task % C, task // C
        _dx_piece(
            dy, x, dx, mask, dresidual, shape, c, piece,
            mean[c], invstd[c], weight[c], total[c], product[c], training,
        )  # fmt: skip


@kernel
def backward_planes(
    dy,  # [N, C, S]
    x,  # [N, C, S]
    dx,  # [N, C, S], written
    mask,  # bits [N, C, S] or None
    dresidual,  # [N, C, S], written, or None; only beside a mask
    shape,  # N, C, S, 1
    mean,  # [C], as invstd and weight
    invstd,
    weight,
    total,  # [C], written: the sum of dy
    product,  # [C], written: the sum of dy * (x - mean)
    training,
):
    pieces = _pieces(shape)
    for c in prange(shape[1]):
        channel_total, channel_product = 0.0, 0.0
        for piece in range(pieces):
            part_total, part_product = _piece_products(dy, x, mask, shape, c, piece, mean[c])
            channel_total += part_total
            channel_product += part_product
        total[c], product[c] = channel_total, channel_product
        for piece in range(pieces):
            _dx_piece(
                dy, x, dx, mask, dresidual, shape, c, piece,
                mean[c], invstd[c], weight[c], total[c], product[c], training,
            )  # fmt: skip
