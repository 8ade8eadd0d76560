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
    LINE,
    address,
    computed,
    get,
    itemsize,
    keep_first,
    keep_where,
    load,
    load_first,
    missing,
    moved,
    nothing,
    or_byte,
    passed,
    prefetch,
    put,
    relu,
    rounded,
    spread,
    store,
    store_first,
    stream,
    together,
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


@primitive
def moments(count, shift, total, squares):
    """Mean and M2 from the sums of deviations, and of their squares, from `shift`."""
    return shift + total / count, squares - total * total / count


@primitive
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
    line = min(LINE, LANES * itemsize(pointer))
    return (-address(pointer) % line) // itemsize(pointer)


# Runs that are written.


@inlined
def normalize_run(x, residual, y, mask, bit, step, size, mean, scale, shift, rectify, streaming):
    """``y = act((x - mean) * scale + shift + residual)``.

    `bit` is the first element's in the mask, `step` the bits from one element to the next.
    """
    first = 0
    if streaming:
        first = min(size, lead(y))
        _normalize_part(x, residual, y, mask, bit, step, 0, first, mean, scale, shift, rectify)
    last = first + (size - first) // LANES * LANES
    if not missing(mask):
        _normalize_masked(
            x, residual, y, mask, bit, step, first, last, mean, scale, shift, streaming
        )
    elif not missing(residual):
        for i in range(first, last, LANES):
            z = (load(x, i) - load(mean, i)) * load(scale, i) + load(shift, i) + load(residual, i)
            if rectify:
                z = relu(z)
            if streaming:
                stream(y, i, z)
            else:
                store(y, i, z)
    elif streaming:
        for i in range(first, last, LANES):
            z = (load(x, i) - load(mean, i)) * load(scale, i) + load(shift, i)
            if rectify:
                z = relu(z)
            stream(y, i, z)
    else:
        for i in range(first, last, LANES):
            z = (load(x, i) - load(mean, i)) * load(scale, i) + load(shift, i)
            if rectify:
                z = relu(z)
            store(y, i, z)
    _normalize_part(x, residual, y, mask, bit, step, last, size - last, mean, scale, shift, rectify)


@inlined
def _normalize_part(x, residual, y, mask, bit, step, i, count, mean, scale, shift, rectify):
    """`normalize_run` of fewer than sixteen numbers."""
    if count > 0:
        z = load_first(x, i, count) - load_first(mean, i, count)
        z = z * load_first(scale, i, count) + load_first(shift, i, count)
        if not missing(residual):
            z = z + load_first(residual, i, count)
        if rectify:
            z = relu(z)
        store_first(y, i, z, count)
        if not missing(mask):
            _or_bits(mask, bit + i * step, step, passed(z, y), count)


@primitive
def _normalize_masked(x, residual, y, mask, bit, step, first, last, mean, scale, shift, streaming):
    """Whole lanes of a `normalize_run` with a ReLU, whose bits are written beside.

    Bytes inside of the run belong to it alone; what a byte still lacks is carried on.
    """
    carry, off = 0, (bit + first) & 7
    for i in range(first, last, LANES):
        z = (load(x, i) - load(mean, i)) * load(scale, i) + load(shift, i)
        if not missing(residual):
            z = z + load(residual, i)
        z = relu(z)
        if streaming:
            stream(y, i, z)
        else:
            store(y, i, z)
        bits = passed(z, y)
        if step != 1 or i == first:
            _or_bits(mask, bit + i * step, step, bits, LANES)
        else:
            word = carry | (bits << off)
            put(mask, (bit + i) >> 3, np.uint8(word & 255))
            put(mask, ((bit + i) >> 3) + 1, np.uint8((word >> 8) & 255))
        carry = bits >> (LANES - off)
    if step == 1 and off and carry:
        or_byte(mask, (bit + last) >> 3, np.uint8(carry))


