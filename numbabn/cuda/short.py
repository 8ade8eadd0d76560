"""Kernels for short planes: x is ``[N, C, S]`` without a gap, and no plane ends with an access.

A few channels lie side by side, as many as make a whole number of accesses: of float16, eight of
7x7 places are 49. A block takes such a group, its threads side by side along the group's places and
below one another along the planes, so that each lane of a thread stays in its channel; one access
may be of two channels. Pieces are cut along the planes. As of rows, sums and constants share the
stage by turns, and all is held in slots; here, thread t has channel ``t % channels``.
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
    median,
    narrow,
    no_slots,
    passing,
    quotient,
    read,
    shared_lanes,
    slots,
    thread,
    threads,
    total,
    wide,
    width,
    write_lanes,
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
    totals,
    wait_for_all,
)


@device
def _channels(shape):
    """How many channels a group has."""
    return 1 << shape.beside


@device
def _channel(shape, group):
    """Which channel a thread has, to sum it and to compute its constants."""
    return (group << shape.beside) + (thread() & (_channels(shape) - 1))


@device
def _leads(shape):
    """Whether a thread is the first that has its channel."""
    return thread() < _channels(shape)


@device
def _row(shape):
    """Which of its block's planes a thread takes first; those beyond the last ones take none."""
    return quotient(thread(), shape.side)


@device
def _column(x, shape):
    """Where in its group a thread's first lane is."""
    return (thread() - _row(shape) * shape.side) * width(x)


@device
def _where(x, shape):
    """Where a thread's lanes find what their channels have, `channels` numbers in all."""
    column = _column(x, shape)
    first = quotient(column, shape.S)
    return Where(first, 0, (first + 1) * shape.S - column)


@device
def _size(shape, index):
    """How many numbers of each channel a piece has."""
    first = index * shape.planes
    return np.float64((min(first + shape.planes, shape.N) - first) * shape.S)


@device
def _piece(x, shape, group, index):
    row, first = _row(shape), index * shape.planes
    planes = min(first + shape.planes, shape.N) - first - row
    group_size = shape.S << shape.beside
    return Piece(
        True, group * group_size + _column(x, shape), shape.C * shape.S, 0, first + row, 1,
        max(planes, 0) if row < shape.below else 0, 1, shape.below, shape.along,
    )  # fmt: skip


@device
def _channel_sum(lanes, shape, stage):
    """Sum of a number of each lane of a channel, given to all threads that have it."""
    t = thread()
    # Row after row of threads, so that lane k of thread t lies at t * width + k.
    write_lanes(stage, t * width(lanes), 1, lanes)
    barrier()
    value = 0.0
    own, step = t >> shape.beside, threads() >> shape.beside
    for row in range(shape.below):
        first = ((row << shape.beside) + (t & (_channels(shape) - 1))) * shape.S
        for s in range(own, shape.S, step):
            value += read(stage, first + s)
    barrier()
    return column_sum(value, stage, _channels(shape))


# Statistics.


@device
def _pivot(x, shape, group, index):
    """Choose a number of a thread's channel, none of its extremes: of three, the middle one."""
    c, first = _channel(shape, group) * shape.S, index * shape.planes
    last = min(first + shape.planes, shape.N) - 1
    none = zeros(x.at)
    a = none + get(x.at, index_of(x, 0, c, first))
    b = none + get(x.at, index_of(x, 0, c + (shape.S >> 1), (first + last) >> 1))
    chosen = median(a, b, none + get(x.at, index_of(x, 0, c + shape.S - 1, last)))
    return total(wide(finite_or_zero(chosen))) / np.float64(width(x.at))


@device
def _piece_moments(x, shape, group, index, stage, held, policy):
    """Take mean and M2 of a thread's channel of a piece, and hold it."""
    piece, channels = _piece(x.at, shape, group, index), _channels(shape)
    shift = m2 = 0.0
    wanted = AS_IT_IS  # by the thread's channel
    for attempt in range(3):
        scale = scale_of(x.at, attempt)
        pivot = _pivot(x, shape, group, anew(index))
        anchor = narrow(x.at, by_lanes(x.at, pivot, stage, channels, _where(x.at, shape)))
        moments, turns = thread_moments(x, piece, shape.rounds, anchor, scale, held, policy)
        near = _channel_sum(totals(moments, scale), shape, stage) / _size(shape, index)
        shifts = by_lanes(x.at, near, stage, channels, _where(x.at, shape))
        around = _channel_sum(squares(moments, scale, shifts), shape, stage)
        if attempt == wanted and counts(attempt, around):
            shift, m2 = near, around
        if attempt == AS_IT_IS:
            wanted = attempt_for(x.at, m2)
        if not any_of(wanted > attempt):
            break
    return _pivot(x, shape, group, anew(index)) + shift, m2, turns


def statistics_short(x, parameters, settings, memory, shape):
    """Take statistics of each piece; save them where it is all of its channels."""
    stage = shared_lanes()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        policy = lasting() if task >= shape.lasting else passing()
        mean, m2, _ = _piece_moments(x, shape, group, index, stage, no_slots(), policy)
        if _leads(shape):
            c, size = _channel(shape, group), _size(shape, index)
            if shape.pieces == 1:
                save_moments(c, size, mean, m2, parameters, settings)
            else:
                put_moments(memory, shape, c, index, size, mean, m2)


# Normalize.


@device
def _write_y(maps, settings, shape, group, index, held, stage, reads, writes):
    kind = maps.x.at
    lanes = affine(kind, stage, _where(kind, shape), _channels(shape))
    barrier()
    piece = _piece(kind, shape, group, index)
    rectify = settings.rectify != 0
    write_normalized(maps, piece, shape.rounds, held, lanes, rectify, False, reads, writes)


