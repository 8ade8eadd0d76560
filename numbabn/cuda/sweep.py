"""What a thread does with its share of a piece, of planes, short ones or rows.

A piece is what a block sums in one go. Its threads lie side by side along the axis that is
contiguous in memory, places of planes or channels of rows, and below one another along the other.
Each loads four times before it uses the first. What it holds for its second turn are the last four
in registers, and those before them in the slots of shared memory; of rows, and of short planes,
which are rows here, all are in slots. Or it holds nothing, and loads them again.
"""

from typing import Any, NamedTuple

from .arguments import Backward, Forward
from .target import (
    anew,
    apart,
    device,
    every_bit,
    get_bits,
    holds,
    keep,
    keep_where,
    kept,
    less,
    load,
    nothing,
    present,
    relu,
    small,
    store,
    unpack,
    zeros,
)
from .vector import Products, absorb, gradient, multiply, no_moments, normalized, write_bits


class Piece(NamedTuple):
    """Planes, or rows, of a piece as a thread sees them."""

    of_rows: Any  # then there is one plane
    c: Any  # channel of the thread's numbers; of rows, of the first of them
    c_end: Any
    n: Any  # where the thread begins
    s: Any
    planes: Any  # how many there are from there on
    places: Any
    n_step: Any  # how many of them the thread's next turn is away
    s_step: Any
    along: Any  # so many places on, all threads go to the next plane


class Place(NamedTuple):
    """How far a thread has come: the same for all, so that it takes no thread's registers."""

    plane: Any
    along: Any


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
    along = small(place.along + piece.s_step)
    if piece.of_rows or less(along, piece.along):
        return Place(place.plane, along)
    return Place(small(place.plane + piece.n_step), 0)


@device
def inside(piece, place):
    """Whether the thread has numbers there."""
    there = less(place.along, piece.places)
    if piece.of_rows:
        return there and piece.c < piece.c_end
    return there and less(place.plane, piece.planes)


@device
def index_of(a, n, c, s):
    """Where an array has a number."""
    return n * a.dn + c * a.dc + s * a.ds


@device
def _first(a, piece):
    """Where an array has the numbers of the thread's first turn.

    LLVM must know nothing of it: it would put together what is the same for all threads and what is
    not, and multiply by the array's steps anew in each turn.
    """
    return anew(index_of(a, piece.n, piece.c, piece.s))


@device
def _index(a, first, piece, place):
    """Where an array has the thread's numbers."""
    along = first + small(place.along) * a.ds
    return along if piece.of_rows else along + small(place.plane) * a.dn


@device
def _load_at(a, first, piece, place, policy):
    """Load the numbers of a place; none if it lies outside."""
    if inside(piece, place):
        return load(a.at, _index(a, first, piece, place), policy)
    return nothing(a.at)


@device
def _bits_at(mask, first, piece, place):
    """Load the bits of a place."""
    if inside(piece, place):
        return get_bits(mask.at, _index(mask, first, piece, place))
    return every_bit()


# Four turns.


@device
def _from(piece, p):
    q = _next(piece, p)
    r = _next(piece, q)
    return Four(p, q, r, _next(piece, r))


@device
def _nothing(x):
    none = nothing(x.at)
    return Four(none, none, none, none)


@device
def _load(a, first, piece, at, policy):
    return Four(
        _load_at(a, first, piece, at.p, policy), _load_at(a, first, piece, at.q, policy),
        _load_at(a, first, piece, at.r, policy), _load_at(a, first, piece, at.t, policy),
    )  # fmt: skip


@device
def _bits(mask, first, piece, at):
    """Load bits; all are set if there is no mask."""
    if not present(mask.at):
        every = every_bit()
        return Four(every, every, every, every)
    return Four(
        _bits_at(mask, first, piece, at.p), _bits_at(mask, first, piece, at.q),
        _bits_at(mask, first, piece, at.r), _bits_at(mask, first, piece, at.t),
    )  # fmt: skip


@device
def _keep(slots, turn, x):
    keep(slots, turn, x.p)
    keep(slots, turn + 1, x.q)
    keep(slots, turn + 2, x.r)
    keep(slots, turn + 3, x.t)


