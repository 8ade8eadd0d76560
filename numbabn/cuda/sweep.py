"""What a thread does with its share of a piece, of planes or of rows.

A piece is what a block sums in one go. Its threads lie side by side along the axis that is
contiguous in memory, places of planes or channels of rows, and below one another along the other.
Each loads four times before it uses the first.
"""

from typing import Any, NamedTuple

from .target import (
    device,
    every_bit,
    get_bits,
    keep_where,
    load,
    nothing,
    present,
    store,
    unpack,
    zeros,
)
from .vector import Products, absorb, gradient, multiply, no_moments, normalized, write_bits


class Piece(NamedTuple):
    """Planes, or rows, of a piece as a thread sees them."""

    of_rows: Any  # then there is one n
    c: Any  # channel of the thread's numbers; of rows, of the first of them
    c_end: Any
    n: Any  # where the thread begins
    n_end: Any
    n_step: Any
    s: Any
    s_end: Any
    s_step: Any
    s_turn: Any  # from here on the thread goes to its next plane, together with its neighbours


class Place(NamedTuple):
    """Where a thread is in its piece."""

    n: Any
    s: Any


@device
def _next(piece, place):
    """Go on along the places, then along the planes."""
    s = place.s + piece.s_step
    if piece.of_rows or s < piece.s_turn:
        return Place(place.n, s)
    return Place(place.n + piece.n_step, piece.s)


@device
def inside(piece, place):
    """Whether the thread has numbers there."""
    first = piece.c < piece.c_end if piece.of_rows else place.n < piece.n_end
    return first and place.s < piece.s_end


@device
def index_of(a, piece, place):
    """Where an array has the thread's numbers."""
    return place.n * a.dn + piece.c * a.dc + place.s * a.ds


@device
def load_at(a, piece, place, there):
    """Load the numbers of a place; none if it lies outside, or there is no such array."""
    if there and present(a.at):
        return load(a.at, index_of(a, piece, place))
    return nothing(a.at)


@device
def _bits_at(mask, piece, place, there):
    """Load the bits of a place; all are set if there is no mask."""
    if there and present(mask.at):
        return get_bits(mask.at, index_of(mask, piece, place))
    return every_bit()


@device
def thread_moments(x, piece, rounds, anchor, scale):
    """Take moments of a thread's numbers."""
    held = no_moments(x.at, anchor, scale)
    p = Place(piece.n, piece.s)
    for _ in range(0, rounds, 4):
        q = _next(piece, p)
        r = _next(piece, q)
        t = _next(piece, r)
        has_p, has_q = inside(piece, p), inside(piece, q)
        has_r, has_t = inside(piece, r), inside(piece, t)
        x_p, x_q = load_at(x, piece, p, has_p), load_at(x, piece, q, has_q)
        x_r, x_t = load_at(x, piece, r, has_r), load_at(x, piece, t, has_t)
        held = absorb(x.at, held, x_p, scale, has_p)
        held = absorb(x.at, held, x_q, scale, has_q)
        held = absorb(x.at, held, x_r, scale, has_r)
        held = absorb(x.at, held, x_t, scale, has_t)
        p = _next(piece, t)
    return held


@device
def thread_products(maps, piece, rounds, constants):
    """Sum dy of a thread's numbers, and its product with x."""
    held = Products(zeros(maps.x.at), zeros(maps.x.at))
    p = Place(piece.n, piece.s)
    for _ in range(0, rounds, 4):
        q = _next(piece, p)
        r = _next(piece, q)
        t = _next(piece, r)
        has_p, has_q = inside(piece, p), inside(piece, q)
        has_r, has_t = inside(piece, r), inside(piece, t)
        x_p, x_q = load_at(maps.x, piece, p, has_p), load_at(maps.x, piece, q, has_q)
        x_r, x_t = load_at(maps.x, piece, r, has_r), load_at(maps.x, piece, t, has_t)
        dy_p, dy_q = load_at(maps.dy, piece, p, has_p), load_at(maps.dy, piece, q, has_q)
        dy_r, dy_t = load_at(maps.dy, piece, r, has_r), load_at(maps.dy, piece, t, has_t)
        bits_p, bits_q = _bits_at(maps.mask, piece, p, has_p), _bits_at(maps.mask, piece, q, has_q)
        bits_r, bits_t = _bits_at(maps.mask, piece, r, has_r), _bits_at(maps.mask, piece, t, has_t)
        held = multiply(held, dy_p, bits_p, x_p, constants, has_p)
        held = multiply(held, dy_q, bits_q, x_q, constants, has_q)
        held = multiply(held, dy_r, bits_r, x_r, constants, has_r)
        held = multiply(held, dy_t, bits_t, x_t, constants, has_t)
        p = _next(piece, t)
    return held


