"""The operations for compiled functions: serially, in the caller's thread.

Views and plans are found as for calls from Python, so that the bits are the same. Arrays come as
addresses, sizes and strides: there is one function per operation and dtype, kept on disk as kernels
are; it is called with a tuple of its arguments. Each gives False, and has done nothing, where the
arrays have no view in common.

Numba frees an array after its last use and knows nothing of addresses: whoever takes one of an
array must have the array as an argument, which the caller holds until the function returns.
"""

from functools import partial

import numpy as np
from numba import njit

from ..layout import see
from . import planes, rows
from .arguments import (
    FLOAT32_NUM,
    Backward,
    Forward,
    Memory,
    address_of,
    itemsize_of,
    number,
    room,
    room_computed,
    room_wide,
    set_number,
    stepping,
)
from .compilation import native, primitive
from .intrinsics import LINE
from .schedule import FOLDS_ROWS, PIPED, SUMMED, cache_bytes, cut_planes, cut_rows, rooms

checked = njit(nogil=True, error_model="numpy")
_L2, _L3 = cache_bytes(2), cache_bytes(3)


# Checks, before anything is written. Row k of `shapes` and `strides` is of map k. Strides are in
# bytes; a mask's bits count as elements of x.


@checked
def _front_axis(axis, shapes, x):
    """Count the channel axis from the front; give the values per channel, too."""
    ndim = shapes.shape[1]
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis: expected {-ndim} to {ndim - 1}, got {axis}")
    axis %= ndim
    count = 1
    for i in range(ndim):
        if i != axis:
            count *= shapes[x, i]
    if shapes[x, axis] == 0:
        raise ValueError(f"x: expected a channel or more along axis {axis}, got 0")
    return axis, count


@checked
def _check_shape(name, shapes, k, x):
    for i in range(shapes.shape[1]):
        if shapes[k, i] != shapes[x, i]:
            raise ValueError(
                f"{name}: expected the shape of x, got {shapes[k, i]} along axis {i}, "
                f"where x has {shapes[x, i]}"
            )


@checked
def _check_length(name, length, C):
    if length >= 0 and length != C:
        raise ValueError(f"{name}: expected shape ({C},), got ({length},)")


@checked
def _check_eps(eps):
    if not 0 <= eps < np.inf:
        raise ValueError("eps: expected a finite number, 0 or more")


@checked
def _check_trainable(count):
    if count == 1:
        raise ValueError("x: expected more than one value per channel in training, got 1")


@checked
def _check_averaging(count, momentum, correction):
    if not np.isfinite(momentum):
        raise ValueError("momentum: expected a finite number")
    if not np.isfinite(correction):
        raise ValueError("correction: expected a finite number")
    if count and count - correction <= 0:
        raise ValueError(f"correction: expected less than the {count} values per channel")


@checked
def _span(view, shapes, strides, k):
    """Give the first address of a map's memory, and the first behind it; 0, 0 of none."""
    low = high = address_of(view)
    if low == 0:
        return low, high
    for i in range(shapes.shape[1]):
        if shapes[k, i] == 0:
            return low, low
        reach = strides[k, i] * (shapes[k, i] - 1)
        low += min(reach, 0)
        high += max(reach, 0)
    return low, high + itemsize_of(view)


@primitive
def _size_of(array):
    return 4 if array.dtype == FLOAT32_NUM else 8


@checked
def _numbers_span(array, C):
    low = address_of(array)
    if low == 0:
        return low, low
    reach = array.step * (C - 1)
    return low + min(reach, 0), low + max(reach, 0) + _size_of(array)


@checked
def _check_apart(name, target, other, array):
    """Unlike in Python, memory that lies between an array's elements counts as its own."""
    if target[0] < array[1] and array[0] < target[1]:
        raise ValueError(f"{name}: expected memory of its own, got an overlap with {other}")


