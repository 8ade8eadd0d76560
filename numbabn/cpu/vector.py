"""Row primitives: what is done to one contiguous stretch of memory, which LLVM can vectorize.

Sums run in float64 whatever the data are. Deviations are taken from an element of the stretch
itself, so that with ``n`` elements cancellation costs at most a factor ``n`` of float64's 2**-53:
``(x[0] - mean)**2`` cannot exceed ``m2``.
"""

import numpy as np
from numba import types
from numba.extending import overload

from .intrinsics import OCTET, as_computed, keep_where, narrow, or_byte, positive_bits, wide
from .schedule import primitive, summing


@primitive
def _deviation(x, shift):
    """``x - shift``, which a sum around it may not take apart."""
    return np.float64(wide(x)) - shift


@primitive
def _if_finite(value, other):
    return value if np.isfinite(value) else other


@primitive
def _shift(x):
    """Choose what to take deviations from: the value, unless all would be infinite."""
    return _if_finite(np.float64(wide(x)), 0.0)


@summing
def moments(x):  # x [n] -> mean, M2
    shift = _shift(x[0])
    total = 0.0
    squares = 0.0
    for i in range(x.size):
        d = _deviation(x[i], shift)
        total += d
        squares += d * d
    return shift + total / x.size, squares - total * total / x.size


@primitive
def merge(count, mean, m2, count_b, mean_b, m2_b):
    """Chan, Golub & LeVeque (1983), eq. 2.1: the moments of two samples taken together."""
    together = count + count_b
    part = count_b / together
    delta = mean_b - mean
    # Beside an infinite mean the step is not a number, where the sum still is infinite.
    step = _if_finite(delta * part, mean_b)
    return together, mean + step, m2 + m2_b + delta * delta * (count * part)


@primitive
def normalize(x, residual, y, mean, scale, shift, relu):  # x, residual, y [n]
    for i in range(x.size):
        z = (wide(x[i]) - mean) * scale + shift
        if residual is not None:
            z += wide(residual[i])
        if relu and z <= 0:
            z = as_computed(0.0, x)
        y[i] = narrow(z, y)


@primitive
def normalize_columns(x, residual, y, mean, scale, shift, relu):  # all [c]
    for i in range(x.size):
        z = (wide(x[i]) - mean[i]) * scale[i] + shift[i]
        if residual is not None:
            z += wide(residual[i])
        if relu and z <= 0:
            z = as_computed(0.0, x)
        y[i] = narrow(z, y)


@summing
def products(dy, x, mean):  # dy, x [n] -> sum of dy, sum of dy * (x - mean)
    total = 0.0
    product = 0.0
    for i in range(x.size):
        g = np.float64(wide(dy[i]))
        total += g
        product += g * _deviation(x[i], mean)
    return total, product


@primitive
def input_gradient(dy, x, dx, dy_mean, mean, slope, scale, shift):  # dy, x, dx [n]
    for i in range(x.size):
        d = (wide(dy[i]) - dy_mean) - (wide(x[i]) - mean) * slope
        dx[i] = narrow(d * scale + shift, dx)


@primitive
def input_gradient_columns(dy, x, dx, dy_mean, mean, slope, scale, shift):  # all [c]
    for i in range(x.size):
        d = (wide(dy[i]) - dy_mean[i]) - (wide(x[i]) - mean[i]) * slope[i]
        dx[i] = narrow(d * scale[i] + shift[i], dx)


@primitive
def start_columns(x, shift):  # x, shift [c]
    for i in range(x.size):
        shift[i] = _shift(x[i])


@primitive
def sum_columns(x, shift, total, squares):  # all [c]
    for i in range(x.size):
        d = _deviation(x[i], shift[i])
        total[i] += d
        squares[i] += d * d


@primitive
def finish_columns(rows, shift, total, squares):  # all [c]
    """Turn the shifted sums of ``rows`` rows into their mean and M2, in place."""
    for i in range(shift.size):
        squares[i] -= total[i] * total[i] / rows
        total[i] = shift[i] + total[i] / rows


@primitive
def merge_columns(count, mean, m2, count_b, mean_b, m2_b):  # mean, m2 [c]
    """`merge` for many columns at once, into the first sample's arrays."""
    part = count_b / (count + count_b)
    weight = count * part
    for i in range(mean.size):
        delta = mean_b[i] - mean[i]
        mean[i] += _if_finite(delta * part, mean_b[i])
        m2[i] += m2_b[i] + delta * delta * weight