@inlined
def gradient_run(
    dy, x, dx, dresidual, mask, bit, step, size,
    dy_mean, mean, slope, scale, shift, training, streaming,
):  # fmt: skip
    """``dx = ((dy - dy_mean) - (x - mean) * slope) * scale + shift``.

    In eval mode ``dx = dy * scale``. Where there is a mask, dy goes through the ReLU first.
    """
    first = 0
    if streaming:
        first = min(size, lead(dx))
        _gradient_part(
            dy, x, dx, dresidual, mask, bit, step, 0, first,
            dy_mean, mean, slope, scale, shift, training,
        )  # fmt: skip
    last = first + (size - first) // LANES * LANES
    if missing(mask) and missing(dresidual) and training:
        if streaming:
            for i in range(first, last, LANES):
                d = (load(dy, i) - load(dy_mean, i)) - (load(x, i) - load(mean, i)) * load(slope, i)
                stream(dx, i, d * load(scale, i) + load(shift, i))
        else:
            for i in range(first, last, LANES):
                d = (load(dy, i) - load(dy_mean, i)) - (load(x, i) - load(mean, i)) * load(slope, i)
                store(dx, i, d * load(scale, i) + load(shift, i))
    else:
        for i in range(first, last, LANES):
            g = load(dy, i)
            if not missing(mask):
                g = keep_where(g, _bits(mask, bit + i * step, step, LANES))
            if not missing(dresidual):
                store(dresidual, i, g)
            if training:
                d = (g - load(dy_mean, i)) - (load(x, i) - load(mean, i)) * load(slope, i)
                g = d * load(scale, i) + load(shift, i)
            else:
                g = g * load(scale, i)
            if streaming:
                stream(dx, i, g)
            else:
                store(dx, i, g)
    _gradient_part(
        dy, x, dx, dresidual, mask, bit, step, last, size - last,
        dy_mean, mean, slope, scale, shift, training,
    )  # fmt: skip


@inlined
def _gradient_part(
    dy, x, dx, dresidual, mask, bit, step, i, count,
    dy_mean, mean, slope, scale, shift, training,
):  # fmt: skip
    """`gradient_run` of fewer than sixteen numbers."""
    if count > 0:
        g = load_first(dy, i, count)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit + i * step, step, count))
        if not missing(dresidual):
            store_first(dresidual, i, g, count)
        if training:
            d = load_first(x, i, count) - load_first(mean, i, count)
            d = (g - load_first(dy_mean, i, count)) - d * load_first(slope, i, count)
            g = d * load_first(scale, i, count) + load_first(shift, i, count)
        else:
            g = g * load_first(scale, i, count)
        store_first(dx, i, g, count)


# Runs of one channel that are summed. `slab` gets a copy, for the sweep that writes; `ahead` is
# what will be read some kilobytes later.


@inlined
def sum_run(x, ahead, slab, size, shift, sums):
    """Add deviations and their squares to `sums`: two totals, two sums of squares."""
    total, squares, total_b, squares_b = sums
    pairs, whole = size // (2 * LANES) * (2 * LANES), size // LANES * LANES
    for i in range(0, pairs, 2 * LANES):
        prefetch(ahead, i)
        prefetch(ahead, i + LANES)
        d, d_b = wide(load(x, i)) - shift, wide(load(x, i + LANES)) - shift
        if not missing(slab):
            transfer(slab, i, x, i)
            transfer(slab, i + LANES, x, i + LANES)
        total, squares = total + d, squares + d * d
        total_b, squares_b = total_b + d_b, squares_b + d_b * d_b
    if pairs < whole:
        prefetch(ahead, pairs)
        d = wide(load(x, pairs)) - shift
        if not missing(slab):
            transfer(slab, pairs, x, pairs)
        total, squares = total + d, squares + d * d
    if whole < size:
        prefetch(ahead, whole)
        d = keep_first(wide(load_first(x, whole, size - whole)) - shift, size - whole)
        if not missing(slab):
            transfer_first(slab, whole, x, whole, size - whole)
        total, squares = total + d, squares + d * d
    return total, squares, total_b, squares_b


