"""Runs: what is done to a stretch of memory, sixteen numbers at a time.

Sums run in float64 whatever the data are, over deviations from a number of the channel itself, so
that with ``n`` numbers cancellation costs at most a factor ``n`` of float64's 2**-53:
``(x[0] - mean)**2`` cannot exceed ``m2``.

What is one number per channel is either `Lanes` that hold it sixteen times, or a pointer to one
number per column: `load` takes both.
"""

import numpy as np

from .arguments import Memory, displaced, number, set_number
from .compilation import inlined, primitive
from .intrinsics import (
    LANES,
    blend,
    computed,
    front,
    get,
    halves,
    keep_finite,
    keep_first,
    keep_where,
    line_numbers,
    load,
    load_part,
    missing,
    moved,
    nothing,
    or_byte,
    passed,
    prefetch,
    prefetch_line,
    prefetch_target,
    put,
    relu,
    rounded,
    spread,
    store,
    store_part,
    stream,
    transfer,
    transfer_first,
    wide,
)

# Numbers.


@primitive
def _if_finite(value, other):
    return value if np.isfinite(value) else other


@primitive
def first_number(x, index):
    """Choose what to take deviations from: a number of x, unless all would be infinite."""
    return _if_finite(np.float64(computed(x, index)), 0.0)


@inlined
def moments(count, shift, total, squares):
    """Mean and M2 from the sums of deviations, and of their squares, from `shift`."""
    # total * total would overflow where M2 does not.
    return shift + total / count, squares - total * (total / count)


@inlined
def merge(count, mean, m2, count_b, mean_b, m2_b):
    """Chan, Golub & LeVeque (1983), eq. 2.1: the moments of two samples taken together."""
    total = count + count_b
    part = count_b / total
    delta = mean_b - mean
    # Beside an infinite mean the step is not a number, where the sum still is infinite.
    step = _if_finite(delta * part, mean_b)
    return total, mean + step, m2 + m2_b + delta * delta * (count * part)


# Bits of a mask: bit i of the flat index is bit i % 8 of byte i // 8.


@primitive
def _or_bits(mask, bit, step, bits, count):
    """Set `count` bits of a mask that starts as zeros; other threads may do so beside."""
    if step == 1:
        word = (bits & ((1 << count) - 1)) << (bit & 7)
        for k in range(3):
            if (word >> 8 * k) & 255:
                or_byte(mask, (bit >> 3) + k, np.uint8((word >> 8 * k) & 255))
    else:
        for k in range(count):
            if (bits >> k) & 1:
                at = bit + k * step
                or_byte(mask, at >> 3, np.uint8(1 << (at & 7)))


@primitive
def _bits(mask, bit, step, count):
    """Read `count` bits, at most sixteen."""
    word = 0
    if step == 1:
        for k in range(((bit & 7) + count + 7) >> 3):
            word |= np.int64(get(mask, (bit >> 3) + k)) << 8 * k
        return word >> (bit & 7)
    for k in range(count):
        at = bit + k * step
        word |= ((np.int64(get(mask, at >> 3)) >> (at & 7)) & 1) << k
    return word


@inlined
def lead(pointer):
    """How many numbers lie before the first address that can be streamed to."""
    return -front(pointer) & (line_numbers(pointer) - 1)


@primitive
def _put_bits(mask, bit, step, bits, carry):
    """Set sixteen bits of a run; give what its last byte holds so far.

    Bytes inside of the run belong to it alone. -1 is given to the first sixteen.
    """
    off = bit & 7
    if step != 1 or carry < 0:
        _or_bits(mask, bit, step, bits, LANES)
    else:
        word = carry | (bits << off)
        put(mask, bit >> 3, np.uint8(word & 255))
        put(mask, (bit >> 3) + 1, np.uint8((word >> 8) & 255))
    return bits >> (LANES - off)


@inlined
def _gated(dy, i, mask, bit, step):
    """Give sixteen numbers of dy, gone through the ReLU if there is a mask."""
    g = load(dy, i)
    if not missing(mask):
        g = keep_where(g, _bits(mask, bit + i * step, step, LANES))
    return g


