"""Kernels for planes: x is ``[N, C, S]``, with the channel outside of the places.

A channel is cut into pieces: some planes, or some places of one. A crew takes a piece at a time,
which is all threads of a block, or a warp where a channel has no more for it; they lie side by side
along the places, and below one another along the planes. The sums of a piece, and how those of all
pieces are put together, depend on nothing that `schedule` leaves to the GPU.
"""

from typing import Any, NamedTuple

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
    no_slots,
    passing,
    quotient,
    shared_constants,
    shared_sums,
    slots,
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
    Partials,
    Where,
    about_mean,
    affine,
    attempt_for,
    counts,
    crew_sum,
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
    whole_words,
)


class Corner(NamedTuple):
    """Where a piece begins."""

    n: Any
    s: Any


@device
def _crew(shape):
    """Which of a block's crews a thread is of."""
    return thread() >> shape.crew


@device
def _crews(shape):
    """How many crews a block has."""
    return threads() >> shape.crew


@device
def _where(x, shape):
    """Where a thread's lanes find their channel's constants: all at one place."""
    return Where(_crew(shape), 0, width(x))


@device
def _channel(shape, group):
    """Which channel a crew takes; of the last group, it may lie beyond the end."""
    return group * _crews(shape) + _crew(shape)


@device
def _leads(shape, c):
    """Whether a thread is the one that does what a channel takes once."""
    return thread() & ((1 << shape.crew) - 1) == 0 and c < shape.C


@device
def _corner(shape, index):
    """First plane and place of a piece of any channel."""
    plane = quotient(index, shape.per_plane)
    return Corner(plane * shape.planes, (index - plane * shape.per_plane) * shape.places)


@device
def _ends(shape, first):
    """Where a piece ends."""
    return min(first.n + shape.planes, shape.N), min(first.s + shape.places, shape.S)


@device
def _size(shape, index):
    """How many numbers a piece has."""
    first = _corner(shape, index)
    n_end, s_end = _ends(shape, first)
    return np.float64((n_end - first.n) * (s_end - first.s))


@device
def _piece(x, shape, c, index):
    first = _corner(shape, index)
    n_end, s_end = _ends(shape, first)
    t = thread() & ((1 << shape.crew) - 1)
    side = t & ((1 << shape.across) - 1)
    step = width(x) << shape.across
    n, s = first.n + (t >> shape.across), first.s + side * width(x)
    planes = max(n_end - n, 0) if c < shape.C else 0
    return Piece(
        False, c, shape.C, n, s, planes, max(s_end - s, 0),
        shape.below, step, shape.along * step,
    )  # fmt: skip


# Statistics.


@device
def _anchor(x, shape, c, index):
    """Choose a number that is none of the piece's extremes: of three, the middle one."""
    none = zeros(x.at)
    if c >= shape.C:
        return none
    first = _corner(shape, index)
    n_end, s_end = _ends(shape, first)
    a = get(x.at, index_of(x, first.n, c, first.s))
    b = get(x.at, index_of(x, (first.n + n_end - 1) >> 1, c, (first.s + s_end - 1) >> 1))
    return finite_or_zero(
        median(none + a, none + b, none + get(x.at, index_of(x, n_end - 1, c, s_end - 1)))
    )


@device
def _piece_moments(x, shape, c, index, sums, held, policy):
    """Take mean and M2 of a piece, known to every thread of its crew, and hold it."""
    piece = _piece(x.at, shape, c, index)
    anchor = _anchor(x, shape, c, index)
    size, crew = _size(shape, index), 1 << shape.crew
    shift = m2 = 0.0
    attempt = AS_IT_IS
    for _ in range(2):
        scale = scale_of(x.at, attempt)
        moments, turns = thread_moments(x, piece, shape.rounds, anchor, scale, held, policy)
        near = crew_sum(total(totals(moments, scale)), sums, crew) / size
        around = crew_sum(total(squares(moments, scale, spread(x.at, near))), sums, crew)
        if counts(attempt, around):
            shift, m2 = near, around
        # What lies beyond the last channel wants nothing.
        attempt = attempt_for(x.at, m2) if anew(c) < shape.C else AS_IT_IS
        if not any_of(attempt != AS_IT_IS):
            break
    return total(wide(anchor)) / np.float64(width(x.at)) + shift, m2, turns


def statistics_planes(x, parameters, settings, memory, shape):
    """Take statistics of each piece; save them where it is all of its channel."""
    sums = shared_sums()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        c, index = _channel(shape, group), task - group * shape.pieces
        policy = lasting() if task >= shape.lasting else passing()
        mean, m2, _ = _piece_moments(x, shape, c, index, sums, no_slots(), policy)
        if _leads(shape, c):
            size = _size(shape, index)
            if shape.pieces == 1:
                save_moments(c, size, mean, m2, parameters, settings)
            else:
                put_moments(memory, shape, c, index, size, mean, m2)


# Normalize.


@device
def _write_y(maps, settings, shape, c, index, held, constants, reads, writes):
    kind = maps.x.at
    lanes = affine(kind, constants, _where(kind, shape), _crews(shape))
    together = whole_words(kind, maps.mask.at, maps.mask.ds, shape.across)
    piece = _piece(kind, shape, c, index)
    rectify = settings.rectify != 0
    write_normalized(maps, piece, shape.rounds, held, lanes, rectify, together, reads, writes)