@inlined
def product_run(dy, x, ahead_dy, ahead_x, slab_dy, slab_x, mask, bit, step, size, mean, sums):
    """Add dy and dy * (x - mean) to `sums`, dy having gone through the ReLU if there is a mask."""
    total, product = sums
    whole = size // LANES * LANES
    for i in range(0, whole, LANES):
        prefetch(ahead_dy, i)
        prefetch(ahead_x, i)
        g = load(dy, i)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit + i * step, step, LANES))
        d = wide(load(x, i)) - mean
        if not missing(slab_x):
            store(slab_dy, i, g)
            transfer(slab_x, i, x, i)
        total, product = total + wide(g), product + wide(g) * d
    if whole < size:
        count = size - whole
        g = load_first(dy, whole, count)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit + whole * step, step, count))
        d = keep_first(wide(load_first(x, whole, count)) - mean, count)
        if not missing(slab_x):
            store_first(slab_dy, whole, g, count)
            transfer_first(slab_x, whole, x, whole, count)
        total, product = total + wide(g), product + wide(g) * d
    return total, product


# Columns: some rows of sixteen columns, each of which has sums of its own. The step goes from one
# row to the next.


@inlined
def sum_columns(x, step, ahead, ahead_step, slab, slab_step, rows, count, shift, total, squares):
    """Add deviations and their squares to the sums of the first `count` columns."""
    k, t, q = load(shift, 0), load(total, 0), load(squares, 0)
    for r in range(rows):
        prefetch(ahead, r * ahead_step)
        if count == LANES:
            d = wide(load(x, r * step)) - k
            if not missing(slab):
                transfer(slab, r * slab_step, x, r * step)
        else:
            d = keep_first(wide(load_first(x, r * step, count)) - k, count)
            if not missing(slab):
                transfer_first(slab, r * slab_step, x, r * step, count)
        t, q = t + d, q + d * d
    store(total, 0, t)
    store(squares, 0, q)


@inlined
def product_columns(
    dy, dy_step, x, x_step, ahead_dy, ahead_dy_step, ahead_x, ahead_x_step,
    slab_dy, slab_x, slab_step, mask, bit, bit_row, step, rows, count, mean, total, product,
):  # fmt: skip
    """Add dy and dy * (x - mean) to the sums of the first `count` columns."""
    k, t, p = load(mean, 0), load(total, 0), load(product, 0)
    for r in range(rows):
        prefetch(ahead_dy, r * ahead_dy_step)
        prefetch(ahead_x, r * ahead_x_step)
        if count == LANES:
            g, d = load(dy, r * dy_step), wide(load(x, r * x_step)) - k
        else:
            g = load_first(dy, r * dy_step, count)
            d = keep_first(wide(load_first(x, r * x_step, count)) - k, count)
        if not missing(mask):
            g = keep_where(g, _bits(mask, bit + r * bit_row, step, count))
        if not missing(slab_x):
            if count == LANES:
                store(slab_dy, r * slab_step, g)
                transfer(slab_x, r * slab_step, x, r * x_step)
            else:
                store_first(slab_dy, r * slab_step, g, count)
                transfer_first(slab_x, r * slab_step, x, r * x_step, count)
        t, p = t + wide(g), p + wide(g) * d
    store(total, 0, t)
    store(product, 0, p)


@primitive
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


@primitive
def running_affine(x, c, parameters, settings):
    """Give a channel's constants of `normalize_run` in inference."""
    mean, var = number(parameters.running_mean, c), number(parameters.running_var, c)
    weight, bias = number_or(parameters.weight, c, 1.0), number_or(parameters.bias, c, 0.0)
    return affine(x.data, mean, inverse(var, settings.eps), weight, bias)


