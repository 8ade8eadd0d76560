"""Kernels for rows: x is ``[N, S, C]`` in memory, with the channel inside of the places.

Channels are taken in groups of neighbours, as many as lie side by side in a block, and their rows
are cut into pieces. A block takes a piece of a group at a time: its threads lie side by side along
the channels and below one another along the rows. The sums of a piece, and how those of all pieces
are put together, depend on the shape alone.
"""

from typing import Any, NamedTuple

import numpy as np

from .target import (
    any_of,
    barrier,
    block,
    blocks,
    device,
    every_bit,
    finite_or_zero,
    get,
    get_bits,
    keep_where,
    load,
    nothing,
    present,
    put,
    quotient,
    shared_constants,
    shared_lanes,
    store,
    thread,
    threads,
    unpack,
    wide,
    width,
    zeros,
)
from .vector import (
    AS_IT_IS,
    Products,
    absorb,
    affine,
    attempt_for,
    by_lanes,
    column_sum,
    finish_moments,
    finish_products,
    gradient,
    gradient_affine,
    is_last,
    multiply,
    no_moments,
    normal,
    normalized,
    scale_of,
    set_affine,
    set_gradient_affine,
    set_normal,
    squares,
    staged,
    totals,
    whole_words,
    write_bits,
)


class Piece(NamedTuple):
    """Rows of a group of channels, as a thread sees them."""

    c: Any  # first channel of the thread
    c_end: Any
    n: Any
    first: Any  # row of the piece
    row: Any  # first row of the thread
    end: Any
    step: Any
    column: Any  # of the thread's first channel, within the group
    columns: Any  # of the group


@device
def _size(shape, index):
    """How many rows a piece has."""
    first = (index - quotient(index, shape.per_plane) * shape.per_plane) * shape.places
    return np.float64(min(first + shape.places, shape.S) - first)


@device
def _piece(x, shape, group, index):
    t = thread()
    columns = width(x) << shape.across
    column = (t & ((1 << shape.across) - 1)) * width(x)
    n = quotient(index, shape.per_plane)
    first = (index - n * shape.per_plane) * shape.places
    return Piece(
        group * columns + column, shape.C, n, first, first + (t >> shape.across),
        min(first + shape.places, shape.S), shape.below, column, columns,
    )  # fmt: skip


@device
def _inside(piece, row):
    return piece.c < piece.c_end and row < piece.end


@device
def _index(a, piece, row):
    return piece.n * a.dn + piece.c * a.dc + row * a.ds


@device
def _load(a, piece, row, inside):
    """Load the numbers of a row; none if it lies outside, or there is no such array."""
    if inside and present(a.at):
        return load(a.at, _index(a, piece, row))
    return nothing(a.at)


@device
def _partial(x, shape, group, index):
    """Where a piece leaves the first of what it sums of a thread's column: [3, pieces, columns]."""
    columns = width(x) << shape.across
    return (index * shape.groups + group) * columns + (thread() & (columns - 1))


@device
def _stride(x, shape):
    """How far from it the next lies."""
    return shape.pieces * shape.groups * (width(x) << shape.across)


# Statistics.


@device
def _thread_moments(x, shape, piece, anchor, scale):
    """Moments of what a thread takes of a piece."""
    held = no_moments(x.at, anchor, scale)
    a = piece.row
    for _ in range(0, shape.rounds, 4):
        b, c, d = a + piece.step, a + 2 * piece.step, a + 3 * piece.step
        has_a, has_b = _inside(piece, a), _inside(piece, b)
        has_c, has_d = _inside(piece, c), _inside(piece, d)
        x_a, x_b = _load(x, piece, a, has_a), _load(x, piece, b, has_b)
        x_c, x_d = _load(x, piece, c, has_c), _load(x, piece, d, has_d)
        if has_a:
            held = absorb(x.at, held, unpack(x_a), scale)
        if has_b:
            held = absorb(x.at, held, unpack(x_b), scale)
        if has_c:
            held = absorb(x.at, held, unpack(x_c), scale)
        if has_d:
            held = absorb(x.at, held, unpack(x_d), scale)
        a = d + piece.step
    return held


