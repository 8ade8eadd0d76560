"""What all views share: what a thread sums, what a block sums, constants, and bits.

A thread sums no more than `schedule.DEPTH` accesses of a piece in the type that it computes with;
from there on sums run in float64. Its moments are, lane by lane, those of Welford, "Note on a
method for calculating corrected sums of squares and products" (1962), about an anchor, a
number of the piece: differences from it are exact near it, so that no offset of the data costs
anything. They are put together by their counts, as in Chan, Golub & LeVeque (1983), but all at
once: first the mean of all, then the squares about it.
"""

from typing import Any, NamedTuple

import numpy as np

from .formats import BFLOAT16, FLOAT16, FLOAT32, WARP
from .target import (
    arrive,
    as_computed,
    awaited,
    barrier,
    bfloat16_at,
    device,
    float16_at,
    float32_at,
    float64_at,
    from_neighbour,
    gathered,
    get,
    is_wide,
    keep_where,
    narrow,
    or_bits,
    passed,
    pause,
    prefetch,
    present,
    put,
    put_word,
    read,
    read_lanes,
    reciprocal,
    square_root,
    thread,
    threads,
    unpack,
    wide,
    width,
    write,
    write_lanes,
    zeros,
)

# One number per channel.


@device
def nearest(x, value):
    """Round to the type that x is computed in."""
    return np.float64(as_computed(x, value))


@device
def number(numbers, c, default):
    """Channel ``c``'s number, in float64."""
    if numbers.at == 0:
        return np.float64(default)
    at = numbers.at + c * numbers.step
    if numbers.format == FLOAT16:
        return np.float64(get(float16_at(at), 0))
    if numbers.format == BFLOAT16:
        return np.float64(get(bfloat16_at(at), 0))
    if numbers.format == FLOAT32:
        return np.float64(get(float32_at(at), 0))
    return get(float64_at(at), 0)


@device
def set_number(numbers, c, value):
    """Set channel ``c``'s number, if there is one."""
    if numbers.at != 0:
        at = numbers.at + c * numbers.step
        if numbers.format == FLOAT16:
            put(float16_at(at), 0, np.float32(value))
        elif numbers.format == BFLOAT16:
            put(bfloat16_at(at), 0, np.float32(value))
        elif numbers.format == FLOAT32:
            put(float32_at(at), 0, np.float32(value))
        else:
            put(float64_at(at), 0, value)


@device
def _update_running(running, c, batch, momentum):
    if running.at != 0:
        set_number(running, c, (1.0 - momentum) * number(running, c, 0.0) + momentum * batch)


@device
def inverse(var, eps):
    """Give the inverse of the standard deviation."""
    return 1.0 / square_root(var + eps)


@device
def save_moments(c, count, mean, m2, parameters, settings):
    """Save a channel's statistics."""
    set_number(parameters.mean, c, mean)
    set_number(parameters.m2, c, m2)
    set_number(parameters.invstd, c, inverse(m2 / count, settings.eps))
    _update_running(parameters.running_mean, c, mean, settings.momentum)
    unbiased = m2 / (count - settings.correction)
    _update_running(parameters.running_var, c, unbiased, settings.momentum)


@device
def about_mean(x, c, dy, dy_x, gradients):
    """Give the product with the normal x, of one with what `set_normal` has left of the mean."""
    mean, invstd = number(gradients.mean, c, 0.0), number(gradients.invstd, c, 0.0)
    return dy_x - (mean - nearest(x, mean)) * invstd * dy


@device
def save_products(c, dy, dy_x, gradients):
    """Save a channel's gradients by bias and weight."""
    set_number(gradients.dbias, c, dy)
    set_number(gradients.dweight, c, dy_x)


@device
def _fetch(numbers, c):
    if numbers.at != 0:
        prefetch(numbers.at + c * numbers.step)


@device
def fetch_parameters(c, parameters):
    """Fetch what the channel's constants take while its numbers are summed."""
    _fetch(parameters.weight, c)
    _fetch(parameters.bias, c)
    _fetch(parameters.running_mean, c)
    _fetch(parameters.running_var, c)


# Moments of a thread.