# What is written of sixteen numbers, and of fewer. Loops without residual and mask are written out:
# LLVM left both to be asked for in every turn, which took rows twice as long.


@inlined
def _write(y, i, lanes, streaming):
    if streaming:
        stream(y, i, lanes)
    else:
        store(y, i, lanes)


@inlined
def normalize_lanes(
    x, residual, y, mask, bit, step, i, mean, scale, shift, rectify, streaming, carry
):
    """``y = act((x - mean) * scale + shift + residual)`` of sixteen numbers.

    `bit` is number 0's in the mask, `step` the bits from one number to the next.
    """
    z = (load(x, i) - load(mean, i)) * load(scale, i) + load(shift, i)
    if not missing(residual):
        z = z + load(residual, i)
    if rectify:
        z = relu(z)
    _write(y, i, z, streaming)
    if not missing(mask):
        carry = _put_bits(mask, bit + i * step, step, passed(z, y), carry)
    return carry


@inlined
def normalize_part(x, residual, y, mask, bit, step, i, first, last, mean, scale, shift, rectify):
    """`normalize_lanes` of lanes `first` to `last` alone."""
    if first < last:
        z = load_part(x, i, first, last) - load_part(mean, i, first, last)
        z = z * load_part(scale, i, first, last) + load_part(shift, i, first, last)
        if not missing(residual):
            z = z + load_part(residual, i, first, last)
        if rectify:
            z = relu(z)
        store_part(y, i, z, first, last)
        if not missing(mask):
            bits = passed(z, y) >> first
            _or_bits(mask, bit + (i + first) * step, step, bits, last - first)


@inlined
def gradient_lanes(
    dy, x, dx, dresidual, mask, bit, step, i,
    dy_mean, mean, slope, scale, shift, training, streaming,
):  # fmt: skip
    """``dx = ((dy - dy_mean) - (x - mean) * slope) * scale + shift`` of sixteen numbers.

    In eval mode ``dx = dy * scale``. Where there is a mask, dy goes through the ReLU first.
    """
    g = _gated(dy, i, mask, bit, step)
    if not missing(dresidual):
        store(dresidual, i, g)
    if training:
        d = (g - load(dy_mean, i)) - (load(x, i) - load(mean, i)) * load(slope, i)
        _write(dx, i, d * load(scale, i) + load(shift, i), streaming)
    else:
        _write(dx, i, g * load(scale, i), streaming)


@inlined
def gradient_part(
    dy, x, dx, dresidual, mask, bit, step, i, first, last,
    dy_mean, mean, slope, scale, shift, training,
):  # fmt: skip
    """`gradient_lanes` of lanes `first` to `last` alone."""
    if first < last:
        g = load_part(dy, i, first, last)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit + (i + first) * step, step, last - first) << first)
        if not missing(dresidual):
            store_part(dresidual, i, g, first, last)
        if training:
            d = load_part(x, i, first, last) - load_part(mean, i, first, last)
            d = (g - load_part(dy_mean, i, first, last)) - d * load_part(slope, i, first, last)
            g = d * load_part(scale, i, first, last) + load_part(shift, i, first, last)
        else:
            g = g * load_part(scale, i, first, last)
        store_part(dx, i, g, first, last)


@inlined
def _head(target, start, stop):
    """Line in which `start` lies, and which of its lanes come before `stop`: (index, first, last).

    No lanes, and where the next line begins, if the target's lines begin at `start`.
    """
    first = front(moved(target, start))
    if first == 0:
        return start - LANES, LANES, LANES
    return start - first, first, min(LANES, first + stop - start)


# Planes side by side, written from number `start` to `stop`, counted from the first of plane 0;
# `start` may lie in plane -1. Planes of fewer than sixteen places are taken one by one.

CONSTANTS = 5  # numbers per channel that writing takes, at most


@inlined
def _constants(planes, k):
    """Give plane ``k``'s constants, each sixteen times."""
    at = moved(planes, k * CONSTANTS)
    return (
        spread(get(at, 0)), spread(get(at, 1)), spread(get(at, 2)), spread(get(at, 3)),
        spread(get(at, 4)),
    )  # fmt: skip


