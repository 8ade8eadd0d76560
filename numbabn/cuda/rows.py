"""Kernels for rows: x is ``[N, S, C]`` in memory, with the channel inside of the places.

Channels are taken in groups of neighbours, the columns of a block, and their rows are cut into
pieces. A block takes a piece of a group at a time; its threads lie side by side along the channels
and below one another along the rows. The sums of a piece, and how those of all pieces are put
together, depend on nothing that `schedule` leaves to the GPU. What is one number of a column is
also taken by columns: there are no more of them than threads, and thread t has column ``t %
columns``.
"""

import numpy as np

from .sweep import (
    Piece,
    Place,
    load_at,
    thread_moments,
    thread_products,
    write_gradient,
    write_normalized,
)
from .target import (
    anew,
    any_of,
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
    shared_lanes,
    spread,
    thread,
    threads,
    total,
    unpack,
    wide,
    width,
)
from .vector import (
    AS_IT_IS,
    affine,
    attempt_for,
    by_lanes,
    column_sum,
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
    staged,
    totals,
    whole_words,
)


@device
def _columns(x, shape):
    """How many channels a group has."""
    return width(x) << shape.across


@device
def _lane_column(x, shape):
    """Which column a thread's first lane is."""
    return (thread() & ((1 << shape.across) - 1)) * width(x)


@device
def _channel(x, shape, group):
    """Which channel a thread's column is; of the last group, it may lie beyond the end."""
    columns = _columns(x, shape)
    return group * columns + (thread() & (columns - 1))


@device
def _has_channel(x, shape, group):
    """Whether a thread is the first that has its column, and that is a channel."""
    return thread() < _columns(x, shape) and _channel(x, shape, group) < shape.C


@device
def _first(shape, index):
    """Where a piece begins."""
    n = quotient(index, shape.per_plane)
    return Place(n, (index - n * shape.per_plane) * shape.places)


@device
def _size(shape, index):
    """How many rows a piece has."""
    first = _first(shape, index).s
    return np.float64(min(first + shape.places, shape.S) - first)


@device
def _piece(x, shape, group, index):
    first = _first(shape, index)
    return Piece(
        True, group * _columns(x, shape) + _lane_column(x, shape), shape.C,
        first.n, first.n + 1, 1,
        first.s + (thread() >> shape.across), min(first.s + shape.places, shape.S), shape.below, 0,
    )  # fmt: skip


@device
def _partial(x, shape, group, index):
    """Where a piece leaves the first of what it sums of a thread's column: [3, pieces, columns]."""
    columns = _columns(x, shape)
    return (index * shape.groups + group) * columns + (thread() & (columns - 1))


@device
def _apart(x, shape):
    """How far from it the next lies."""
    return shape.pieces * shape.groups * _columns(x, shape)


# Statistics.


@device
def _anchor_rows(shape, index):
    """Three rows of a piece."""
    first = _first(shape, index)
    last = min(first.s + shape.places, shape.S) - 1
    return first, Place(first.n, (first.s + last) >> 1), Place(first.n, last)


@device
def _anchor(x, shape, piece, index):
    """Choose a number of each column that is none of its extremes: of three, the middle one."""
    p, q, r = _anchor_rows(shape, index)
    there = piece.c < piece.c_end
    a, b = unpack(load_at(x, piece, p, there)), unpack(load_at(x, piece, q, there))
    return finite_or_zero(median(a, b, unpack(load_at(x, piece, r, there))))


@device
def _pivot(x, shape, group, index):
    """Give the anchor of a thread's column."""
    p, q, r = _anchor_rows(shape, index)
    c = _channel(x.at, shape, group)
    if c >= shape.C:
        return 0.0
    first = p.n * x.dn + c * x.dc
    none = spread(x.at, 0.0)
    a = none + np.float64(get(x.at, first + p.s * x.ds))
    b = none + np.float64(get(x.at, first + q.s * x.ds))
    chosen = median(a, b, none + np.float64(get(x.at, first + r.s * x.ds)))
    return total(finite_or_zero(chosen)) / np.float64(width(x.at))


