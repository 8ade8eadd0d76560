"""What a thread does with its share of a piece, of planes or of rows.

A piece is what a block sums in one go. Its threads lie side by side along the axis that is
contiguous in memory, places of planes or channels of rows, and below one another along the other.
Each loads four times before it uses the first. What it holds for its second turn are the last four
in registers, and those before them in the slots of shared memory; or it holds nothing, and loads
them again.
"""

from typing import Any, NamedTuple

from .target import (
    device,
    every_bit,
    get_bits,
    holds,
    keep,
    keep_where,
    kept,
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


class Four(NamedTuple):
    """Of a thread's next four turns."""

    p: Any
    q: Any
    r: Any
    t: Any


class Held(NamedTuple):
    """What is written from once all is summed."""

    place: Any  # where to begin
    x: Any  # `Four` accesses: what is there and in the next turns
    dy: Any  # the same of dy, or None
    rest: Any  # where to go on after these
    slots: Any  # what is there, if they hold it


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
def load_at(a, piece, place, policy):
    """Load the numbers of a place; none if it lies outside, or there is no such array."""
    if inside(piece, place) and present(a.at):
        return load(a.at, index_of(a, piece, place), policy)
    return nothing(a.at)


@device
def _bits_at(mask, piece, place):
    """Load the bits of a place; all are set if there is no mask."""
    if inside(piece, place) and present(mask.at):
        return get_bits(mask.at, index_of(mask, piece, place))
    return every_bit()


# Four turns.


@device
def _begin(piece):
    return Place(piece.n, piece.s)


@device
def _from(piece, p):
    q = _next(piece, p)
    r = _next(piece, q)
    return Four(p, q, r, _next(piece, r))


@device
def _load(a, piece, at, policy):
    return Four(
        load_at(a, piece, at.p, policy), load_at(a, piece, at.q, policy),
        load_at(a, piece, at.r, policy), load_at(a, piece, at.t, policy),
    )  # fmt: skip


@device
def _bits(mask, piece, at):
    return Four(
        _bits_at(mask, piece, at.p), _bits_at(mask, piece, at.q),
        _bits_at(mask, piece, at.r), _bits_at(mask, piece, at.t),
    )  # fmt: skip


@device
def _keep(slots, turn, x):
    keep(slots, turn, x.p)
    keep(slots, turn + 1, x.q)
    keep(slots, turn + 2, x.r)
    keep(slots, turn + 3, x.t)


@device
def _again(slots, turn, a, piece, at, policy):
    """Give what was loaded before."""
    if holds(slots):
        return Four(
            kept(slots, turn, a.at), kept(slots, turn + 1, a.at),
            kept(slots, turn + 2, a.at), kept(slots, turn + 3, a.at),
        )  # fmt: skip
    return _load(a, piece, at, policy)


# Sums.


@device
def thread_moments(x, piece, rounds, anchor, scale, slots, policy):
    """Take moments of a thread's numbers, and hold them."""
    moments = no_moments(x.at, anchor, scale)
    place = next_place = _begin(piece)
    none = nothing(x.at)
    four = Four(none, none, none, none)
    for turn in range(0, rounds, 4):
        if turn > 0 and not piece.of_rows:
            _keep(slots, turn - 4, four)
        place = next_place
        at = _from(piece, place)
        next_place = _next(piece, at.t)
        four = _load(x, piece, at, policy)
        moments = absorb(x.at, moments, four.p, scale, inside(piece, at.p))
        moments = absorb(x.at, moments, four.q, scale, inside(piece, at.q))
        moments = absorb(x.at, moments, four.r, scale, inside(piece, at.r))
        moments = absorb(x.at, moments, four.t, scale, inside(piece, at.t))
        if piece.of_rows:
            _keep(slots, turn, four)
    if piece.of_rows:
        place = _begin(piece)
    return moments, Held(place, four, None, _begin(piece), slots)


@device
def thread_products(maps, piece, rounds, constants, slots, policy):
    """Sum dy of a thread's numbers, and its product with x, and hold both."""
    products = Products(zeros(maps.x.at), zeros(maps.x.at))
    place = next_place = _begin(piece)
    none = nothing(maps.x.at)
    x, dy = Four(none, none, none, none), Four(none, none, none, none)
    for turn in range(0, rounds, 4):
        if turn > 0 and not piece.of_rows:
            _keep(slots, 2 * turn - 8, x)
            _keep(slots, 2 * turn - 4, dy)
        place = next_place
        at = _from(piece, place)
        next_place = _next(piece, at.t)
        x, dy = _load(maps.x, piece, at, policy), _load(maps.dy, piece, at, policy)
        bits = _bits(maps.mask, piece, at)
        products = multiply(products, dy.p, bits.p, x.p, constants, inside(piece, at.p))
        products = multiply(products, dy.q, bits.q, x.q, constants, inside(piece, at.q))
        products = multiply(products, dy.r, bits.r, x.r, constants, inside(piece, at.r))
        products = multiply(products, dy.t, bits.t, x.t, constants, inside(piece, at.t))
        if piece.of_rows:
            _keep(slots, 2 * turn, x)
            _keep(slots, 2 * turn + 4, dy)
    if piece.of_rows:
        place = _begin(piece)
    return products, Held(place, x, dy, _begin(piece), slots)


# Results.


@device
def loaded_x(x, piece, slots, policy):
    """Begin to load what nothing was held of."""
    if piece.of_rows:
        none = nothing(x.at)
        return Held(_begin(piece), Four(none, none, none, none), None, _begin(piece), slots)
    at = _from(piece, _begin(piece))
    return Held(at.p, _load(x, piece, at, policy), None, _next(piece, at.t), slots)


@device
def loaded_dy_x(maps, piece, slots, policy):
    """Begin to load what nothing was held of."""
    if piece.of_rows:
        none = nothing(maps.x.at)
        four = Four(none, none, none, none)
        return Held(_begin(piece), four, four, _begin(piece), slots)
    at = _from(piece, _begin(piece))
    x, dy = _load(maps.x, piece, at, policy), _load(maps.dy, piece, at, policy)
    return Held(at.p, x, dy, _next(piece, at.t), slots)


@device
def _write_y(maps, piece, place, x, residual, constants, rectify, together, policy):
    y = normalized(unpack(x), unpack(residual), constants, rectify)
    there = inside(piece, place)
    if there:
        store(maps.y.at, index_of(maps.y, piece, place), y, policy)
    if present(maps.mask.at):
        first = index_of(maps.mask, piece, place)
        left = piece.c_end - piece.c if piece.of_rows else piece.s_end - place.s
        write_bits(maps.y.at, maps.mask.at, first, y, there, left, together)


@device
def write_normalized(maps, piece, rounds, held, constants, rectify, together, reads, writes):
    """Write y, and the mask by words if they are `together`. All threads of a block must call."""
    place, x, rest = held.place, held.x, held.rest
    for turn in range(0, rounds, 4):
        at = _from(piece, place)
        if piece.of_rows:
            x = _again(held.slots, turn, maps.x, piece, at, reads)
            rest = _next(piece, at.t)
        elif turn > 0:
            x = _again(held.slots, turn - 4, maps.x, piece, at, reads)
            rest = _next(piece, at.t)
        place = rest
        add = _load(maps.residual, piece, at, reads)
        _write_y(maps, piece, at.p, x.p, add.p, constants, rectify, together, writes)
        _write_y(maps, piece, at.q, x.q, add.q, constants, rectify, together, writes)
        _write_y(maps, piece, at.r, x.r, add.r, constants, rectify, together, writes)
        _write_y(maps, piece, at.t, x.t, add.t, constants, rectify, together, writes)


@device
def _write_dx(maps, piece, place, x, dy, bits, constants, training, policy):
    if inside(piece, place):
        dy = keep_where(bits, unpack(dy))
        dx = gradient(dy, unpack(x), constants) if training else dy * constants.scale
        store(maps.dx.at, index_of(maps.dx, piece, place), dx, policy)
        if present(maps.dresidual.at):
            store(maps.dresidual.at, index_of(maps.dresidual, piece, place), dy, policy)


@device
def write_gradient(maps, piece, rounds, held, constants, training, reads, writes):
    """Write dx and dresidual."""
    place, x, dy, rest = held.place, held.x, held.dy, held.rest
    for turn in range(0, rounds, 4):
        at = _from(piece, place)
        if piece.of_rows:
            x = _again(held.slots, 2 * turn, maps.x, piece, at, reads)
            dy = _again(held.slots, 2 * turn + 4, maps.dy, piece, at, reads)
            rest = _next(piece, at.t)
        elif turn > 0:
            x = _again(held.slots, 2 * turn - 8, maps.x, piece, at, reads)
            dy = _again(held.slots, 2 * turn - 4, maps.dy, piece, at, reads)
            rest = _next(piece, at.t)
        place = rest
        bits = _bits(maps.mask, piece, at)
        _write_dx(maps, piece, at.p, x.p, dy.p, bits.p, constants, training, writes)
        _write_dx(maps, piece, at.q, x.q, dy.q, bits.q, constants, training, writes)
        _write_dx(maps, piece, at.r, x.r, dy.r, bits.r, constants, training, writes)
        _write_dx(maps, piece, at.t, x.t, dy.t, bits.t, constants, training, writes)