@inlined
def _blended(a, b, count):
    """Constants of a line whose first `count` numbers belong to the first plane."""
    return (
        blend(a[0], b[0], count), blend(a[1], b[1], count), blend(a[2], b[2], count),
        blend(a[3], b[3], count), blend(a[4], b[4], count),
    )  # fmt: skip


@primitive
def normalize_run(x, residual, y, mask, bit, step, start, stop, S, constants, rectify, streaming):
    """``y = act((x - mean) * scale + shift + residual)``."""
    k = -1 if start < 0 else 0
    end = (k + 1) * S
    held = _constants(constants, k)
    i, first, last = _head(y, start, stop)
    normalize_part(
        x, residual, y, mask, bit, step, i, first, last, held[0], held[1], held[2], rectify
    )
    i += LANES
    carry = -1
    while i + LANES <= stop:
        last = i + (min(end, stop) - i) // LANES * LANES
        if missing(residual) and missing(mask):
            for j in range(i, last, LANES):
                normalize_lanes(
                    x, nothing(x), y, nothing(mask), 0, 0, j, held[0], held[1], held[2],
                    rectify, streaming, 0,
                )  # fmt: skip
        else:
            for j in range(i, last, LANES):
                carry = normalize_lanes(
                    x, residual, y, mask, bit, step, j, held[0], held[1], held[2],
                    rectify, streaming, carry,
                )  # fmt: skip
        i = last
        if i + LANES <= stop:
            k += 1
            following = _constants(constants, k)
            mixed = _blended(held, following, end - i)
            carry = normalize_lanes(
                x, residual, y, mask, bit, step, i, mixed[0], mixed[1], mixed[2], rectify,
                streaming, carry,
            )  # fmt: skip
            held = following
            end += S
            i += LANES
    if carry > 0 and step == 1:
        or_byte(mask, (bit + i) >> 3, np.uint8(carry))
    normalize_part(
        x, residual, y, mask, bit, step, i, 0, stop - i, held[0], held[1], held[2], rectify
    )


@primitive
def gradient_run(
    dy, x, dx, dresidual, mask, bit, step, start, stop, S, constants, training, streaming
):
    """``dx = ((dy - dy_mean) - (x - mean) * slope) * scale + shift``."""
    k = -1 if start < 0 else 0
    end = (k + 1) * S
    held = _constants(constants, k)
    i, first, last = _head(dx, start, stop)
    gradient_part(
        dy, x, dx, dresidual, mask, bit, step, i, first, last,
        held[0], held[1], held[2], held[3], held[4], training,
    )  # fmt: skip
    i += LANES
    while i + LANES <= stop:
        last = i + (min(end, stop) - i) // LANES * LANES
        if missing(dresidual) and missing(mask):
            for j in range(i, last, LANES):
                gradient_lanes(
                    dy, x, dx, nothing(dx), nothing(mask), 0, 0, j,
                    held[0], held[1], held[2], held[3], held[4], training, streaming,
                )  # fmt: skip
        else:
            for j in range(i, last, LANES):
                gradient_lanes(
                    dy, x, dx, dresidual, mask, bit, step, j,
                    held[0], held[1], held[2], held[3], held[4], training, streaming,
                )  # fmt: skip
        i = last
        if i + LANES <= stop:
            k += 1
            following = _constants(constants, k)
            mixed = _blended(held, following, end - i)
            gradient_lanes(
                dy, x, dx, dresidual, mask, bit, step, i,
                mixed[0], mixed[1], mixed[2], mixed[3], mixed[4], training, streaming,
            )  # fmt: skip
            held = following
            end += S
            i += LANES
    gradient_part(
        dy, x, dx, dresidual, mask, bit, step, i, 0, stop - i,
        held[0], held[1], held[2], held[3], held[4], training,
    )  # fmt: skip


# Planes side by side that are summed, each in numbers of its own: `SUMS` of them from `sums` on,
# and one shift or mean in `shifts`. `slab` gets a copy, for the sweep that writes; `ahead` is what
# will be read some kilobytes later: numbers that begin within a line touch one line more.

SUMS = LANES  # eight partial results of each of two sums