@device
def _piece_moments(x, shape, group, index, stage):
    """Take mean and M2 of a thread's column of a piece."""
    piece, columns = _piece(x.at, shape, group, index), _columns(x.at, shape)
    shift = m2 = 0.0
    wanted = AS_IT_IS  # by the thread's column
    for attempt in range(3):
        scale = scale_of(x.at, attempt)
        anchor = _anchor(x, shape, piece, anew(index))  # else its places take registers
        held = thread_moments(x, piece, shape.rounds, anchor, scale)
        far = column_sum(staged(totals(held, scale), stage), stage, columns)
        near = far / _size(shape, index)
        shifts = by_lanes(x.at, near, stage, columns, _lane_column(x.at, shape))
        around = column_sum(staged(squares(held, scale, shifts), stage), stage, columns)
        if attempt == wanted and counts(attempt, around):
            shift, m2 = near, around
        if attempt == AS_IT_IS:
            wanted = attempt_for(x.at, m2)
        if not any_of(wanted > attempt):
            break
    return _pivot(x, shape, group, index) + shift, m2


@device
def _sum_moments(x, memory, shape, group, index, stage):
    """Put count, mean and M2 of a piece's columns where those of their channels are."""
    mean, m2 = _piece_moments(x, shape, group, index, stage)
    if thread() < _columns(x.at, shape):
        at, apart = _partial(x.at, shape, group, index), _apart(x.at, shape)
        put(memory.partials, at, _size(shape, index))
        put(memory.partials, at + apart, mean)
        put(memory.partials, at + 2 * apart, m2)


@device
def _finish_statistics(x, memory, parameters, settings, shape, group, stage):
    """Put the moments of a group's pieces together; save those of its channels."""
    columns, apart, partials = _columns(x, shape), _apart(x, shape), memory.partials
    part, parts = quotient(thread(), columns), quotient(threads(), columns)
    pivot = get(partials, _partial(x, shape, group, 0) + apart)
    pivot = pivot if pivot - pivot == 0.0 else 0.0
    far = 0.0
    for index in range(part, shape.pieces, parts):
        at = _partial(x, shape, group, index)
        far += (get(partials, at + apart) - pivot) * get(partials, at)
    count = np.float64(shape.N * shape.S)
    mean = pivot + column_sum(far, stage, columns) / count
    m2 = 0.0
    for index in range(part, shape.pieces, parts):
        at = _partial(x, shape, group, index)
        off = get(partials, at + apart) - mean
        m2 += get(partials, at + 2 * apart) + off * off * get(partials, at)
    m2 = column_sum(m2, stage, columns)
    if _has_channel(x, shape, group):
        finish_moments(_channel(x, shape, group), count, mean, m2, parameters, settings)


def statistics_rows(x, parameters, settings, memory, shape):
    """Take statistics, a block for each piece; the last one of a group puts them together."""
    stage = shared_lanes()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        _sum_moments(x, memory, shape, group, task - group * shape.pieces, stage)
        if is_last(memory.counters, group, shape.pieces, stage):
            _finish_statistics(x.at, memory, parameters, settings, shape, group, stage)


# Normalize.


@device
def _normalize_piece(maps, parameters, settings, shape, group, index, constants):
    kind = maps.x.at
    columns = _columns(kind, shape)
    barrier()
    if _has_channel(kind, shape, group):
        c = _channel(kind, shape, group)
        set_affine(kind, c, parameters, settings, constants, thread(), columns)
    barrier()
    lanes = affine(kind, constants, _lane_column(kind, shape), 1, columns)
    together = whole_words(kind, maps.mask.at, maps.mask.dc, shape.across)
    piece = _piece(kind, shape, group, index)
    write_normalized(maps, piece, shape.rounds, lanes, settings.rectify != 0, together)


def normalize_rows(maps, parameters, settings, shape):
    """Normalize by given statistics: saved ones, or in inference the running ones."""
    constants = shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        _normalize_piece(maps, parameters, settings, shape, group, index, constants)