@device
def _again(slots, turn, a, first, piece, at, policy):
    """Give what was loaded before."""
    if holds(slots):
        return Four(
            kept(slots, turn, a.at), kept(slots, turn + 1, a.at),
            kept(slots, turn + 2, a.at), kept(slots, turn + 3, a.at),
        )  # fmt: skip
    return _load(a, first, piece, at, policy)


# Sums.


@device
def thread_moments(x, piece, rounds, anchor, scale, slots, policy):
    """Take moments of a thread's numbers, and hold them."""
    moments = no_moments(x.at, anchor, scale)
    place = next_place = Place(0, 0)
    four, first = _nothing(x), _first(x, piece)
    for turn in range(0, rounds, 4):
        if turn > 0 and not piece.of_rows:
            _keep(slots, turn - 4, four)
        place = next_place
        at = _from(piece, place)
        next_place = _next(piece, at.t)
        four = _load(x, first, piece, at, policy)
        moments = absorb(x.at, moments, four.p, scale, inside(piece, at.p))
        moments = absorb(x.at, moments, four.q, scale, inside(piece, at.q))
        moments = absorb(x.at, moments, four.r, scale, inside(piece, at.r))
        moments = absorb(x.at, moments, four.t, scale, inside(piece, at.t))
        if piece.of_rows:
            _keep(slots, turn, four)
    if piece.of_rows:
        place = Place(0, 0)
    return moments, Held(place, four, None, Place(0, 0), slots)


@device
def thread_products(maps, piece, rounds, constants, slots, policy):
    """Sum dy of a thread's numbers, and its product with x, and hold both."""
    products = Products(zeros(maps.x.at), zeros(maps.x.at))
    place = next_place = Place(0, 0)
    x, dy = _nothing(maps.x), _nothing(maps.x)
    x_first, dy_first = _first(maps.x, piece), _first(maps.dy, piece)
    bits_first = _first(maps.mask, piece)
    for turn in range(0, rounds, 4):
        if turn > 0 and not piece.of_rows:
            _keep(slots, 2 * turn - 8, x)
            _keep(slots, 2 * turn - 4, dy)
        place = next_place
        at = _from(piece, place)
        next_place = _next(piece, at.t)
        x = _load(maps.x, x_first, piece, at, policy)
        dy = _load(maps.dy, dy_first, piece, at, policy)
        bits = _bits(maps.mask, bits_first, piece, at)
        products = multiply(products, dy.p, bits.p, x.p, constants, inside(piece, at.p))
        products = multiply(products, dy.q, bits.q, x.q, constants, inside(piece, at.q))
        products = multiply(products, dy.r, bits.r, x.r, constants, inside(piece, at.r))
        products = multiply(products, dy.t, bits.t, x.t, constants, inside(piece, at.t))
        if piece.of_rows:
            _keep(slots, 2 * turn, x)
            _keep(slots, 2 * turn + 4, dy)
    if piece.of_rows:
        place = Place(0, 0)
    return products, Held(place, x, dy, Place(0, 0), slots)


# Results.


@device
def loaded_x(x, piece, slots, policy):
    """Begin to load planes of which nothing was held; rows are loaded turn by turn."""
    if piece.of_rows:
        return Held(Place(0, 0), _nothing(x), None, Place(0, 0), slots)
    at = _from(piece, Place(0, 0))
    return Held(
        at.p, _load(x, _first(x, piece), piece, at, policy), None, _next(piece, at.t), slots
    )


@device
def loaded_dy_x(maps, piece, slots, policy):
    """Begin to load planes of which nothing was held, as `loaded_x` does."""
    if piece.of_rows:
        return Held(Place(0, 0), _nothing(maps.x), _nothing(maps.x), Place(0, 0), slots)
    at = _from(piece, Place(0, 0))
    x = _load(maps.x, _first(maps.x, piece), piece, at, policy)
    dy = _load(maps.dy, _first(maps.dy, piece), piece, at, policy)
    return Held(at.p, x, dy, _next(piece, at.t), slots)