@primitive
def fetch_run(ahead, size):
    """Prefetch a run."""
    for i in range(0, size, LANES):
        prefetch(ahead, i)
    prefetch_line(ahead, size - 1)


@primitive
def sum_planes(x, ahead, step, slab, slab_step, count, size, shifts, shift_step, sums):
    """Add deviations and their squares."""
    pairs, whole = size // (2 * LANES) * (2 * LANES), size // LANES * LANES
    for j in range(count):
        k = spread(get(shifts, j * shift_step))
        total = squares = total_b = squares_b = spread(0.0)
        for i in range(0, pairs, 2 * LANES):
            prefetch(ahead, i)
            prefetch(ahead, i + LANES)
            d, d_b = wide(load(x, i)) - k, wide(load(x, i + LANES)) - k
            if not missing(slab):
                transfer(slab, i, x, i)
                transfer(slab, i + LANES, x, i + LANES)
            total, squares = total + d, squares + d * d
            total_b, squares_b = total_b + d_b, squares_b + d_b * d_b
        if pairs < whole:
            prefetch(ahead, pairs)
            d = wide(load(x, pairs)) - k
            if not missing(slab):
                transfer(slab, pairs, x, pairs)
            total, squares = total + d, squares + d * d
        if whole < size:
            d = keep_first(wide(load_part(x, whole, 0, size - whole)) - k, size - whole)
            if not missing(slab):
                transfer_first(slab, whole, x, whole, size - whole)
            total_b, squares_b = total_b + d, squares_b + d * d
        prefetch_line(ahead, size - 1)
        both = halves(total + total_b, squares + squares_b)
        store(sums, j * SUMS, load(sums, j * SUMS) + both)
        x, ahead = moved(x, step), moved(ahead, step)
        if not missing(slab):
            slab = moved(slab, slab_step)


@inlined
def _add_products(dy, x, slab_dy, slab_x, mask, bit, step, i, k, total, product):
    """Add dy and dy * (x - mean) of sixteen numbers, and keep both in the slab if there is one."""
    g = _gated(dy, i, mask, bit, step)
    if not missing(slab_x):
        store(slab_dy, i, g)
        transfer(slab_x, i, x, i)
    return total + wide(g), product + wide(g) * (wide(load(x, i)) - k)


@primitive
def product_planes(
    dy, ahead_dy, dy_step, x, ahead_x, x_step, slab_dy, slab_x, slab_step,
    mask, bit, bit_step, step, count, size, shifts, shift_step, sums,
):  # fmt: skip
    """Add dy and dy * (x - mean), dy having gone through the ReLU if there is a mask."""
    whole = size // LANES * LANES
    for j in range(count):
        k = spread(get(shifts, j * shift_step))
        total = product = spread(0.0)
        if missing(mask):
            for i in range(0, whole, LANES):
                prefetch(ahead_dy, i)
                prefetch(ahead_x, i)
                total, product = _add_products(
                    dy, x, slab_dy, slab_x, nothing(mask), 0, 0, i, k, total, product
                )
        else:
            for i in range(0, whole, LANES):
                prefetch(ahead_dy, i)
                prefetch(ahead_x, i)
                total, product = _add_products(
                    dy, x, slab_dy, slab_x, mask, bit, step, i, k, total, product
                )
        if whole < size:
            g = load_part(dy, whole, 0, size - whole)
            if not missing(mask):
                g = keep_where(g, _bits(mask, bit + whole * step, step, size - whole))
            d = keep_first(wide(load_part(x, whole, 0, size - whole)) - k, size - whole)
            if not missing(slab_x):
                store_part(slab_dy, whole, g, 0, size - whole)
                transfer_first(slab_x, whole, x, whole, size - whole)
            total, product = total + wide(g), product + wide(g) * d
        prefetch_line(ahead_dy, size - 1)
        prefetch_line(ahead_x, size - 1)
        store(sums, j * SUMS, load(sums, j * SUMS) + halves(total, product))
        dy, ahead_dy, bit = moved(dy, dy_step), moved(ahead_dy, dy_step), bit + bit_step
        x, ahead_x = moved(x, x_step), moved(ahead_x, x_step)
        if not missing(slab_x):
            slab_dy, slab_x = moved(slab_dy, slab_step), moved(slab_x, slab_step)