@primitive
def finish_backward(x, c, count, total, product, gradients):
    """Save a channel's gradients by weight and bias; give its constants of `gradient_run`."""
    mean, invstd = number(gradients.mean, c), number(gradients.invstd, c)
    set_number(gradients.dweight, c, product * invstd)
    set_number(gradients.dbias, c, total)
    weight = number_or(gradients.weight, c, 1.0)
    return gradient_affine(x.data, mean, invstd, weight, total / count, product / count)


@primitive
def sum_of(numbers, at, count):
    """Sum of `count` numbers from `at` on."""
    total = spread(0.0)
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        total = total + load(numbers, at + i)
    return together(total + load_first(numbers, at + whole, count - whole))


@inlined
def normalize_columns(
    x, x_step, residual, residual_step, y, y_step, mask, rows, count,
    mean, scale, shift, rectify, streaming,
):  # fmt: skip
    """`normalize_run` of some rows of the first `count` columns, without a mask."""
    if count < LANES:
        for r in range(rows):
            row = missing(residual)
            _normalize_part(
                moved(x, r * x_step), residual if row else moved(residual, r * residual_step),
                moved(y, r * y_step), nothing(mask), 0, 1, 0, count, mean, scale, shift, rectify,
            )  # fmt: skip
        return
    m, a, b = load(mean, 0), load(scale, 0), load(shift, 0)
    for r in range(rows):
        z = (load(x, r * x_step) - m) * a + b
        if not missing(residual):
            z = z + load(residual, r * residual_step)
        if rectify:
            z = relu(z)
        if streaming:
            stream(y, r * y_step, z)
        else:
            store(y, r * y_step, z)


@inlined
def gradient_columns(
    dy, dy_step, x, x_step, dx, dx_step, mask, rows, count,
    dy_mean, mean, slope, scale, shift, streaming,
):  # fmt: skip
    """`gradient_run` of some rows of the first `count` columns, in training, without a mask."""
    if count < LANES:
        for r in range(rows):
            _gradient_part(
                moved(dy, r * dy_step), moved(x, r * x_step), moved(dx, r * dx_step), nothing(dx),
                nothing(mask), 0, 1, 0, count, dy_mean, mean, slope, scale, shift, True,
            )  # fmt: skip
        return
    dy_m, m, k = load(dy_mean, 0), load(mean, 0), load(slope, 0)
    a, b = load(scale, 0), load(shift, 0)
    for r in range(rows):
        d = (load(dy, r * dy_step) - dy_m) - (load(x, r * x_step) - m) * k
        if streaming:
            stream(dx, r * dx_step, d * a + b)
        else:
            store(dx, r * dx_step, d * a + b)


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
    return Memory(memory.slab, displaced(memory.spares, t), displaced(memory.sums, t), memory.work)


@primitive
def of_thread(memory, t):
    """Memory of a thread that has a block of its own."""
    return Memory(
        displaced(memory.slab, t),
        displaced(memory.spares, t),
        displaced(memory.sums, t),
        displaced(memory.work, t),
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


@primitive
def number_or(array, c, default):
    """Give a channel's number, or what it is without an array."""
    return default if missing(array.data) else number(array, c)


@primitive
def inverse(var, eps):
    """Give ``invstd``."""
    return 1.0 / np.sqrt(var + eps)


@primitive
def update_running(running, c, batch, momentum):
    """Move a channel's running average, if there is one, towards the batch's."""
    if not missing(running.data):
        set_number(running, c, (1.0 - momentum) * number(running, c) + momentum * batch)


@primitive
def affine(x, mean, invstd, weight, bias):
    """Give mean, scale and shift as x is computed: what high loses of the mean, shift has.

    ``x - high`` is exact near the mean (Sterbenz), at any offset.
    """
    high = rounded(mean, x)
    scale = rounded(weight * invstd, x)
    return high, scale, rounded(bias - (mean - high) * scale, x)


@primitive
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