class Moments(NamedTuple):
    """Of as many numbers in each lane."""

    anchor: Any  # lanes: a number of the piece
    total: Any  # lanes: sum of the differences from the anchor
    m2: Any  # lanes: sum of the squared differences from the mean
    count: Any  # numbers of a lane
    share: Any  # 1 / count


# Squares of what deviates by less than 2**-40, or by more than 2**60, leave float32's normal
# numbers, or may once they are summed. They are summed again then, scaled.
SMALL, LARGE = 2.0**-80, 2.0**120
AS_IT_IS, GROWN, SHRUNK = range(3)


@device
def scale_of(x, attempt):
    """Give the power of two by which deviations are scaled."""
    scale = 1.0 if attempt == AS_IT_IS else 2.0**64 if attempt == GROWN else 2.0**-72
    return as_computed(x, scale)


@device
def attempt_for(x, m2):
    """Choose how to sum again after squares have come to m2 as they are; so, if all is well."""
    if is_wide(x) or SMALL <= m2 <= LARGE:
        return AS_IT_IS
    return GROWN if m2 < SMALL else SHRUNK


@device
def counts(attempt, m2):
    """Whether an attempt came to a result.

    Numbers beyond 2**64 overflow as they are grown. As they are, they differ by more than 2**40 or
    not at all: no square was too small.
    """
    return attempt != GROWN or m2 - m2 == 0.0


@device
def no_moments(x, anchor, scale):
    """Begin with moments of nothing, about an anchor."""
    none = zeros(x)
    zero = as_computed(x, 0)
    return Moments(anchor * scale, none, none, zero, zero)


@device
def absorb(x, held, packed, scale, valid):
    """Add a number to each lane, where they are valid."""
    if not valid:
        return held
    one = as_computed(x, 1)
    far = unpack(packed) * scale - held.anchor
    delta = far - held.total * held.share  # from the mean of those before
    count = held.count + one
    share = reciprocal(count)
    return Moments(
        held.anchor, held.total + far, held.m2 + delta * delta * (one - share), count, share
    )


@device
def totals(held, scale):
    """Sum of each lane's differences from the anchor, in float64."""
    return wide(held.total) * (1.0 / np.float64(scale))


@device
def squares(held, scale, shift):
    """Sum of each lane's squared differences from ``anchor + shift``, in float64."""
    count = np.float64(held.count)
    back = 1.0 / np.float64(scale)
    off = wide(held.total) * (back / count if count > 0.0 else 0.0) - shift
    return wide(held.m2) * (back * back) + off * off * count


# Products of a thread.


class Products(NamedTuple):
    """Sums in each lane."""

    dy: Any  # lanes
    dy_x: Any  # lanes: of dy * (x - mean) * invstd


@device
def multiply(held, dy, bits, x, constants, valid):
    """Add a number and its product to each lane, where they are valid."""
    if not valid:  # and an infinite mean would make NaN of 0
        return held
    dy = keep_where(bits, unpack(dy))
    normal_x = (unpack(x) - constants.mean) * constants.invstd
    return Products(held.dy + dy, held.dy_x + dy * normal_x)


# Sums of a block.


class Where(NamedTuple):
    """Where a thread's lanes find what their channels have."""

    first: Any  # of the first lane
    between: Any  # from one lane to the next: 0 or 1
    left: Any  # from this lane on, it is one further


@device
def _lanes_at(x, memory, where, offset):
    return read_lanes(x, memory, where.first + offset, where.between, where.left)


