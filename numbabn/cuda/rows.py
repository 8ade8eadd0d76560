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
    index_of,
    loaded_dy_x,
    loaded_x,
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
    lasting,
    load,
    median,
    no_slots,
    passing,
    put,
    quotient,
    shared_lanes,
    slots,
    spread,
    thread,
    total,
    unpack,
    wide,
    width,
    zeros,
)
from .vector import (
    AS_IT_IS,
    Partials,
    Where,
    about_mean,
    affine,
    attempt_for,
    by_lanes,
    column_sum,
    counts,
    fetch_parameters,
    gradient_affine,
    inverse,
    merged_moments,
    merged_products,
    normal,
    put_moments,
    put_products,
    save_moments,
    save_products,
    scale_of,
    set_affine,
    set_given_affine,
    set_gradient_affine,
    set_normal,
    squares,
    staged,
    totals,
    wait_for_all,
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
def _where(x, shape):
    """Where a thread's lanes find what their columns have."""
    return Where(_lane_column(x, shape), 1, width(x))


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
def _plane(shape, index):
    """Which plane a piece is of."""
    return quotient(index, shape.per_plane)


@device
def _row(shape, index):
    """Where in its plane a piece begins."""
    return (index - _plane(shape, index) * shape.per_plane) * shape.places


@device
def _size(shape, index):
    """How many rows a piece has."""
    row = _row(shape, index)
    return np.float64(min(row + shape.places, shape.S) - row)


@device
def _piece(x, shape, group, index):
    row = _row(shape, index)
    s = row + (thread() >> shape.across)
    return Piece(
        True, group * _columns(x, shape) + _lane_column(x, shape), shape.C,
        _plane(shape, index), s, 1, max(min(row + shape.places, shape.S) - s, 0),
        1, shape.below, shape.along,
    )  # fmt: skip


@device
def _shared_column(shape, group, columns, index, turn):
    """Which channel a thread puts together for all of a group's blocks, if there is one."""
    column = index + shape.pieces * (turn + (thread() & ((1 << shape.beside) - 1)))
    c = group * columns + column
    return Partials(c, column < columns and c < shape.C, shape.beside)


# Statistics.


@device
def _anchor(x, shape, group, index):
    """Choose a number of each column that is none of its extremes: of three, the middle one."""
    n, c = _plane(shape, index), group * _columns(x.at, shape) + _lane_column(x.at, shape)
    first = _row(shape, index)
    last = min(first + shape.places, shape.S) - 1
    if c >= shape.C:
        return zeros(x.at)
    a = unpack(load(x.at, index_of(x, n, c, first), lasting()))
    b = unpack(load(x.at, index_of(x, n, c, (first + last) >> 1), lasting()))
    return finite_or_zero(median(a, b, unpack(load(x.at, index_of(x, n, c, last), lasting()))))


@device
def _pivot(x, shape, group, index):
    """Give the anchor of a thread's column."""
    n, c = _plane(shape, index), _channel(x.at, shape, group)
    first = _row(shape, index)
    last = min(first + shape.places, shape.S) - 1
    if c >= shape.C:
        return 0.0
    none = spread(x.at, 0.0)
    a = none + np.float64(get(x.at, index_of(x, n, c, first)))
    b = none + np.float64(get(x.at, index_of(x, n, c, (first + last) >> 1)))
    chosen = median(a, b, none + np.float64(get(x.at, index_of(x, n, c, last))))
    return total(finite_or_zero(chosen)) / np.float64(width(x.at))


@device
def _piece_moments(x, shape, group, index, stage, held, policy):
    """Take mean and M2 of a thread's column of a piece, and hold it."""
    piece, columns = _piece(x.at, shape, group, index), _columns(x.at, shape)
    shift = m2 = 0.0
    wanted = AS_IT_IS  # by the thread's column
    for attempt in range(3):
        scale = scale_of(x.at, attempt)
        anchor = _anchor(x, shape, group, anew(index))  # else its places take registers
        moments, turns = thread_moments(x, piece, shape.rounds, anchor, scale, held, policy)
        far = column_sum(staged(totals(moments, scale), stage), stage, columns)
        near = far / _size(shape, index)
        shifts = by_lanes(x.at, near, stage, columns, _where(x.at, shape))
        around = column_sum(staged(squares(moments, scale, shifts), stage), stage, columns)
        if attempt == wanted and counts(attempt, around):
            shift, m2 = near, around
        # What lies beyond the last channel wants nothing.
        if attempt == AS_IT_IS and _channel(x.at, shape, anew(group)) < shape.C:
            wanted = attempt_for(x.at, m2)
        if not any_of(wanted > attempt):
            break
    return _pivot(x, shape, group, anew(index)) + shift, m2, turns


def statistics_rows(x, parameters, settings, memory, shape):
    """Take statistics of each piece; save them where it is all of its channels."""
    stage = shared_lanes()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        policy = lasting() if task >= shape.lasting else passing()
        mean, m2, _ = _piece_moments(x, shape, group, index, stage, no_slots(), policy)
        if _has_channel(x.at, shape, group):
            c, size = _channel(x.at, shape, group), _size(shape, index)
            if shape.pieces == 1:
                save_moments(c, size, mean, m2, parameters, settings)
            else:
                put_moments(memory, shape, c, index, size, mean, m2)


# Normalize.


@device
def _write_y(maps, settings, shape, group, index, held, stage, reads, writes):
    kind = maps.x.at
    lanes = affine(kind, stage, _where(kind, shape), _columns(kind, shape))
    barrier()
    together = whole_words(kind, maps.mask.at, maps.mask.dc, shape.across)
    piece = _piece(kind, shape, group, index)
    rectify = settings.rectify != 0
    write_normalized(maps, piece, shape.rounds, held, lanes, rectify, together, reads, writes)


def normalize_rows(maps, parameters, settings, shape):
    """Normalize by given statistics: saved ones, or in inference the running ones."""
    stage, kind = shared_lanes(), maps.x.at
    tasks = shape.groups * shape.pieces
    reads, writes = passing(), lasting() if shape.lasting < 0 else passing()
    for turn in range(block(), tasks, blocks()):
        task = turn if shape.lasting < 0 else tasks - 1 - turn
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        held = loaded_x(maps.x, _piece(kind, shape, group, index), no_slots(), reads)
        if _has_channel(kind, shape, group):
            c, step = _channel(kind, shape, group), _columns(kind, shape)
            set_given_affine(kind, c, parameters, settings, stage, thread(), step)
        barrier()
        _write_y(maps, settings, shape, group, index, held, stage, reads, writes)


@device
def _share_moments(x, parameters, settings, memory, shape, group, index, stage):
    """Let each of a group's blocks put together some of its columns, and give all to all."""
    side = 1 << shape.beside
    wait_for_all(memory.counters, 2 * group, shape.pieces)
    for turn in range(0, shape.share, side):
        own = _shared_column(shape, group, _columns(x, shape), index, turn)
        mean, m2 = merged_moments(memory, shape, own, stage)
        if thread() < side and own.valid:
            put(memory.sums, own.c, mean)
            put(memory.sums, shape.C + own.c, m2)
            save_moments(own.c, np.float64(shape.N * shape.S), mean, m2, parameters, settings)
    wait_for_all(memory.counters, 2 * group + 1, shape.pieces)


def forward_rows(maps, parameters, settings, memory, shape):
    """Take statistics and normalize what was held; blocks of a group wait for one another."""
    stage, held = shared_lanes(), slots()
    kind = maps.x.at
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        if _has_channel(kind, shape, group):
            fetch_parameters(_channel(kind, shape, group), parameters)
        mean, m2, turns = _piece_moments(maps.x, shape, group, index, stage, held, passing())
        # Else they take registers while pieces are summed.
        c, there = _channel(kind, shape, anew(group)), _has_channel(kind, shape, anew(group))
        if shape.pieces > 1:
            if there:
                put_moments(memory, shape, c, index, _size(shape, index), mean, m2)
            _share_moments(kind, parameters, settings, memory, shape, group, index, stage)
            if there:
                mean, m2 = get(memory.sums, c), get(memory.sums, shape.C + c)
        count = np.float64(shape.N * shape.S)
        if there:
            step, invstd = _columns(kind, shape), inverse(m2 / count, settings.eps)
            set_affine(kind, c, mean, invstd, parameters, stage, thread(), step)
        barrier()
        if there and shape.pieces == 1:
            save_moments(c, count, mean, m2, parameters, settings)
        _write_y(
            maps, settings, shape, anew(group), anew(index), turns, stage, passing(), lasting()
        )


# Backward.


@device
def _piece_products(maps, gradients, shape, group, index, stage, held, policy):
    """Sum dy, and its product with x, of a thread's column of a piece, and hold it."""
    kind = maps.x.at
    columns = _columns(kind, shape)
    if _has_channel(kind, shape, group):
        set_normal(kind, _channel(kind, shape, group), gradients, stage, thread(), columns)
    barrier()
    lanes = normal(kind, stage, _where(kind, shape), columns)
    barrier()
    piece = _piece(kind, shape, group, index)
    products, turns = thread_products(maps, piece, shape.rounds, lanes, held, policy)
    dy = column_sum(staged(wide(products.dy), stage), stage, columns)
    return dy, column_sum(staged(wide(products.dy_x), stage), stage, columns), turns


def products_rows(maps, gradients, memory, shape):
    """Sum for the gradients by weight and bias, of each piece."""
    stage = shared_lanes()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        policy = lasting() if task >= shape.lasting else passing()
        dy, dy_x, _ = _piece_products(
            maps, gradients, shape, group, index, stage, no_slots(), policy
        )
        if _has_channel(maps.x.at, shape, group):
            put_products(memory, shape, _channel(maps.x.at, shape, group), index, dy, dy_x)


@device
def _write_dx(maps, gradients, training, shape, group, index, dy, dy_x, held, stage, writes):
    """Write dx from the sums of a thread's column."""
    kind = maps.x.at
    columns = _columns(kind, shape)
    if _has_channel(kind, shape, group):
        c, count = _channel(kind, shape, group), np.float64(shape.N * shape.S)
        set_gradient_affine(kind, c, count, dy, dy_x, gradients, stage, thread(), columns)
    barrier()
    lanes = gradient_affine(kind, stage, _where(kind, shape), columns)
    barrier()
    piece = _piece(kind, shape, group, index)
    write_gradient(maps, piece, shape.rounds, held, lanes, training != 0, passing(), writes)


def gradient_rows(maps, gradients, training, memory, shape):
    """Write dx and dresidual from what `products_channels` has put together."""
    stage, kind = shared_lanes(), maps.x.at
    tasks = shape.groups * shape.pieces
    for turn in range(block(), tasks, blocks()):
        task = tasks - 1 - turn
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        held = loaded_dy_x(maps, _piece(kind, shape, group, index), no_slots(), passing())
        dy = dy_x = 0.0
        if _has_channel(kind, shape, group):
            c = _channel(kind, shape, group)
            dy, dy_x = get(memory.sums, c), get(memory.sums, shape.C + c)
        _write_dx(maps, gradients, training, shape, group, index, dy, dy_x, held, stage, passing())


@device
def _share_products(x, gradients, memory, shape, group, index, stage):
    """Let each of a group's blocks put together some of its columns, and give all to all."""
    side = 1 << shape.beside
    wait_for_all(memory.counters, 2 * group, shape.pieces)
    for turn in range(0, shape.share, side):
        own = _shared_column(shape, group, _columns(x, shape), index, turn)
        dy, dy_x = merged_products(memory, shape, own, stage)
        if thread() < side and own.valid:
            dy_x = about_mean(x, own.c, dy, dy_x, gradients)
            put(memory.sums, own.c, dy)
            put(memory.sums, shape.C + own.c, dy_x)
            save_products(own.c, dy, dy_x, gradients)
    wait_for_all(memory.counters, 2 * group + 1, shape.pieces)


def backward_rows(maps, gradients, training, memory, shape):
    """Sum, and write dx from what was held; blocks of a group wait for one another."""
    stage, held = shared_lanes(), slots()
    kind = maps.x.at
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        c, there = _channel(kind, shape, group), _has_channel(kind, shape, group)
        dy, dy_x, turns = _piece_products(
            maps, gradients, shape, group, index, stage, held, passing()
        )
        if shape.pieces > 1:
            if there:
                put_products(memory, shape, c, index, dy, dy_x)
            _share_products(kind, gradients, memory, shape, group, index, stage)
            if there:
                dy, dy_x = get(memory.sums, c), get(memory.sums, shape.C + c)
        elif there:
            dy_x = about_mean(kind, c, dy, dy_x, gradients)
            save_products(c, dy, dy_x, gradients)
        _write_dx(maps, gradients, training, shape, group, index, dy, dy_x, turns, stage, lasting())