@device
def _write_y(maps, piece, place, there, x, residual, constants, rectify, together):
    y = normalized(unpack(x), unpack(residual), constants, rectify)
    if there:
        store(maps.y.at, index_of(maps.y, piece, place), y)
    if present(maps.mask.at):
        first = index_of(maps.mask, piece, place)
        left = piece.c_end - piece.c if piece.of_rows else piece.s_end - place.s
        write_bits(maps.y.at, maps.mask.at, first, y, there, left, together)


@device
def write_normalized(maps, piece, rounds, constants, rectify, together):
    """Write y, and the mask by words if they are `together`. All threads of a block must call."""
    x, residual = maps.x, maps.residual
    p = Place(piece.n, piece.s)
    for _ in range(0, rounds, 4):
        q = _next(piece, p)
        r = _next(piece, q)
        t = _next(piece, r)
        has_p, has_q = inside(piece, p), inside(piece, q)
        has_r, has_t = inside(piece, r), inside(piece, t)
        x_p, x_q = load_at(x, piece, p, has_p), load_at(x, piece, q, has_q)
        x_r, x_t = load_at(x, piece, r, has_r), load_at(x, piece, t, has_t)
        add_p, add_q = load_at(residual, piece, p, has_p), load_at(residual, piece, q, has_q)
        add_r, add_t = load_at(residual, piece, r, has_r), load_at(residual, piece, t, has_t)
        _write_y(maps, piece, p, has_p, x_p, add_p, constants, rectify, together)
        _write_y(maps, piece, q, has_q, x_q, add_q, constants, rectify, together)
        _write_y(maps, piece, r, has_r, x_r, add_r, constants, rectify, together)
        _write_y(maps, piece, t, has_t, x_t, add_t, constants, rectify, together)
        p = _next(piece, t)


@device
def _write_dx(maps, piece, place, there, x, dy, bits, constants, training):
    if there:
        dy = keep_where(bits, unpack(dy))
        dx = gradient(dy, unpack(x), constants) if training else dy * constants.scale
        store(maps.dx.at, index_of(maps.dx, piece, place), dx)
        if present(maps.dresidual.at):
            store(maps.dresidual.at, index_of(maps.dresidual, piece, place), dy)


@device
def write_gradient(maps, piece, rounds, constants, training):
    """Write dx and dresidual."""
    p = Place(piece.n, piece.s)
    for _ in range(0, rounds, 4):
        q = _next(piece, p)
        r = _next(piece, q)
        t = _next(piece, r)
        has_p, has_q = inside(piece, p), inside(piece, q)
        has_r, has_t = inside(piece, r), inside(piece, t)
        x_p, x_q = load_at(maps.x, piece, p, has_p), load_at(maps.x, piece, q, has_q)
        x_r, x_t = load_at(maps.x, piece, r, has_r), load_at(maps.x, piece, t, has_t)
        dy_p, dy_q = load_at(maps.dy, piece, p, has_p), load_at(maps.dy, piece, q, has_q)
        dy_r, dy_t = load_at(maps.dy, piece, r, has_r), load_at(maps.dy, piece, t, has_t)
        bits_p, bits_q = _bits_at(maps.mask, piece, p, has_p), _bits_at(maps.mask, piece, q, has_q)
        bits_r, bits_t = _bits_at(maps.mask, piece, r, has_r), _bits_at(maps.mask, piece, t, has_t)
        _write_dx(maps, piece, p, has_p, x_p, dy_p, bits_p, constants, training)
        _write_dx(maps, piece, q, has_q, x_q, dy_q, bits_q, constants, training)
        _write_dx(maps, piece, r, has_r, x_r, dy_r, bits_r, constants, training)
        _write_dx(maps, piece, t, has_t, x_t, dy_t, bits_t, constants, training)
        p = _next(piece, t)
