"""The operations for compiled functions: serially, in the caller's thread.

Views and plans are found as for calls from Python, so that the bits are the same. Arrays come as
addresses, sizes and steps: there is one function per operation and dtype, kept on disk as kernels
are. Each gives False, and has done nothing, where the arrays have no view in common.

Numba frees an array after its last use and knows nothing of addresses: whoever takes one of an
array must have the array as an argument, which the caller holds until the function returns.
"""

import numpy as np
from numba.extending import register_jitable

from ..layout import see
from . import planes, rows
from .arguments import (
    Backward,
    Forward,
    Memory,
    itemsize_of,
    room,
    room_computed,
    room_wide,
    stepping,
)
from .compilation import native, primitive
from .intrinsics import LINE
from .schedule import PIPED, SUMMED, cache_bytes, cut_planes, cut_rows, rooms

_L2, _L3 = cache_bytes(2), cache_bytes(3)

register_jitable(see)


@primitive
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
    kernel(maps, second, third, memory, cut.shape)


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


_forward = _sweep("forward", planes.forward_planes, rows.forward_rows)
_normalize = _sweep("normalize", planes.normalize_planes, rows.normalize_rows)
_backward = _sweep("backward", planes.backward_planes, rows.backward_rows)
_statistics = _sweep("statistics", planes.statistics_planes, rows.statistics_rows)


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
def forward(maps, parameters, settings, shape, axis, steps):
    """Statistics, normalize and running averages."""
    fits, in_rows, N, C, S, adjoining, steps = see(shape, axis, steps)
    if fits:
        _forward(in_rows, N, C, S, adjoining, _stepping(maps, steps), parameters, settings)
    return fits


@native
def normalize(maps, parameters, settings, shape, axis, steps):
    """Normalize by running statistics."""
    fits, in_rows, N, C, S, adjoining, steps = see(shape, axis, steps)
    if fits:
        _normalize(in_rows, N, C, S, adjoining, _stepping(maps, steps), parameters, settings)
    return fits


@native
def statistics(maps, mean, m2, shape, axis, steps):
    """Mean and M2 of each channel."""
    fits, in_rows, N, C, S, adjoining, steps = see(shape, axis, steps)
    if fits:
        _statistics(in_rows, N, C, S, adjoining, _stepping(maps, steps), mean, m2)
    return fits


@native
def backward(maps, gradients, training, shape, axis, steps):
    """Gradients by x, weight, bias and residual."""
    fits, in_rows, N, C, S, adjoining, steps = see(shape, axis, steps)
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