@checked
def _check_numbers_apart(name, target, other, array, C):
    """`_check_apart` of numbers per channel, of which some may lie between others."""
    step, off = abs(target.step), address_of(array) - address_of(target)
    # Columns of one array, fields of one record.
    between = step == abs(array.step) and step > 0
    between = between and _size_of(target) <= off % step <= step - _size_of(array)
    if not between:
        _check_apart(name, _numbers_span(target, C), other, _numbers_span(array, C))


@checked
def _check_in_place(other, target, array, shapes, strides, k, m):
    """Check the map written first, `k`, against a map `m` that it may be."""
    same = target == array
    for i in range(shapes.shape[1]):
        same = same and (shapes[k, i] == 1 or strides[k, i] == strides[m, i])
    if not same:
        _check_apart("out", target, other, array)


@checked
def _check_distinct(shapes, strides, k, itemsize):
    """Check that each axis, the closest first, steps over all that those before it reach."""
    ndim = shapes.shape[1]
    seen = np.zeros(ndim, np.bool_)
    reach = itemsize
    for _ in range(ndim):
        next_ = -1
        for i in range(ndim):
            if not seen[i] and (next_ < 0 or abs(strides[k, i]) < abs(strides[k, next_])):
                next_ = i
        seen[next_] = True
        if shapes[k, next_] > 1:
            stride = strides[k, next_]
            if abs(stride) < reach:
                raise ValueError(
                    f"out: expected distinct elements in memory, got a stride of {stride} bytes "
                    f"along axis {next_}"
                )
            reach += abs(stride) * (shapes[k, next_] - 1)


@checked
def _check_distinct_numbers(name, array, C):
    if address_of(array) != 0 and C > 1 and abs(array.step) < _size_of(array):
        raise ValueError(
            f"{name}: expected distinct elements in memory, got a stride of {array.step} bytes"
        )


@checked
def _check_sweep(maps, parameters, lengths, settings, shapes, axis, strides, training):
    """Check a forward pass or inference; give axis and values per channel."""
    axis, count = _front_axis(axis, shapes, 1)
    C = shapes[1, axis]
    _check_shape("out", shapes, 0, 1)
    _check_shape("residual", shapes, 2, 1)
    _check_length("weight", lengths[0], C)
    _check_length("bias", lengths[1], C)
    _check_length("running_mean", lengths[2], C)
    _check_length("running_var", lengths[3], C)
    _check_eps(settings.eps)
    weight, bias = _numbers_span(parameters.weight, C), _numbers_span(parameters.bias, C)
    mean, var = _numbers_span(parameters.running_mean, C), _numbers_span(parameters.running_var, C)
    y, x = _span(maps.y, shapes, strides, 0), _span(maps.x, shapes, strides, 1)
    residual = _span(maps.residual, shapes, strides, 2)
    if training:
        _check_trainable(count)
        averaged = count if lengths[3] >= 0 else 0
        _check_averaging(averaged, settings.momentum, settings.correction)
        _check_numbers_apart(
            "running_mean", parameters.running_mean, "running_var", parameters.running_var, C
        )
        for name, array in (
            ("running_mean", parameters.running_mean),
            ("running_var", parameters.running_var),
        ):
            _check_distinct_numbers(name, array, C)
            _check_apart(name, _numbers_span(array, C), "x", x)
            _check_apart(name, _numbers_span(array, C), "residual", residual)
            _check_numbers_apart(name, array, "weight", parameters.weight, C)
            _check_numbers_apart(name, array, "bias", parameters.bias, C)
    if count:
        _check_distinct(shapes, strides, 0, itemsize_of(maps.y))
        _check_in_place("x", y, x, shapes, strides, 0, 1)
        _check_in_place("residual", y, residual, shapes, strides, 0, 2)
    _check_apart("out", y, "weight", weight)
    _check_apart("out", y, "bias", bias)
    _check_apart("out", y, "running_mean", mean)
    _check_apart("out", y, "running_var", var)
    return axis, count