@summing
def merge_equal(count, means, m2s):
    """Join samples of one size; the mean is exact where theirs are equal."""
    excess = 0.0
    for i in range(means.size):
        excess += _deviation(means[i], means[0])
    mean = _if_finite(means[0] + excess / means.size, means.sum())
    between = 0.0
    within = 0.0
    for i in range(means.size):
        between += _deviation(means[i], mean) ** 2
        within += m2s[i]
    return mean, within + count * between


@primitive
def sum_products_columns(dy, x, mean, total, product):  # all [c]
    for i in range(x.size):
        g = np.float64(wide(dy[i]))
        total[i] += g
        product[i] += g * _deviation(x[i], mean[i])


def _computed(size, row):
    raise NotImplementedError("for compiled code")


@overload(_computed)
def _overload_computed(size, row):
    dtype = np.float64 if row.dtype == types.float64 else np.float32
    return lambda size, row: np.empty(size, dtype)


@primitive
def computed(size, row):
    """Room for ``size`` numbers as those of ``row`` are computed."""
    return _computed(size, row)


@primitive
def affine(x, mean, invstd, weight, bias):
    """Give the constants of `normalize` as x is computed: what high loses of the mean, shift has.

    ``x - high`` is exact near the mean (Sterbenz), at any offset.
    """
    high = as_computed(mean, x.data)
    scale = as_computed(weight * invstd, x.data)
    return high, scale, as_computed(bias - (mean - high) * scale, x.data)


@primitive
def gradient_affine(x, mean, invstd, weight, dy_mean, product_mean):
    """Give the constants of `input_gradient` as x is computed, both means split as in `affine`.

    Ioffe & Szegedy (2015), section 3, the gradients of the loss, gathered by x and dy.
    """
    dy_high = as_computed(dy_mean, x.data)
    high = as_computed(mean, x.data)
    slope = product_mean * invstd * invstd
    scale = weight * invstd
    shift = ((mean - high) * slope - (dy_mean - dy_high)) * scale
    return (
        dy_high,
        high,
        as_computed(slope, x.data),
        as_computed(scale, x.data),
        as_computed(shift, x.data),
    )


@primitive
def place(view, n, c, s):
    """Index of element (n, c, s) in the view's data; of its bit, if the view is a mask."""
    return view.origin + n * view.dn + c * view.dc + s * view.ds


@primitive
def load(view, start, step, size, tile):
    """``size`` elements from ``start``: the memory itself, or a gathered copy in ``tile``."""
    if step == 1:
        return view.data[start : start + size]
    for i in range(size):
        tile[i] = view.data[start + i * step]
    return tile[:size]


@primitive
def reserve(view, start, step, size, tile):
    """Where to compute a row that `store` then puts at ``start``: there itself, or ``tile``."""
    if step == 1:
        return view.data[start : start + size]
    return tile[:size]


@primitive
def store(view, start, step, row):
    """Scatter a row computed where `reserve` said; nothing to do if that was its place."""
    if step != 1:
        for i in range(row.size):
            view.data[start + i * step] = row[i]


@primitive
def _bit(mask, bit):
    return (mask[bit >> 3] >> (bit & 7)) & 1


@primitive
def _set_bits(y, first, last, mask, bit, step):
    for i in range(first, last):
        if not wide(y[i]) <= 0:
            at = bit + i * step
            or_byte(mask, at >> 3, np.uint8(1 << (at & 7)))


@primitive
def pack(y, mask, bit, step):  # y [n], mask bits [bit], [bit + step] ...
    """Set a mask's bits where ``y`` passed the ReLU; the mask starts as zeros."""
    if step != 1:
        _set_bits(y, 0, y.size, mask, bit, step)
        return
    head = min(-bit % OCTET, y.size)
    octets = (y.size - head) // OCTET
    byte = (bit + head) >> 3
    _set_bits(y, 0, head, mask, bit, 1)
    for k in range(octets):
        mask[byte + k] = positive_bits(y, head + k * OCTET)
    _set_bits(y, head + octets * OCTET, y.size, mask, bit, 1)


@primitive
def _gate_each(dy, first, last, mask, bit, step, out):
    for i in range(first, last):
        out[i] = dy[i] if _bit(mask, bit + i * step) else dy.dtype.type(0)


@primitive
def gate(dy, mask, bit, step, out):  # dy, out [n]
    """``dy`` through the ReLU: kept where its bit is set, else 0."""
    if step != 1:
        _gate_each(dy, 0, dy.size, mask, bit, step, out)
        return
    head = min(-bit % OCTET, dy.size)
    octets = (dy.size - head) // OCTET
    byte = (bit + head) >> 3
    _gate_each(dy, 0, head, mask, bit, 1, out)
    for k in range(octets):
        keep_where(dy, mask[byte + k], out, head + k * OCTET)
    _gate_each(dy, head + octets * OCTET, dy.size, mask, bit, 1, out)