@inlined
def both_sums(sums, k):
    """Give both sums of plane ``k``."""
    at = moved(sums, k * SUMS)
    return _eight(at), _eight(moved(at, LANES // 2))


@inlined
def _eight(at):
    return ((get(at, 0) + get(at, 1)) + (get(at, 2) + get(at, 3))) + (
        (get(at, 4) + get(at, 5)) + (get(at, 6) + get(at, 7))
    )


@inlined
def keep_front(slab, x, count):
    """Copy the `count` numbers before x, which share the line of a target's first number."""
    if count > 0:
        transfer_first(slab, -count, x, -count, count)


@primitive
def keep_gated_front(slab_dy, slab_x, dy, x, mask, bit, step, count):
    """`keep_front` of dy through the ReLU, and of x."""
    if count > 0:
        g = load_part(dy, -count, 0, count)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit - count * step, step, count))
        store_part(slab_dy, -count, g, 0, count)
        transfer_first(slab_x, -count, x, -count, count)


# Rows of columns, each of which has sums and constants of its own. Steps go from row to row.

COLUMNS = 64  # of one channel each, whose sums registers can hold


@primitive
def sum_columns(x, step, ahead, ahead_step, rows, shift, total, squares):
    """Add deviations and their squares to the sums of `COLUMNS` columns."""
    k, k_b = load(shift, 0), load(shift, LANES)
    k_c, k_d = load(shift, 2 * LANES), load(shift, 3 * LANES)
    t, t_b = load(total, 0), load(total, LANES)
    t_c, t_d = load(total, 2 * LANES), load(total, 3 * LANES)
    q, q_b = load(squares, 0), load(squares, LANES)
    q_c, q_d = load(squares, 2 * LANES), load(squares, 3 * LANES)
    for r in range(rows):
        row = moved(x, r * step)
        for i in range(0, COLUMNS, LANES):
            prefetch(moved(ahead, r * ahead_step), i)
        prefetch_line(ahead, r * ahead_step + COLUMNS - 1)
        d, d_b = wide(load(row, 0)) - k, wide(load(row, LANES)) - k_b
        d_c, d_d = wide(load(row, 2 * LANES)) - k_c, wide(load(row, 3 * LANES)) - k_d
        t, t_b, t_c, t_d = t + d, t_b + d_b, t_c + d_c, t_d + d_d
        q, q_b, q_c, q_d = q + d * d, q_b + d_b * d_b, q_c + d_c * d_c, q_d + d_d * d_d
    store(total, 0, t)
    store(total, LANES, t_b)
    store(total, 2 * LANES, t_c)
    store(total, 3 * LANES, t_d)
    store(squares, 0, q)
    store(squares, LANES, q_b)
    store(squares, 2 * LANES, q_c)
    store(squares, 3 * LANES, q_d)


@primitive
def sum_few_columns(x, step, ahead, ahead_step, rows, count, shift, total, squares):
    """`sum_columns` of sixteen columns or fewer."""
    k, t, q = load(shift, 0), load(total, 0), load(squares, 0)
    for r in range(rows):
        prefetch_line(ahead, r * ahead_step)
        d = keep_first(wide(load_part(x, r * step, 0, count)) - k, count)
        t, q = t + d, q + d * d
    store(total, 0, t)
    store(squares, 0, q)


@inlined
def _fetch_columns(ahead, at):
    """Prefetch `COLUMNS` columns of a row."""
    for i in range(0, COLUMNS, LANES):
        prefetch(ahead, at + i)
    prefetch_line(ahead, at + COLUMNS - 1)