@device
def crew_sum(value, memory, crew):
    """Sum of a number of each thread of a crew, given to all of them: of a warp, or the block."""
    distance = 1
    while distance < WARP:
        value += from_neighbour(value, distance)
        distance *= 2
    if crew == WARP:
        return value
    if thread() & (WARP - 1) == 0:
        write(memory, thread() // WARP, value)
    barrier()
    result = 0.0
    for warp in range(threads() // WARP):
        result += read(memory, warp)
    barrier()
    return result


@device
def staged(lanes, memory):
    """Sum some of a column's lanes for each thread: that of column ``thread() % columns``."""
    t, step = thread(), threads()
    # Row after row of threads, so that lane k of thread t lies at t * width + k.
    write_lanes(memory, t * width(lanes), 1, lanes)
    barrier()
    value = 0.0
    for k in range(width(lanes)):
        value += read(memory, t + k * step)
    barrier()
    return value


@device
def column_sum(value, memory, columns):
    """Sum of a number of each thread of column ``thread() % columns``, given to all of them."""
    distance = columns
    while distance < WARP:
        value += from_neighbour(value, distance)
        distance *= 2
    t, side = thread(), max(columns, WARP)  # now equal where threads lie so far apart
    write(memory, t, value)
    barrier()
    result = 0.0
    for at in range(t & (side - 1), threads(), side):
        result += read(memory, at)
    barrier()
    return result


@device
def by_lanes(x, value, memory, columns, where):
    """Give a thread's lanes what the threads of their columns have."""
    if thread() < columns:
        write(memory, thread(), value)
    barrier()
    lanes = _lanes_at(x, memory, where, 0)
    barrier()
    return lanes


# Pieces of a channel, which several blocks have summed.


class Partials(NamedTuple):
    """How threads put together the pieces of some channels: each has one, and some pieces of it."""

    c: Any  # channel
    valid: Any  # whether there is such a channel
    beside: Any  # 2**beside channels lie side by side


@device
def wait_for_all(counters, index, count):
    """Wait until as many blocks have come here, and see what they have written before.

    All of them must be running. The counter is 0 before and after: the last one to come wraps it.
    """
    barrier()
    if thread() == 0:
        arrive(counters, index, count - 1)
        while awaited(counters, index):
            pause()
    barrier()


@device
def put_moments(memory, shape, c, index, count, mean, m2):
    """Leave the moments of a piece: [3, C, pieces]."""
    at, apart = c * shape.pieces + index, shape.C * shape.pieces
    put(memory.partials, at, count)
    put(memory.partials, at + apart, mean)
    put(memory.partials, at + 2 * apart, m2)


@device
def merged_moments(memory, shape, channels, sums):
    """Put the moments of all pieces together: mean and M2 of a thread's channel."""
    partials, apart = memory.partials, shape.C * shape.pieces
    first = channels.c * shape.pieces
    own, step = first + (thread() >> channels.beside), threads() >> channels.beside
    end = first + shape.pieces if channels.valid else own
    pivot = get(partials, first + apart) if channels.valid else 0.0
    pivot = pivot if pivot - pivot == 0.0 else 0.0
    far = 0.0
    for at in range(own, end, step):
        far += (get(partials, at + apart) - pivot) * get(partials, at)
    mean = pivot + column_sum(far, sums, 1 << channels.beside) / np.float64(shape.N * shape.S)
    m2 = 0.0
    for at in range(own, end, step):
        off = get(partials, at + apart) - mean
        m2 += get(partials, at + 2 * apart) + off * off * get(partials, at)
    return mean, column_sum(m2, sums, 1 << channels.beside)


@device
def put_products(memory, shape, c, index, dy, dy_x):
    """Leave the products of a piece: [2, C, pieces]."""
    at = c * shape.pieces + index
    put(memory.partials, at, dy)
    put(memory.partials, at + shape.C * shape.pieces, dy_x)


@device
def merged_products(memory, shape, channels, sums):
    """Put the products of all pieces together, as `merged_moments` does."""
    first = channels.c * shape.pieces
    own, side = first + (thread() >> channels.beside), 1 << channels.beside
    end = first + shape.pieces if channels.valid else own
    dy = dy_x = 0.0
    for at in range(own, end, threads() >> channels.beside):
        dy += get(memory.partials, at)
        dy_x += get(memory.partials, at + shape.C * shape.pieces)
    return column_sum(dy, sums, side), column_sum(dy_x, sums, side)


# Constants: computed in float64 by one thread for each channel of a block, used as lanes.


class Normal(NamedTuple):
    """``(x - mean) * invstd``."""

    mean: Any
    invstd: Any


class Affine(NamedTuple):
    """``y = (x - mean) * scale + shift``."""

    mean: Any
    scale: Any
    shift: Any


class GradientAffine(NamedTuple):
    """``dx = (dy - mean_dy - (x - mean) * slope) * scale + shift``."""

    mean: Any
    slope: Any
    mean_dy: Any
    scale: Any
    shift: Any


@device
def set_normal(x, c, gradients, memory, column, step):
    """Compute a channel's constants of `multiply`."""
    write(memory, column, nearest(x, number(gradients.mean, c, 0.0)))
    write(memory, column + step, number(gradients.invstd, c, 0.0))


@device
def _constants(x, memory, where, offset):
    return narrow(x, _lanes_at(x, memory, where, offset))


@device
def normal(x, memory, where, step):
    """Give a thread's constants, of which each kind lies `step` numbers behind the one before."""
    return Normal(
        _constants(x, memory, where, 0),
        _constants(x, memory, where, step),
    )


@device
def set_affine(x, c, mean, invstd, parameters, memory, column, step):
    """Compute a channel's constants of `normalized`; the mean's remainder goes into the shift."""
    scale = invstd * number(parameters.weight, c, 1.0)
    near = nearest(x, mean)
    write(memory, column, near)
    write(memory, column + step, scale)
    write(memory, column + 2 * step, number(parameters.bias, c, 0.0) - (mean - near) * scale)


@device
def set_given_affine(x, c, parameters, settings, memory, column, step):
    """Compute them from saved statistics, or in inference from the running ones."""
    if parameters.invstd.at != 0:
        mean, invstd = number(parameters.mean, c, 0.0), number(parameters.invstd, c, 0.0)
    else:
        mean = number(parameters.running_mean, c, 0.0)
        invstd = inverse(number(parameters.running_var, c, 0.0), settings.eps)
    set_affine(x, c, mean, invstd, parameters, memory, column, step)


@device
def affine(x, memory, where, step):
    """Give a thread's constants, as `normal` does."""
    return Affine(
        _constants(x, memory, where, 0),
        _constants(x, memory, where, step),
        _constants(x, memory, where, 2 * step),
    )


@device
def set_gradient_affine(x, c, count, dy, dy_x, gradients, memory, column, step):
    """Compute a channel's constants of `gradient`; remainders go into the shift."""
    mean, invstd = number(gradients.mean, c, 0.0), number(gradients.invstd, c, 0.0)
    scale = invstd * number(gradients.weight, c, 1.0)
    mean_dy, slope = dy / count, dy_x / count * invstd
    near, near_dy = nearest(x, mean), nearest(x, mean_dy)
    write(memory, column, near)
    write(memory, column + step, slope)
    write(memory, column + 2 * step, near_dy)
    write(memory, column + 3 * step, scale)
    write(memory, column + 4 * step, ((mean - near) * slope - (mean_dy - near_dy)) * scale)


@device
def gradient_affine(x, memory, where, step):
    """Give a thread's constants, as `normal` does."""
    return GradientAffine(
        _constants(x, memory, where, 0),
        _constants(x, memory, where, step),
        _constants(x, memory, where, 2 * step),
        _constants(x, memory, where, 3 * step),
        _constants(x, memory, where, 4 * step),
    )


# What is done to the numbers of one access.


@device
def normalized(lanes, constants):
    """``(x - mean) * scale + shift``."""
    return (lanes - constants.mean) * constants.scale + constants.shift


@device
def gradient(dy, lanes, constants):
    """Dx in training."""
    dy = dy - constants.mean_dy - (lanes - constants.mean) * constants.slope
    return dy * constants.scale + constants.shift


# Bits.

WORD_BITS = 32


@device
def whole_words(y, mask, step, across):
    """Whether neighbouring threads hold the bits of a word."""
    side = WORD_BITS // width(y)
    return present(mask) and step == 1 and side <= WARP and side <= 1 << across


@device
def write_bits(y, mask, bit, lanes, valid, left, together):
    """Write which numbers passed the ReLU.

    Parameters
    ----------
    bit : where the mask has this thread's first number.
    valid : whether the thread has numbers at all.
    left : how many numbers there are from its first one on along the axis of neighbouring threads.
    together : whether `whole_words`; then all threads of a warp must call.
    """
    bits = passed(y, lanes)
    if together:
        within = thread() * width(y) & (WORD_BITS - 1)
        word = gathered(y, bits)
        # With numbers beyond the end, or where words begin elsewhere, each sets its own bits.
        if left + within >= WORD_BITS and (bit - within) & (WORD_BITS - 1) == 0:
            if valid and within == 0:
                put_word(mask, bit, word)
            return
    if valid:
        or_bits(mask, bit, bits)
