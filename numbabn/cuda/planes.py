"""Kernels for planes: x is ``[N, C, S]``, with the channel outside of the places.

A channel is cut into pieces: some planes, or some places of one. A block takes a piece at a time;
its threads lie side by side along the places, and below one another along the planes. The sums of
a piece, and how those of all pieces are put together, depend on nothing that `schedule` leaves to
the GPU.
"""

import numpy as np

from .sweep import (
    Piece,
    Place,
    index_of,
    thread_moments,
    thread_products,
    write_gradient,
    write_normalized,
)
from .target import (
    barrier,
    block,
    blocks,
    device,
    finite_or_zero,
    get,
    median,
    put,
    quotient,
    shared_constants,
    shared_sums,
    spread,
    thread,
    threads,
    total,
    wide,
    width,
    zeros,
)
from .vector import (
    AS_IT_IS,
    affine,
    attempt_for,
    block_sum,
    counts,
    finish_moments,
    finish_products,
    gradient_affine,
    is_last,
    normal,
    scale_of,
    set_affine,
    set_gradient_affine,
    set_normal,
    squares,
    totals,
    whole_words,
)


@device
def _corner(shape, piece):
    """First plane and place of a piece of any channel."""
    plane = quotient(piece, shape.per_plane)
    return Place(plane * shape.planes, (piece - plane * shape.per_plane) * shape.places)


@device
def _size(shape, piece):
    """How many numbers a piece has."""
    first = _corner(shape, piece)
    n_end, s_end = min(first.n + shape.planes, shape.N), min(first.s + shape.places, shape.S)
    return np.float64((n_end - first.n) * (s_end - first.s))


@device
def _piece(x, shape, c, piece):
    first = _corner(shape, piece)
    t = thread()
    side = t & ((1 << shape.across) - 1)
    s_end = min(first.s + shape.places, shape.S)
    return Piece(
        False, c, shape.C,
        first.n + (t >> shape.across), min(first.n + shape.planes, shape.N), shape.below,
        first.s + side * width(x), s_end, width(x) << shape.across, s_end + side * width(x),
    )  # fmt: skip


# Statistics.


@device
def _anchor(x, piece, first):
    """Choose a number that is none of the piece's extremes: of three, the middle one."""
    last = Place(min(first.n + piece.n_step, piece.n_end) - 1, piece.s_end - 1)
    middle = Place((first.n + last.n) >> 1, (first.s + last.s) >> 1)
    a, b = get(x.at, index_of(x, piece, first)), get(x.at, index_of(x, piece, middle))
    c = get(x.at, index_of(x, piece, last))
    none = zeros(x.at)
    return finite_or_zero(median(none + a, none + b, none + c))


@device
def _piece_moments(x, shape, c, index, sums):
    """Take mean and M2 of a piece, known to every thread."""
    piece = _piece(x.at, shape, c, index)
    anchor = _anchor(x, piece, _corner(shape, index))
    size = _size(shape, index)
    shift = m2 = 0.0
    attempt = AS_IT_IS
    for _ in range(2):
        scale = scale_of(x.at, attempt)
        held = thread_moments(x, piece, shape.rounds, anchor, scale)
        near = block_sum(total(totals(held, scale)), sums) / size
        around = block_sum(total(squares(held, scale, spread(x.at, near))), sums)
        if counts(attempt, around):
            shift, m2 = near, around
        attempt = attempt_for(x.at, m2)
        if attempt == AS_IT_IS:
            break
    return total(wide(anchor)) / np.float64(width(x.at)) + shift, m2


@device
def _sum_moments(x, memory, shape, c, index, sums):
    """Put a piece's count, mean and M2 where its channel's are: [3, C, pieces]."""
    mean, m2 = _piece_moments(x, shape, c, index, sums)
    if thread() == 0:
        at, half = c * shape.pieces + index, shape.C * shape.pieces
        put(memory.partials, at, _size(shape, index))
        put(memory.partials, at + half, mean)
        put(memory.partials, at + 2 * half, m2)


@device
def _finish_statistics(memory, parameters, settings, shape, c, sums):
    """Put the moments of a channel's pieces together; save the channel's."""
    first, end, half = c * shape.pieces, (c + 1) * shape.pieces, shape.C * shape.pieces
    pivot = get(memory.partials, first + half)
    pivot = pivot if pivot - pivot == 0.0 else 0.0
    far = 0.0
    for at in range(first + thread(), end, threads()):
        far += (get(memory.partials, at + half) - pivot) * get(memory.partials, at)
    count = np.float64(shape.N * shape.S)
    mean = pivot + block_sum(far, sums) / count
    m2 = 0.0
    for at in range(first + thread(), end, threads()):
        off = get(memory.partials, at + half) - mean
        m2 += get(memory.partials, at + 2 * half) + off * off * get(memory.partials, at)
    m2 = block_sum(m2, sums)
    if thread() == 0:
        finish_moments(c, count, mean, m2, parameters, settings)