def normalize_planes(maps, parameters, settings, shape):
    """Normalize by given statistics: saved ones, or in inference the running ones."""
    constants = shared_constants()
    tasks = shape.groups * shape.pieces
    reads, writes = passing(), lasting() if shape.lasting < 0 else passing()
    for turn in range(block(), tasks, blocks()):
        task = turn if shape.lasting < 0 else tasks - 1 - turn
        group = quotient(task, shape.pieces)
        c, index = _channel(shape, group), task - group * shape.pieces
        held = loaded_x(maps.x, _piece(maps.x.at, shape, c, index), no_slots(), reads)
        barrier()
        if _leads(shape, c):
            place, step = _crew(shape), _crews(shape)
            set_given_affine(maps.x.at, c, parameters, settings, constants, place, step)
        barrier()
        _write_y(maps, settings, shape, c, index, held, constants, reads, writes)


def forward_planes(maps, parameters, settings, memory, shape):
    """Take statistics and normalize what was held; blocks of a channel wait for one another."""
    sums, constants, held = shared_sums(), shared_constants(), slots()
    kind = maps.x.at
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        c, index = _channel(shape, group), task - group * shape.pieces
        if _leads(shape, c):
            fetch_parameters(c, parameters)
        mean, m2, turns = _piece_moments(maps.x, shape, c, index, sums, held, passing())
        if shape.pieces > 1:
            if thread() == 0:
                put_moments(memory, shape, c, index, _size(shape, index), mean, m2)
            wait_for_all(memory.counters, c, shape.pieces)
            mean, m2 = merged_moments(memory, shape, Partials(c, True, 0), sums)
        count = np.float64(shape.N * shape.S)
        if _leads(shape, c):
            invstd = inverse(m2 / count, settings.eps)
            place, step = _crew(shape), _crews(shape)
            set_affine(kind, c, mean, invstd, parameters, constants, place, step)
        barrier()
        if _leads(shape, c) and index == 0:
            save_moments(c, count, mean, m2, parameters, settings)
        _write_y(
            maps, settings, shape, anew(c), anew(index), turns, constants, passing(), lasting()
        )


# Backward.


@device
def _piece_products(maps, gradients, shape, c, index, sums, constants, held, policy):
    """Sum dy and its products of a piece, known to every thread of its crew, and hold it."""
    kind, place, step = maps.x.at, _crew(shape), _crews(shape)
    barrier()
    if _leads(shape, c):
        set_normal(kind, c, gradients, constants, place, step)
    barrier()
    lanes = normal(kind, constants, _where(kind, shape), step)
    piece, crew = _piece(kind, shape, c, index), 1 << shape.crew
    products, turns = thread_products(maps, piece, shape.rounds, lanes, held, policy)
    dy = crew_sum(total(wide(products.dy)), sums, crew)
    return dy, crew_sum(total(wide(products.dy_x)), sums, crew), turns


def products_planes(maps, gradients, memory, shape):
    """Sum for the gradients by weight and bias, of each piece."""
    sums, constants = shared_sums(), shared_constants()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        c, index = _channel(shape, group), task - group * shape.pieces
        policy = lasting() if task >= shape.lasting else passing()
        dy, dy_x, _ = _piece_products(
            maps, gradients, shape, c, index, sums, constants, no_slots(), policy
        )
        if _leads(shape, c):
            put_products(memory, shape, c, index, dy, dy_x)


@device
def _write_dx(maps, gradients, training, shape, c, index, dy, dy_x, held, constants, writes):
    """Write dx from the sums of a channel, which its crew's leader has."""
    kind, place, step = maps.x.at, _crew(shape), _crews(shape)
    barrier()
    if _leads(shape, c):
        count = np.float64(shape.N * shape.S)
        set_gradient_affine(kind, c, count, dy, dy_x, gradients, constants, place, step)
    barrier()
    lanes = gradient_affine(kind, constants, _where(kind, shape), step)
    piece = _piece(kind, shape, c, index)
    write_gradient(maps, piece, shape.rounds, held, lanes, training != 0, passing(), writes)


def gradient_planes(maps, gradients, training, memory, shape):
    """Write dx and dresidual from what `products_channels` has put together."""
    constants = shared_constants()
    tasks = shape.groups * shape.pieces
    for turn in range(block(), tasks, blocks()):
        task = tasks - 1 - turn
        group = quotient(task, shape.pieces)
        c, index = _channel(shape, group), task - group * shape.pieces
        held = loaded_dy_x(maps, _piece(maps.x.at, shape, c, index), no_slots(), passing())
        dy = dy_x = 0.0
        if _leads(shape, c):
            dy, dy_x = get(memory.sums, c), get(memory.sums, shape.C + c)
        _write_dx(maps, gradients, training, shape, c, index, dy, dy_x, held, constants, passing())


def backward_planes(maps, gradients, training, memory, shape):
    """Sum, and write dx from what was held; blocks of a channel wait for one another."""
    sums, constants, held = shared_sums(), shared_constants(), slots()
    for task in range(block(), shape.groups * shape.pieces, blocks()):
        group = quotient(task, shape.pieces)
        c, index = _channel(shape, group), task - group * shape.pieces
        dy, dy_x, turns = _piece_products(
            maps, gradients, shape, c, index, sums, constants, held, passing()
        )
        if shape.pieces > 1:
            if thread() == 0:
                put_products(memory, shape, c, index, dy, dy_x)
            wait_for_all(memory.counters, c, shape.pieces)
            dy, dy_x = merged_products(memory, shape, Partials(c, True, 0), sums)
        if _leads(shape, c):
            dy_x = about_mean(maps.x.at, c, dy, dy_x, gradients)
            if index == 0:
                save_products(c, dy, dy_x, gradients)
        _write_dx(maps, gradients, training, shape, c, index, dy, dy_x, turns, constants, lasting())