def forward_rows(maps, parameters, settings, shape):
    """Take statistics and normalize, a block for each group of channels, which is one piece."""
    stage, constants = shared_lanes(), shared_constants()
    kind = maps.x.at
    for group in range(block(), shape.groups, blocks()):
        mean, m2 = _piece_moments(maps.x, shape, group, 0, stage)
        if _has_channel(kind, shape, group):
            c = _channel(kind, shape, group)
            finish_moments(c, _size(shape, 0), mean, m2, parameters, settings)
        _normalize_piece(maps, parameters, settings, shape, group, 0, constants)


# Backward.


@device
def _piece_products(maps, gradients, shape, group, index, stage, constants):
    """Sum dy, and its product with x, of a thread's column of a piece."""
    kind = maps.x.at
    columns = _columns(kind, shape)
    barrier()
    if _has_channel(kind, shape, group):
        set_normal(kind, _channel(kind, shape, group), gradients, constants, thread(), columns)
    barrier()
    lanes = normal(kind, constants, _lane_column(kind, shape), 1, columns)
    piece = _piece(kind, shape, group, index)
    held = thread_products(maps, piece, shape.rounds, lanes)
    dy = column_sum(staged(wide(held.dy), stage), stage, columns)
    return dy, column_sum(staged(wide(held.dy_x), stage), stage, columns)


@device
def _sum_products(maps, gradients, memory, shape, group, index, stage, constants):
    """Put the products of a piece's columns where those of their channels are."""
    kind = maps.x.at
    dy, dy_x = _piece_products(maps, gradients, shape, group, index, stage, constants)
    if thread() < _columns(kind, shape):
        at = _partial(kind, shape, group, index)
        put(memory.partials, at, dy)
        put(memory.partials, at + _apart(kind, shape), dy_x)


@device
def _finish_products(x, memory, gradients, shape, group, stage):
    """Put the products of a group's pieces together; save those of its channels."""
    columns, apart = _columns(x, shape), _apart(x, shape)
    dy = dy_x = 0.0
    for index in range(quotient(thread(), columns), shape.pieces, quotient(threads(), columns)):
        at = _partial(x, shape, group, index)
        dy += get(memory.partials, at)
        dy_x += get(memory.partials, at + apart)
    dy, dy_x = column_sum(dy, stage, columns), column_sum(dy_x, stage, columns)
    if _has_channel(x, shape, group):
        c = _channel(x, shape, group)
        finish_products(x, c, dy, dy_x, gradients, memory.sums, shape.C)


def products_rows(maps, gradients, memory, shape):
    """Sum for the gradients by weight and bias, a block for each piece, as for statistics."""
    stage, constants = shared_lanes(), shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        _sum_products(maps, gradients, memory, shape, group, index, stage, constants)
        if is_last(memory.counters, group, shape.pieces, stage):
            _finish_products(maps.x.at, memory, gradients, shape, group, stage)


@device
def _gradient_piece(maps, gradients, training, memory, shape, group, index, constants):
    kind = maps.x.at
    columns = _columns(kind, shape)
    barrier()
    if _has_channel(kind, shape, group):
        c, count = _channel(kind, shape, group), np.float64(shape.N * shape.S)
        set_gradient_affine(
            kind, c, count, gradients, memory.sums, shape.C, constants, thread(), columns
        )
    barrier()
    lanes = gradient_affine(kind, constants, _lane_column(kind, shape), 1, columns)
    piece = _piece(kind, shape, group, index)
    write_gradient(maps, piece, shape.rounds, lanes, training != 0)


def gradient_rows(maps, gradients, training, memory, shape):
    """Write dx and dresidual from what `products_rows` has summed."""
    constants = shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        _gradient_piece(maps, gradients, training, memory, shape, group, index, constants)


def backward_rows(maps, gradients, training, memory, shape):
    """Sum and write dx, a block for each group of channels, which is one piece."""
    stage, constants = shared_lanes(), shared_constants()
    kind = maps.x.at
    for group in range(block(), shape.groups, blocks()):
        dy, dy_x = _piece_products(maps, gradients, shape, group, 0, stage, constants)
        if _has_channel(kind, shape, group):
            c = _channel(kind, shape, group)
            finish_products(kind, c, dy, dy_x, gradients, memory.sums, shape.C)
        _gradient_piece(maps, gradients, training, memory, shape, group, 0, constants)