@checked
def _run(kernel, buffer, cut, maps, second, third):
    """Call a kernel with room to work in."""
    x = maps.x
    slab, spares, sums, constants, _ = rooms(cut, itemsize_of(x))
    at = -buffer.ctypes.data % LINE
    memory = Memory(
        room(buffer, at, cut.slab, x),
        room(buffer, at + slab, cut.spares, x),
        room_wide(buffer, at + slab + spares, cut.sums, x),
        room_computed(buffer, at + slab + spares + sums, cut.constants, x),
        room_wide(buffer, at + slab + spares + sums + constants, cut.partials, x),
    )
    kernel((maps, second, third, memory, cut.shape))


@primitive
def _buffer(cut, itemsize):
    slab, spares, sums, constants, partials = rooms(cut, itemsize)
    return np.empty(LINE + slab + spares + sums + constants + partials, np.uint8)


def _sweep(operation, on_planes, on_rows):
    """Make a function that runs an operation's kernel for the view."""
    summed, piped = SUMMED[operation], operation in PIPED

    @primitive
    def sweep(in_rows, N, C, S, adjoining, maps, second, third):
        itemsize = itemsize_of(maps.x)
        if in_rows:
            cut = cut_rows(N, C, S, adjoining, itemsize, 1, summed, piped, _L2, _L3)
            _run(on_rows, _buffer(cut, itemsize), cut, maps, second, third)
        else:
            cut = cut_planes(N, C, S, adjoining, itemsize, 1, summed, piped, _L2, _L3)
            _run(on_planes, _buffer(cut, itemsize), cut, maps, second, third)

    return sweep


_forward = _sweep("forward", planes.forward_planes.linked, rows.forward_rows.linked)
_normalize = _sweep("normalize", planes.normalize_planes.linked, rows.normalize_rows.linked)
_backward = _sweep("backward", planes.backward_planes.linked, rows.backward_rows.linked)
_statistics = _sweep("statistics", planes.statistics_planes.linked, rows.statistics_rows.linked)


@primitive
def _see(shape, axis, strides, itemsize, addresses):
    """`see`, of strides and addresses in bytes: there is no view of elements across their size."""
    whole = addresses % itemsize == 0
    steps = np.empty(strides.shape, np.int64)
    for k in range(strides.shape[0]):
        for i in range(strides.shape[1]):
            whole = whole and strides[k, i] % itemsize == 0
            steps[k, i] = strides[k, i] // itemsize
    fits, in_rows, N, C, S, adjoining, each = see(shape, axis, steps, FOLDS_ROWS)
    return fits and whole, in_rows, N, C, S, adjoining, each


@primitive
def _see_sweep(maps, shapes, axis, strides):
    addresses = address_of(maps.y) | address_of(maps.x) | address_of(maps.residual)
    return _see(shapes[1], axis, strides, itemsize_of(maps.x), addresses)


@primitive
def _stepping(maps, steps):
    """Give a forward pass's views their steps."""
    return Forward(
        stepping(maps.y, steps, 0),
        stepping(maps.x, steps, 1),
        stepping(maps.residual, steps, 2),
        stepping(maps.mask, steps, 3),
    )


@native
def forward(maps, parameters, lengths, settings, shapes, axis, strides):
    """Statistics, normalize and running averages."""
    axis, count = _check_sweep(maps, parameters, lengths, settings, shapes, axis, strides, True)
    if count == 0:
        for c in range(shapes[1, axis]):
            set_number(parameters.mean, c, 0.0)
            set_number(parameters.invstd, c, 1.0 / np.sqrt(settings.eps))
        return True
    fits, in_rows, N, C, S, adjoining, steps = _see_sweep(maps, shapes, axis, strides)
    if fits:
        _forward(in_rows, N, C, S, adjoining, _stepping(maps, steps), parameters, settings)
    return fits


@native
def normalize(maps, parameters, lengths, settings, shapes, axis, strides):
    """Normalize by running statistics."""
    axis, count = _check_sweep(maps, parameters, lengths, settings, shapes, axis, strides, False)
    if count == 0:
        return True
    fits, in_rows, N, C, S, adjoining, steps = _see_sweep(maps, shapes, axis, strides)
    if fits:
        _normalize(in_rows, N, C, S, adjoining, _stepping(maps, steps), parameters, settings)
    return fits