@device
def _piece_moments(x, shape, group, index, stage):
    """Take mean and M2 of a thread's column of a piece."""
    piece = _piece(x.at, shape, group, index)
    shift = m2 = 0.0
    wanted = AS_IT_IS  # by the thread's column
    for attempt in range(3):
        scale = scale_of(x.at, attempt)
        first = _load(x, piece, piece.first, piece.c < piece.c_end)
        held = _thread_moments(x, shape, piece, finite_or_zero(unpack(first)), scale)
        far = staged(totals(held, scale), stage)
        near = column_sum(far, stage, piece.columns) / _size(shape, index)
        shifts = by_lanes(x.at, near, stage, piece.columns, piece.column)
        around = column_sum(staged(squares(held, scale, shifts), stage), stage, piece.columns)
        if attempt == wanted:
            shift, m2 = near, around
        if attempt == AS_IT_IS:
            wanted = attempt_for(x.at, m2)
        if not any_of(wanted > attempt):
            break
    c = group * piece.columns + (thread() & (piece.columns - 1))
    anchor = 0.0
    if c < shape.C:
        at = piece.n * x.dn + c * x.dc + piece.first * x.ds
        anchor = np.float64(get(x.at, at))
    return (anchor if anchor - anchor == 0.0 else 0.0) + shift, m2


@device
def _sum_moments(x, memory, shape, group, index, stage):
    """Put the moments of a piece's columns where those of their channels are."""
    mean, m2 = _piece_moments(x, shape, group, index, stage)
    if thread() < width(x.at) << shape.across:
        at, step = _partial(x.at, shape, group, index), _stride(x.at, shape)
        put(memory.partials, at, _size(shape, index))
        put(memory.partials, at + step, mean)
        put(memory.partials, at + 2 * step, m2)


@device
def _finish_statistics(x, memory, parameters, settings, shape, group, stage):
    """Put the moments of a group's pieces together; save those of its channels."""
    columns = width(x) << shape.across
    column, part = thread() & (columns - 1), quotient(thread(), columns)
    step, parts = _stride(x, shape), quotient(threads(), columns)
    pivot = get(memory.partials, _partial(x, shape, group, 0) + step)
    pivot = pivot if pivot - pivot == 0.0 else 0.0
    far = 0.0
    for index in range(part, shape.pieces, parts):
        at = _partial(x, shape, group, index)
        far += (get(memory.partials, at + step) - pivot) * get(memory.partials, at)
    count = np.float64(shape.N * shape.S)
    mean = pivot + column_sum(far, stage, columns) / count
    m2 = 0.0
    for index in range(part, shape.pieces, parts):
        at = _partial(x, shape, group, index)
        off = get(memory.partials, at + step) - mean
        m2 += get(memory.partials, at + 2 * step) + off * off * get(memory.partials, at)
    m2 = column_sum(m2, stage, columns)
    c = group * columns + column
    if part == 0 and c < shape.C:
        finish_moments(c, count, mean, m2, parameters, settings)


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
def _normalize_row(maps, piece, row, has, x, residual, constants, settings, together):
    y = normalized(unpack(x), unpack(residual), constants, settings.rectify != 0)
    if has:
        store(maps.y.at, _index(maps.y, piece, row), y)
    if present(maps.mask.at):
        write_bits(
            maps.y.at, maps.mask.at, _index(maps.mask, piece, row), y, has,
            piece.c, piece.c_end, together,
        )  # fmt: skip