@device
def _write_y(maps, firsts, piece, place, x, residual, constants, rectify, together, policy):
    y = normalized(unpack(x), constants)
    if present(maps.residual.at):
        apart()
        y = y + unpack(residual)
    if rectify:
        y = relu(y)
    there = inside(piece, place)
    if there:
        store(maps.y.at, _index(maps.y, firsts.y, piece, place), y, policy)
    if present(maps.mask.at):
        first = _index(maps.mask, firsts.mask, piece, place)
        left = piece.places - place.along
        left = piece.c_end - piece.c if piece.of_rows else left
        write_bits(maps.y.at, maps.mask.at, first, y, there, left, together)


@device
def write_normalized(maps, piece, rounds, held, constants, rectify, together, reads, writes):
    """Write y, and the mask by words if they are `together`. All threads of a block must call."""
    place, x, rest = held.place, held.x, held.rest
    firsts = Forward(
        _first(maps.y, piece), _first(maps.x, piece),
        _first(maps.residual, piece), _first(maps.mask, piece),
    )  # fmt: skip
    for turn in range(0, rounds, 4):
        at = _from(piece, place)
        if piece.of_rows:
            x = _again(held.slots, turn, maps.x, firsts.x, piece, at, reads)
            rest = _next(piece, at.t)
        elif turn > 0:
            x = _again(held.slots, turn - 4, maps.x, firsts.x, piece, at, reads)
            rest = _next(piece, at.t)
        place = rest
        add = _nothing(maps.x)
        if present(maps.residual.at):
            add = _load(maps.residual, firsts.residual, piece, at, reads)
        _write_y(maps, firsts, piece, at.p, x.p, add.p, constants, rectify, together, writes)
        _write_y(maps, firsts, piece, at.q, x.q, add.q, constants, rectify, together, writes)
        _write_y(maps, firsts, piece, at.r, x.r, add.r, constants, rectify, together, writes)
        _write_y(maps, firsts, piece, at.t, x.t, add.t, constants, rectify, together, writes)


@device
def _write_dx(maps, firsts, piece, place, x, dy, bits, constants, training, policy):
    if inside(piece, place):
        dy = keep_where(bits, unpack(dy))
        dx = gradient(dy, unpack(x), constants) if training else dy * constants.scale
        store(maps.dx.at, _index(maps.dx, firsts.dx, piece, place), dx, policy)
        if present(maps.dresidual.at):
            store(
                maps.dresidual.at,
                _index(maps.dresidual, firsts.dresidual, piece, place),
                dy,
                policy,
            )


@device
def write_gradient(maps, piece, rounds, held, constants, training, reads, writes):
    """Write dx and dresidual."""
    place, x, dy, rest = held.place, held.x, held.dy, held.rest
    firsts = Backward(
        _first(maps.dx, piece), _first(maps.dresidual, piece), _first(maps.dy, piece),
        _first(maps.x, piece), _first(maps.mask, piece),
    )  # fmt: skip
    for turn in range(0, rounds, 4):
        at = _from(piece, place)
        if piece.of_rows:
            x = _again(held.slots, 2 * turn, maps.x, firsts.x, piece, at, reads)
            dy = _again(held.slots, 2 * turn + 4, maps.dy, firsts.dy, piece, at, reads)
            rest = _next(piece, at.t)
        elif turn > 0:
            x = _again(held.slots, 2 * turn - 8, maps.x, firsts.x, piece, at, reads)
            dy = _again(held.slots, 2 * turn - 4, maps.dy, firsts.dy, piece, at, reads)
            rest = _next(piece, at.t)
        place = rest
        bits = _bits(maps.mask, firsts.mask, piece, at)
        _write_dx(maps, firsts, piece, at.p, x.p, dy.p, bits.p, constants, training, writes)
        _write_dx(maps, firsts, piece, at.q, x.q, dy.q, bits.q, constants, training, writes)
        _write_dx(maps, firsts, piece, at.r, x.r, dy.r, bits.r, constants, training, writes)
        _write_dx(maps, firsts, piece, at.t, x.t, dy.t, bits.t, constants, training, writes)