def normalize_short(maps, parameters, settings, shape):
    """Normalize by given statistics: saved ones, or in inference the running ones."""
    stage, kind = shared_lanes(), maps.x.at
    tasks = shape.groups * shape.pieces
    reads, writes = passing(), lasting() if shape.lasting < 0 else passing()
    for turn in range(block(), tasks, blocks()):
        task = turn if shape.lasting < 0 else tasks - 1 - turn
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        held = loaded_x(maps.x, _piece(kind, shape, group, index), no_slots(), reads)
        if _leads(shape):
            c, step = _channel(shape, group), _channels(shape)
            set_given_affine(kind, c, parameters, settings, stage, thread(), step)
        barrier()
        _write_y(maps, settings, shape, group, index, held, stage, reads, writes)


def forward_short(maps, parameters, settings, memory, shape):
    """Take statistics and normalize what was held; blocks of a group wait for one another."""
    stage, held = shared_lanes(), slots()
    kind = maps.x.at
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        if _leads(shape):
            fetch_parameters(_channel(shape, group), parameters)
        mean, m2, turns = _piece_moments(maps.x, shape, group, index, stage, held, passing())
        c = _channel(shape, anew(group))  # else it takes registers while pieces are summed
        if shape.pieces > 1:
            if _leads(shape):
                put_moments(memory, shape, c, index, _size(shape, index), mean, m2)
            wait_for_all(memory.counters, group, shape.pieces)
            mean, m2 = merged_moments(memory, shape, Partials(c, True, shape.beside), stage)
        count = np.float64(shape.N * shape.S)
        if _leads(shape):
            step, invstd = _channels(shape), inverse(m2 / count, settings.eps)
            set_affine(kind, c, mean, invstd, parameters, stage, thread(), step)
        barrier()
        if _leads(shape) and index == 0:
            save_moments(c, count, mean, m2, parameters, settings)
        _write_y(
            maps, settings, shape, anew(group), anew(index), turns, stage, passing(), lasting()
        )


# Backward.


@device
def _piece_products(maps, gradients, shape, group, index, stage, held, policy):
    """Sum dy, and its product with x, of a thread's channel of a piece, and hold it."""
    kind = maps.x.at
    if _leads(shape):
        step = _channels(shape)
        set_normal(kind, _channel(shape, group), gradients, stage, thread(), step)
    barrier()
    lanes = normal(kind, stage, _where(kind, shape), _channels(shape))
    barrier()
    piece = _piece(kind, shape, group, index)
    products, turns = thread_products(maps, piece, shape.rounds, lanes, held, policy)
    dy = _channel_sum(wide(products.dy), shape, stage)
    return dy, _channel_sum(wide(products.dy_x), shape, stage), turns


def products_short(maps, gradients, memory, shape):
    """Sum for the gradients by weight and bias, of each piece."""
    stage = shared_lanes()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        policy = lasting() if task >= shape.lasting else passing()
        dy, dy_x, _ = _piece_products(
            maps, gradients, shape, group, index, stage, no_slots(), policy
        )
        if _leads(shape):
            put_products(memory, shape, _channel(shape, group), index, dy, dy_x)


@device
def _write_dx(maps, gradients, training, shape, group, index, dy, dy_x, held, stage, writes):
    """Write dx from the sums of a thread's channel."""
    kind = maps.x.at
    if _leads(shape):
        c, count = _channel(shape, group), np.float64(shape.N * shape.S)
        step = _channels(shape)
        set_gradient_affine(kind, c, count, dy, dy_x, gradients, stage, thread(), step)
    barrier()
    lanes = gradient_affine(kind, stage, _where(kind, shape), _channels(shape))
    barrier()
    piece = _piece(kind, shape, group, index)
    write_gradient(maps, piece, shape.rounds, held, lanes, training != 0, passing(), writes)


def gradient_short(maps, gradients, training, memory, shape):
    """Write dx and dresidual from what `products_channels` has put together."""
    stage, kind = shared_lanes(), maps.x.at
    tasks = shape.groups * shape.pieces
    for turn in range(block(), tasks, blocks()):
        task = tasks - 1 - turn
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        held = loaded_dy_x(maps, _piece(kind, shape, group, index), no_slots(), passing())
        dy = dy_x = 0.0
        if _leads(shape):
            c = _channel(shape, group)
            dy, dy_x = get(memory.sums, c), get(memory.sums, shape.C + c)
        _write_dx(maps, gradients, training, shape, group, index, dy, dy_x, held, stage, passing())


def backward_short(maps, gradients, training, memory, shape):
    """Sum, and write dx from what was held; blocks of a group wait for one another."""
    stage, held = shared_lanes(), slots()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        index = task - group * shape.pieces
        dy, dy_x, turns = _piece_products(
            maps, gradients, shape, group, index, stage, held, passing()
        )
        c = _channel(shape, anew(group))
        if shape.pieces > 1:
            if _leads(shape):
                put_products(memory, shape, c, index, dy, dy_x)
            wait_for_all(memory.counters, group, shape.pieces)
            dy, dy_x = merged_products(memory, shape, Partials(c, True, shape.beside), stage)
        if _leads(shape):
            dy_x = about_mean(maps.x.at, c, dy, dy_x, gradients)
            if index == 0:
                save_products(c, dy, dy_x, gradients)
        _write_dx(
            maps, gradients, training, shape, anew(group), anew(index), dy, dy_x, turns, stage,
            lasting(),
        )  # fmt: skip