@device
def _normalize_piece(maps, parameters, settings, shape, group, index, memory):
    kind = maps.x.at
    piece = _piece(kind, shape, group, index)
    barrier()
    for column in range(thread(), piece.columns, threads()):
        if group * piece.columns + column < shape.C:
            c = group * piece.columns + column
            set_affine(kind, c, parameters, settings, memory, column, piece.columns)
    barrier()
    constants = affine(kind, memory, piece.column, 1, piece.columns)
    together = whole_words(kind, maps.mask.at, maps.mask.dc, shape.across)
    a = piece.row
    for _ in range(0, shape.rounds, 4):
        b, c, d = a + piece.step, a + 2 * piece.step, a + 3 * piece.step
        has_a, has_b = _inside(piece, a), _inside(piece, b)
        has_c, has_d = _inside(piece, c), _inside(piece, d)
        x_a = _load(maps.x, piece, a, has_a)
        x_b = _load(maps.x, piece, b, has_b)
        x_c = _load(maps.x, piece, c, has_c)
        x_d = _load(maps.x, piece, d, has_d)
        r_a = _load(maps.residual, piece, a, has_a)
        r_b = _load(maps.residual, piece, b, has_b)
        r_c = _load(maps.residual, piece, c, has_c)
        r_d = _load(maps.residual, piece, d, has_d)
        _normalize_row(maps, piece, a, has_a, x_a, r_a, constants, settings, together)
        _normalize_row(maps, piece, b, has_b, x_b, r_b, constants, settings, together)
        _normalize_row(maps, piece, c, has_c, x_c, r_c, constants, settings, together)
        _normalize_row(maps, piece, d, has_d, x_d, r_d, constants, settings, together)
        a = d + piece.step


def normalize_rows(maps, parameters, settings, shape):
    """Normalize by given statistics: saved ones, or in inference the running ones."""
    memory = shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        _normalize_piece(maps, parameters, settings, shape, group, index, memory)


def forward_rows(maps, parameters, settings, shape):
    """Take statistics and normalize, a block for each group of channels, which is one piece."""
    stage, constants = shared_lanes(), shared_constants()
    for group in range(block(), shape.groups, blocks()):
        mean, m2 = _piece_moments(maps.x, shape, group, 0, stage)
        columns = width(maps.x.at) << shape.across
        c = group * columns + thread()
        if thread() < columns and c < shape.C:
            finish_moments(c, _size(shape, 0), mean, m2, parameters, settings)
        _normalize_piece(maps, parameters, settings, shape, group, 0, constants)


# Backward.


@device
def _passed(maps, piece, row, inside):
    """Load the bits of a row; all are set if there is no mask."""
    if inside and present(maps.mask.at):
        return get_bits(maps.mask.at, _index(maps.mask, piece, row))
    return every_bit()


@device
def _thread_products(maps, shape, piece, constants):
    """Sum what a thread takes of a piece; what lies outside of it is 0."""
    kind = maps.x.at
    held = Products(zeros(kind), zeros(kind))
    a = piece.row
    for _ in range(0, shape.rounds, 4):
        b, c, d = a + piece.step, a + 2 * piece.step, a + 3 * piece.step
        has_a, has_b = _inside(piece, a), _inside(piece, b)
        has_c, has_d = _inside(piece, c), _inside(piece, d)
        x_a = _load(maps.x, piece, a, has_a)
        x_b = _load(maps.x, piece, b, has_b)
        x_c = _load(maps.x, piece, c, has_c)
        x_d = _load(maps.x, piece, d, has_d)
        dy_a, bits_a = _load(maps.dy, piece, a, has_a), _passed(maps, piece, a, has_a)
        dy_b, bits_b = _load(maps.dy, piece, b, has_b), _passed(maps, piece, b, has_b)
        dy_c, bits_c = _load(maps.dy, piece, c, has_c), _passed(maps, piece, c, has_c)
        dy_d, bits_d = _load(maps.dy, piece, d, has_d), _passed(maps, piece, d, has_d)
        held = multiply(held, dy_a, bits_a, x_a, constants, has_a)
        held = multiply(held, dy_b, bits_b, x_b, constants, has_b)
        held = multiply(held, dy_c, bits_c, x_c, constants, has_c)
        held = multiply(held, dy_d, bits_d, x_d, constants, has_d)
        a = d + piece.step
    return held


@device
def _piece_products(maps, gradients, shape, group, index, stage, constants):
    """Sum dy and its products of a thread's column of a piece."""
    kind = maps.x.at
    piece = _piece(kind, shape, group, index)
    barrier()
    for column in range(thread(), piece.columns, threads()):
        if group * piece.columns + column < shape.C:
            c = group * piece.columns + column
            set_normal(kind, c, gradients, constants, column, piece.columns)
    barrier()
    held = _thread_products(
        maps, shape, piece, normal(kind, constants, piece.column, 1, piece.columns)
    )
    dy = column_sum(staged(wide(held.dy), stage), stage, piece.columns)
    return dy, column_sum(staged(wide(held.dy_x), stage), stage, piece.columns)