@inlined
def _product_columns(
    dy, dy_step, x, x_step, ahead_dy, ahead_dy_step, ahead_x, ahead_x_step,
    mask, bit, bit_row, step, rows, mean, total, product,
):  # fmt: skip
    k, k_b = load(mean, 0), load(mean, LANES)
    k_c, k_d = load(mean, 2 * LANES), load(mean, 3 * LANES)
    t, t_b = load(total, 0), load(total, LANES)
    t_c, t_d = load(total, 2 * LANES), load(total, 3 * LANES)
    p, p_b = load(product, 0), load(product, LANES)
    p_c, p_d = load(product, 2 * LANES), load(product, 3 * LANES)
    no = nothing(x)
    for r in range(rows):
        row, row_dy, at = moved(x, r * x_step), moved(dy, r * dy_step), bit + r * bit_row
        _fetch_columns(ahead_dy, r * ahead_dy_step)
        _fetch_columns(ahead_x, r * ahead_x_step)
        t, p = _add_products(row_dy, row, no, no, mask, at, step, 0, k, t, p)
        t_b, p_b = _add_products(row_dy, row, no, no, mask, at, step, LANES, k_b, t_b, p_b)
        t_c, p_c = _add_products(row_dy, row, no, no, mask, at, step, 2 * LANES, k_c, t_c, p_c)
        t_d, p_d = _add_products(row_dy, row, no, no, mask, at, step, 3 * LANES, k_d, t_d, p_d)
    store(total, 0, t)
    store(total, LANES, t_b)
    store(total, 2 * LANES, t_c)
    store(total, 3 * LANES, t_d)
    store(product, 0, p)
    store(product, LANES, p_b)
    store(product, 2 * LANES, p_c)
    store(product, 3 * LANES, p_d)


@primitive
def product_columns(
    dy, dy_step, x, x_step, ahead_dy, ahead_dy_step, ahead_x, ahead_x_step,
    mask, bit, bit_row, step, rows, mean, total, product,
):  # fmt: skip
    """Add dy and dy * (x - mean) to the sums of `COLUMNS` columns."""
    if missing(mask):
        _product_columns(
            dy, dy_step, x, x_step, ahead_dy, ahead_dy_step, ahead_x, ahead_x_step,
            nothing(mask), 0, 0, 0, rows, mean, total, product,
        )  # fmt: skip
    else:
        _product_columns(
            dy, dy_step, x, x_step, ahead_dy, ahead_dy_step, ahead_x, ahead_x_step,
            mask, bit, bit_row, step, rows, mean, total, product,
        )  # fmt: skip


@primitive
def product_few_columns(
    dy, dy_step, x, x_step, ahead_dy, ahead_dy_step, ahead_x, ahead_x_step,
    mask, bit, bit_row, step, rows, count, mean, total, product,
):  # fmt: skip
    """`product_columns` of sixteen columns or fewer."""
    k, t, p = load(mean, 0), load(total, 0), load(product, 0)
    for r in range(rows):
        prefetch_line(ahead_dy, r * ahead_dy_step)
        prefetch_line(ahead_x, r * ahead_x_step)
        g = load_part(dy, r * dy_step, 0, count)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit + r * bit_row, step, count))
        d = keep_first(wide(load_part(x, r * x_step, 0, count)) - k, count)
        t, p = t + wide(g), p + wide(g) * d
    store(total, 0, t)
    store(product, 0, p)


@primitive
def product_of(dy, x, mask, bit, mean):
    """Give dy, gone through the ReLU if there is a mask, and dy * (x - mean), of one number."""
    g, value = np.float64(computed(dy, 0)), np.float64(computed(x, 0))
    if not missing(mask) and _bits(mask, bit, 1, 1) & 1 == 0:
        g = 0.0
    return g, g * (value - mean)


@primitive
def column_moments(width, count, shift, total, squares, mean, m2):
    """`moments` of columns; there is room for whole Lanes of all of them."""
    n = spread(np.float64(count))
    for k in range(0, width, LANES):
        t = load(total, k)
        store(mean, k, load(shift, k) + t / n)
        store(m2, k, load(squares, k) - t * (t / n))


@inlined
def merge_columns(count, mean, m2, count_b, mean_b, m2_b):
    """`merge` of sixteen columns."""
    part = count_b / (count + count_b)
    delta = mean_b - mean
    step = keep_finite(delta * spread(part), mean_b)
    return count + count_b, mean + step, m2 + m2_b + delta * delta * spread(count * part)


TARGET_AHEAD = 16  # rows from what is written to a broken line that is fetched