def statistics_planes(x, parameters, settings, memory, shape):
    """Take statistics, a block for each piece; the last one of a channel puts them together."""
    sums = shared_sums()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        c = quotient(task, shape.pieces)
        _sum_moments(x, memory, shape, c, task - c * shape.pieces, sums)
        if is_last(memory.counters, c, shape.pieces, sums):
            _finish_statistics(memory, parameters, settings, shape, c, sums)


# Normalize.


@device
def _normalize_piece(maps, parameters, settings, shape, c, index, constants):
    kind = maps.x.at
    piece = _piece(kind, shape, c, index)
    barrier()
    if thread() == 0:
        set_affine(kind, c, parameters, settings, constants, 0, 1)
    barrier()
    lanes = affine(kind, constants, 0, 0, 1)
    together = whole_words(kind, maps.mask.at, maps.mask.ds, shape.across)
    write_normalized(maps, piece, shape.rounds, lanes, settings.rectify != 0, together)


def normalize_planes(maps, parameters, settings, shape):
    """Normalize by given statistics: saved ones, or in inference the running ones."""
    constants = shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        c = quotient(task, shape.pieces)
        _normalize_piece(maps, parameters, settings, shape, c, task - c * shape.pieces, constants)


def forward_planes(maps, parameters, settings, shape):
    """Take statistics and normalize, a block for each channel, which is one piece."""
    sums, constants = shared_sums(), shared_constants()
    for c in range(block(), shape.groups, blocks()):
        mean, m2 = _piece_moments(maps.x, shape, c, 0, sums)
        if thread() == 0:
            finish_moments(c, _size(shape, 0), mean, m2, parameters, settings)
        _normalize_piece(maps, parameters, settings, shape, c, 0, constants)


# Backward.


@device
def _piece_products(maps, gradients, shape, c, index, sums, constants):
    """Sum dy and its products of a piece, known to every thread."""
    piece = _piece(maps.x.at, shape, c, index)
    barrier()
    if thread() == 0:
        set_normal(maps.x.at, piece.c, gradients, constants, 0, 1)
    barrier()
    held = thread_products(maps, piece, shape.rounds, normal(maps.x.at, constants, 0, 0, 1))
    dy = block_sum(total(wide(held.dy)), sums)
    return dy, block_sum(total(wide(held.dy_x)), sums)


@device
def _sum_products(maps, gradients, memory, shape, c, index, sums, constants):
    """Put a piece's products where its channel's are: [2, C, pieces]."""
    dy, dy_x = _piece_products(maps, gradients, shape, c, index, sums, constants)
    if thread() == 0:
        at = c * shape.pieces + index
        put(memory.partials, at, dy)
        put(memory.partials, at + shape.C * shape.pieces, dy_x)


@device
def _finish_products(kind, memory, gradients, shape, c, sums):
    """Put the products of a channel's pieces together; save the channel's."""
    first, half = c * shape.pieces, shape.C * shape.pieces
    dy = dy_x = 0.0
    for piece in range(thread(), shape.pieces, threads()):
        dy += get(memory.partials, first + piece)
        dy_x += get(memory.partials, half + first + piece)
    dy, dy_x = block_sum(dy, sums), block_sum(dy_x, sums)
    if thread() == 0:
        finish_products(kind, c, dy, dy_x, gradients, memory.sums, shape.C)


def products_planes(maps, gradients, memory, shape):
    """Sum for the gradients by weight and bias, a block for each piece, as for statistics."""
    sums, constants = shared_sums(), shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        c = quotient(task, shape.pieces)
        _sum_products(maps, gradients, memory, shape, c, task - c * shape.pieces, sums, constants)
        if is_last(memory.counters, c, shape.pieces, sums):
            _finish_products(maps.x.at, memory, gradients, shape, c, sums)


@device
def _gradient_piece(maps, gradients, training, memory, shape, c, index, constants):
    kind = maps.x.at
    piece = _piece(kind, shape, c, index)
    barrier()
    if thread() == 0:
        count = np.float64(shape.N * shape.S)
        set_gradient_affine(kind, piece.c, count, gradients, memory.sums, shape.C, constants, 0, 1)
    barrier()
    lanes = gradient_affine(kind, constants, 0, 0, 1)
    write_gradient(maps, piece, shape.rounds, lanes, training != 0)


def gradient_planes(maps, gradients, training, memory, shape):
    """Write dx and dresidual from what `products_planes` has summed."""
    constants = shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        c = quotient(task, shape.pieces)
        piece = task - c * shape.pieces
        _gradient_piece(maps, gradients, training, memory, shape, c, piece, constants)


def backward_planes(maps, gradients, training, memory, shape):
    """Sum and write dx, a block for each channel, which is one piece."""
    sums, constants = shared_sums(), shared_constants()
    for c in range(block(), shape.groups, blocks()):
        dy, dy_x = _piece_products(maps, gradients, shape, c, 0, sums, constants)
        if thread() == 0:
            finish_products(maps.x.at, c, dy, dy_x, gradients, memory.sums, shape.C)
        _gradient_piece(maps, gradients, training, memory, shape, c, 0, constants)