@device
def _sum_products(maps, gradients, memory, shape, group, index, stage, constants):
    """Put the products of a piece's columns where those of their channels are."""
    dy, dy_x = _piece_products(maps, gradients, shape, group, index, stage, constants)
    kind = maps.x.at
    if thread() < width(kind) << shape.across:
        at = _partial(kind, shape, group, index)
        put(memory.partials, at, dy)
        put(memory.partials, at + _stride(kind, shape), dy_x)


@device
def _finish_products(x, memory, gradients, shape, group, stage):
    """Put the products of a group's pieces together; save those of its channels."""
    columns = width(x) << shape.across
    column, part = thread() & (columns - 1), quotient(thread(), columns)
    step, parts = _stride(x, shape), quotient(threads(), columns)
    dy = dy_x = 0.0
    for index in range(part, shape.pieces, parts):
        at = _partial(x, shape, group, index)
        dy += get(memory.partials, at)
        dy_x += get(memory.partials, at + step)
    dy = column_sum(dy, stage, columns)
    dy_x = column_sum(dy_x, stage, columns)
    c = group * columns + column
    if part == 0 and c < shape.C:
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
def _gradient_row(maps, piece, row, has, x, dy, bits, constants, training):
    if has:
        dy = keep_where(bits, unpack(dy))
        dx = gradient(dy, unpack(x), constants) if training != 0 else dy * constants.scale
        store(maps.dx.at, _index(maps.dx, piece, row), dx)
        if present(maps.dresidual.at):
            store(maps.dresidual.at, _index(maps.dresidual, piece, row), dy)


@device
def _gradient_piece(maps, gradients, training, memory, shape, group, index, columns):
    kind = maps.x.at
    piece = _piece(kind, shape, group, index)
    barrier()
    for column in range(thread(), piece.columns, threads()):
        if group * piece.columns + column < shape.C:
            c = group * piece.columns + column
            count = np.float64(shape.N * shape.S)
            set_gradient_affine(
                kind, c, count, gradients, memory.sums, shape.C, columns, column, piece.columns
            )
    barrier()
    constants = gradient_affine(kind, columns, piece.column, 1, piece.columns)
    a = piece.row
    for _ in range(0, shape.rounds, 4):
        b, c, d = a + piece.step, a + 2 * piece.step, a + 3 * piece.step
        has_a, has_b = _inside(piece, a), _inside(piece, b)
        has_c, has_d = _inside(piece, c), _inside(piece, d)
        x_a = _load(maps.x, piece, a, has_a)
        x_b = _load(maps.x, piece, b, has_b)
        x_c = _load(maps.x, piece, c, has_c)
        x_d = _load(maps.x, piece, d, has_d)
        dy_a, bits_a = _load(maps.dy, piece, a, has_a), _passed(maps, piece, a, has_a)
        dy_b, bits_b = _load(maps.dy, piece, b, has_b), _passed(maps, piece, b, has_b)
        dy_c, bits_c = _load(maps.dy, piece, c, has_c), _passed(maps, piece, c, has_c)
        dy_d, bits_d = _load(maps.dy, piece, d, has_d), _passed(maps, piece, d, has_d)
        _gradient_row(maps, piece, a, has_a, x_a, dy_a, bits_a, constants, training)
        _gradient_row(maps, piece, b, has_b, x_b, dy_b, bits_b, constants, training)
        _gradient_row(maps, piece, c, has_c, x_c, dy_c, bits_c, constants, training)
        _gradient_row(maps, piece, d, has_d, x_d, dy_d, bits_d, constants, training)
        a = d + piece.step


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
        columns = width(kind) << shape.across
        c = group * columns + thread()
        if thread() < columns and c < shape.C:
            finish_products(kind, c, dy, dy_x, gradients, memory.sums, shape.C)
        _gradient_piece(maps, gradients, training, memory, shape, group, 0, constants)