@primitive
def normalize_block(
    x, x_step, residual, residual_step, y, y_step, mask, bit, bit_row, step,
    rows, width, fronts, tails, mean, scale, shift, rectify, streaming,
):  # fmt: skip
    """``y = act((x - mean) * scale + shift + residual)``.

    Rows from `fronts` on begin with the line in which their first column lies; the first `tails`
    rows leave the line in which they end to what follows. Lines that are written in part are
    fetched in time: stores behind them would wait.
    """
    for r in range(rows):
        row, to, at = moved(x, r * x_step), moved(y, r * y_step), bit + r * bit_row
        plus = residual if missing(residual) else moved(residual, r * residual_step)
        i, stop, carry = -front(to), width, -1
        if r < tails:
            stop -= front(moved(to, width))
        else:
            prefetch_target(moved(to, TARGET_AHEAD * y_step), width)
        if r < fronts and i < 0:
            prefetch_target(moved(to, TARGET_AHEAD * y_step), 0)
            normalize_part(
                row, plus, to, mask, at, step, i, -i, min(LANES, stop - i),
                mean, scale, shift, rectify,
            )  # fmt: skip
            i += LANES
        last = i + (stop - i) // LANES * LANES
        if missing(residual) and missing(mask):
            for j in range(i, last, LANES):
                normalize_lanes(
                    row, nothing(x), to, nothing(mask), 0, 0, j, mean, scale, shift,
                    rectify, streaming, 0,
                )  # fmt: skip
        else:
            for j in range(i, last, LANES):
                carry = normalize_lanes(
                    row, plus, to, mask, at, step, j, mean, scale, shift, rectify, streaming, carry
                )
        i = max(i, last)
        if carry > 0 and step == 1:
            or_byte(mask, (at + i) >> 3, np.uint8(carry))
        normalize_part(row, plus, to, mask, at, step, i, 0, stop - i, mean, scale, shift, rectify)


@primitive
def gradient_block(
    dy, dy_step, x, x_step, dx, dx_step, dresidual, dresidual_step, mask, bit, bit_row, step,
    rows, width, fronts, tails, dy_mean, mean, slope, scale, shift, training, streaming,
):  # fmt: skip
    """``dx = ((dy - dy_mean) - (x - mean) * slope) * scale + shift``, as `normalize_block`."""
    for r in range(rows):
        row_dy, row, to, at = (
            moved(dy, r * dy_step), moved(x, r * x_step), moved(dx, r * dx_step), bit + r * bit_row
        )  # fmt: skip
        passed_on = dresidual if missing(dresidual) else moved(dresidual, r * dresidual_step)
        i, stop = -front(to), width
        if r < tails:
            stop -= front(moved(to, width))
        else:
            prefetch_target(moved(to, TARGET_AHEAD * dx_step), width)
        if r < fronts and i < 0:
            prefetch_target(moved(to, TARGET_AHEAD * dx_step), 0)
            gradient_part(
                row_dy, row, to, passed_on, mask, at, step, i, -i, min(LANES, stop - i),
                dy_mean, mean, slope, scale, shift, training,
            )  # fmt: skip
            i += LANES
        last = i + (stop - i) // LANES * LANES
        if missing(dresidual) and missing(mask):
            for j in range(i, last, LANES):
                gradient_lanes(
                    row_dy, row, to, nothing(dx), nothing(mask), 0, 0, j,
                    dy_mean, mean, slope, scale, shift, training, streaming,
                )  # fmt: skip
        else:
            for j in range(i, last, LANES):
                gradient_lanes(
                    row_dy, row, to, passed_on, mask, at, step, j,
                    dy_mean, mean, slope, scale, shift, training, streaming,
                )  # fmt: skip
        i = max(i, last)
        gradient_part(
            row_dy, row, to, passed_on, mask, at, step, i, 0, stop - i,
            dy_mean, mean, slope, scale, shift, training,
        )  # fmt: skip


# Channels that are summed, and what writing takes of them.