@native
def statistics(maps, mean, m2, shapes, axis, strides):
    """Mean and M2 of each channel, which are 0 beforehand; axis and values per channel, too."""
    axis, count = _front_axis(axis, shapes, 0)
    if count == 0:
        return True, count
    fits, in_rows, N, C, S, adjoining, steps = _see(
        shapes[0], axis, strides, itemsize_of(maps.x), address_of(maps.x)
    )
    if fits:
        maps = Forward(maps.y, stepping(maps.x, steps, 0), maps.residual, maps.mask)
        _statistics(in_rows, N, C, S, adjoining, maps, mean, m2)
    return fits, count


@native
def backward(maps, gradients, lengths, training, bits, shapes, axis, strides):
    """Gradients by x, weight, bias and residual; `bits` is the mask's length, or -1."""
    axis, count = _front_axis(axis, shapes, 3)
    C = shapes[3, axis]
    _check_shape("dy", shapes, 2, 3)
    _check_shape("out", shapes, 0, 3)
    _check_length("weight", lengths[0], C)
    _check_length("mean", lengths[1], C)
    _check_length("invstd", lengths[2], C)
    if training:
        _check_trainable(count)
    if bits >= 0 and bits != (count * C + 7) // 8:
        raise ValueError(f"mask: expected shape ({(count * C + 7) // 8},), got ({bits},)")
    dx = _span(maps.dx, shapes, strides, 0)
    if count:
        _check_distinct(shapes, strides, 0, itemsize_of(maps.dx))
        _check_in_place("dy", dx, _span(maps.dy, shapes, strides, 2), shapes, strides, 0, 2)
        _check_in_place("x", dx, _span(maps.x, shapes, strides, 3), shapes, strides, 0, 3)
    _check_apart("out", dx, "weight", _numbers_span(gradients.weight, C))
    _check_apart("out", dx, "mean", _numbers_span(gradients.mean, C))
    _check_apart("out", dx, "invstd", _numbers_span(gradients.invstd, C))
    first = address_of(maps.mask)
    _check_apart("out", dx, "mask", (first, first + max(bits, 0)))
    if count == 0:
        for c in range(C):
            set_number(gradients.dweight, c, 0.0)
            set_number(gradients.dbias, c, 0.0)
        return True
    addresses = address_of(maps.dx) | address_of(maps.dresidual) | address_of(maps.dy)
    addresses |= address_of(maps.x)
    fits, in_rows, N, C, S, adjoining, steps = _see(
        shapes[3], axis, strides, itemsize_of(maps.x), addresses
    )
    if fits:
        maps = Backward(
            stepping(maps.dx, steps, 0),
            stepping(maps.dresidual, steps, 1),
            stepping(maps.dy, steps, 2),
            stepping(maps.x, steps, 3),
            stepping(maps.mask, steps, 4),
        )
        _backward(in_rows, N, C, S, adjoining, maps, gradients, training)
    return fits


@partial(native, fastmath=False)  # without contraction, as NumPy
def update(
    running_mean, running_var, mean_length, var_length, count, mean, m2, C, momentum, correction
):  # fmt: skip
    """Update running statistics by those of a batch; an empty one, of any length, does nothing."""
    # Statistics that start empty know no number of channels yet.
    C = C if C else mean_length
    _check_length("running_mean", mean_length, C)
    _check_length("running_var", var_length, C)
    _check_averaging(count, momentum, correction)
    _check_distinct_numbers("running_mean", running_mean, C)
    _check_distinct_numbers("running_var", running_var, C)
    _check_numbers_apart("running_mean", running_mean, "running_var", running_var, C)
    if count:
        for c in range(C):
            batch = number(mean, c)
            set_number(running_mean, c, (1 - momentum) * number(running_mean, c) + momentum * batch)
            batch = number(m2, c) / (count - correction)
            set_number(running_var, c, (1 - momentum) * number(running_var, c) + momentum * batch)