@inlined
def finish_forward(x, c, count, mean, m2, parameters, settings):
    """Save a channel's statistics; give its constants of `normalize_run`."""
    invstd = inverse(m2 / count, settings.eps)
    set_number(parameters.mean, c, mean)
    set_number(parameters.invstd, c, invstd)
    update_running(parameters.running_mean, c, mean, settings.momentum)
    unbiased = m2 / (count - settings.correction)
    update_running(parameters.running_var, c, unbiased, settings.momentum)
    weight, bias = number_or(parameters.weight, c, 1.0), number_or(parameters.bias, c, 0.0)
    return affine(x.data, mean, invstd, weight, bias)


@inlined
def running_affine(x, c, parameters, settings):
    """Give a channel's constants of `normalize_run` in inference."""
    mean, var = number(parameters.running_mean, c), number(parameters.running_var, c)
    weight, bias = number_or(parameters.weight, c, 1.0), number_or(parameters.bias, c, 0.0)
    return affine(x.data, mean, inverse(var, settings.eps), weight, bias)


@inlined
def finish_backward(x, c, count, total, product, gradients):
    """Save a channel's gradients by weight and bias; give its constants of `gradient_run`."""
    mean, invstd = number(gradients.mean, c), number(gradients.invstd, c)
    set_number(gradients.dweight, c, product * invstd)
    set_number(gradients.dbias, c, total)
    weight = number_or(gradients.weight, c, 1.0)
    return gradient_affine(x.data, mean, invstd, weight, total / count, product / count)


# Where things lie, and whose they are.


@inlined
def element(view, n, c, s):
    """Pointer to an element; null if the view is None."""
    if missing(view.data):
        return view.data
    return moved(view.data, n * view.dn + c * view.dc + s * view.ds)


@inlined
def share(tasks, t, threads):
    """First and last of a thread's tasks."""
    return tasks * t // threads, tasks * (t + 1) // threads


@primitive
def spares_of(memory, t):
    """Memory of one block, with the spare tiles and the sums of one thread."""
    return Memory(
        memory.slab, displaced(memory.spares, t), displaced(memory.sums, t),
        memory.constants, memory.partials,
    )  # fmt: skip


@primitive
def of_thread(memory, t):
    """Memory of a thread that has a block of its own."""
    return Memory(
        displaced(memory.slab, t),
        displaced(memory.spares, t),
        displaced(memory.sums, t),
        displaced(memory.constants, t),
        displaced(memory.partials, t),
    )


# Numbers that do not lie side by side.


@primitive
def gather(source, step, tile, size):
    """``tile[i] = source[i * step]``."""
    for i in range(size):
        put(tile, i, get(source, i * step))


@primitive
def scatter(tile, target, step, size):
    """``target[i * step] = tile[i]``."""
    for i in range(size):
        put(target, i * step, get(tile, i))


# What the formulas need of a channel.


@inlined
def number_or(array, c, default):
    """Give a channel's number, or what it is without an array."""
    return default if missing(array.data) else number(array, c)


@inlined
def inverse(var, eps):
    """Give ``invstd``."""
    return 1.0 / np.sqrt(var + eps)


@inlined
def update_running(running, c, batch, momentum):
    """Move a channel's running average, if there is one, towards the batch's."""
    if not missing(running.data):
        set_number(running, c, (1.0 - momentum) * number(running, c) + momentum * batch)


@inlined
def affine(x, mean, invstd, weight, bias):
    """Give mean, scale and shift as x is computed: what high loses of the mean, shift has.

    ``x - high`` is exact near the mean (Sterbenz), at any offset.
    """
    high = rounded(mean, x)
    scale = rounded(weight * invstd, x)
    return high, scale, rounded(bias - (mean - high) * scale, x)


@inlined
def gradient_affine(x, mean, invstd, weight, dy_mean, product_mean):
    """Give the constants of `gradient_run` as x is computed, both means split as in `affine`.

    Ioffe & Szegedy (2015), section 3, the gradients of the loss, gathered by x and dy.
    """
    dy_high = rounded(dy_mean, x)
    high = rounded(mean, x)
    slope = product_mean * invstd * invstd
    scale = weight * invstd
    shift = ((mean - high) * slope - (dy_mean - dy_high)) * scale
    return dy_high, high, rounded(slope, x), rounded(scale, x), rounded(shift, x)
