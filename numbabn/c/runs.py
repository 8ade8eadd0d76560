"""From arrays as addresses and strides to a kernel's run: a view of them, room to work in.

Everything is found as for calls from Python, so that the bits are the same.
"""

from typing import Any, NamedTuple

import numpy as np

from ..cpu import schedule
from ..cpu.compilation import primitive
from ..cpu.intrinsics import LINE
from ..layout import see
from ..threads import PARALLEL_BYTES
from .addresses import allocate, copy, free, get_through, read, set_through, view


class Operation(NamedTuple):
    """What a schedule asks of an operation."""

    sweeps: int  # over memory
    summed: int  # inputs
    piped: bool


def operation(name: str) -> Operation:
    """Give what a schedule knows by name."""
    return Operation(schedule.SWEEPS[name], schedule.SUMMED[name], name in schedule.PIPED)


class Arrays(NamedTuple):
    """The arrays of a call, of one shape and dtype."""

    shape: Any  # int64 [ndim]
    dense: Any  # strides of C order, in bytes
    axis: Any  # the channel's, not negative
    itemsize: Any
    outputs: Any  # how many are written; they come first
    addresses: Any  # int64 [arrays]; 0 for one that is not there
    strides: Any  # bytes [arrays, ndim]
    masked: Any  # whether a mask comes last


class Run(NamedTuple):
    """A kernel, and what it needs."""

    kernel: Any  # its address
    memory: Any
    shape: Any
    addresses: Any  # of the arrays, or of contiguous stand-ins
    steps: Any  # elements [arrays and the mask, 3]
    copied: Any  # whether there are stand-ins
    room: Any  # address of all memory that was allocated; 0 if there was none left
    bound: Any  # how many threads the caller may use otherwise; 0 if it was not bound


@primitive
def gather(shape, dense, axis, itemsize, outputs, given, masked):
    """Gather a call's arrays, given as pairs: an address, and an address of strides or 0."""
    ndim = len(shape)
    addresses = np.empty(len(given), np.int64)
    strides = np.empty((len(given), ndim), np.int64)
    for k in range(len(given)):
        data, steps = given[k]
        addresses[k] = np.int64(data)
        for i in range(ndim):
            strides[k, i] = read(np.int64(steps) + 8 * i) if steps else dense[i]
    return Arrays(shape, dense, axis, itemsize, outputs, addresses, strides, masked)


@primitive
def _see(arrays, contiguous):
    """See the arrays, or contiguous ones in their place, and the mask."""
    ndim, count = len(arrays.shape), len(arrays.addresses)
    steps = np.empty((count + 1, ndim), np.int64)
    there = 0
    fits = True
    for k in range(count + 1):
        mask = k == count
        if not (arrays.masked if mask else arrays.addresses[k] != 0):
            continue
        dense = mask or contiguous
        fits = fits and (dense or arrays.addresses[k] % arrays.itemsize == 0)
        for i in range(ndim):
            stride = arrays.dense[i] if dense else arrays.strides[k, i]
            fits = fits and stride % arrays.itemsize == 0
            steps[there, i] = stride // arrays.itemsize
        there += 1
    viewable, in_rows, N, C, S, adjoining, each = see(
        arrays.shape, arrays.axis, steps[:there], schedule.FOLDS_ROWS
    )
    return fits and viewable, in_rows, N, C, S, adjoining, each


@primitive
def _cut(operation, in_rows, N, C, S, adjoining, itemsize, threads, caches):
    summed, piped = operation.summed, operation.piped
    l2, l3 = caches[0], caches[1]
    if in_rows:
        return schedule.cut_rows(N, C, S, adjoining, itemsize, threads, summed, piped, l2, l3)
    return schedule.cut_planes(N, C, S, adjoining, itemsize, threads, summed, piped, l2, l3)


@primitive
def _lines(nbytes):
    return -(-nbytes // LINE) * LINE


@primitive
def _rooms(cut, itemsize):
    """Bytes of each part of the memory for all threads."""
    slab, spares, sums, constants, partials = schedule.rooms(cut, itemsize)
    threads = cut.shape.threads
    alone = 1 if cut.shape.together else threads
    return slab * alone, spares * threads, sums * threads, constants * alone, partials * alone


@primitive
def _memory(cut, itemsize, at):
    """Give a kernel its room from an address on."""
    slab, spares, sums, constants, partials = schedule.rooms(cut, itemsize)
    all_slab, all_spares, all_sums, all_constants, _ = _rooms(cut, itemsize)
    computed = 8 if itemsize == 8 else 4
    spares_at = at + all_slab
    sums_at = spares_at + all_spares
    constants_at = sums_at + all_sums
    return (
        view(at if cut.slab else 0, slab // itemsize, 0, 0),
        view(spares_at, spares // itemsize, 0, 0),
        view(sums_at, sums // 8, 0, 0),
        view(constants_at, constants // computed, 0, 0),
        view(constants_at + all_constants, partials // 8, 0, 0),
    )


@primitive
def prepare(operation, addresses, kernels, threads, arrays):
    """Choose view, threads and kernel, of those at `addresses`, and make room.

    Where the arrays have no view in common, contiguous copies stand in for them.
    """
    itemsize = arrays.itemsize
    fits, in_rows, N, C, S, adjoining, each = _see(arrays, False)
    if not fits:
        _, in_rows, N, C, S, adjoining, each = _see(arrays, True)
    nbytes = N * C * S * itemsize
    threads = min(threads, kernels.threads)
    if nbytes * operation.sweeps < PARALLEL_BYTES or addresses[2 * in_rows + 1] == 0:
        threads = 1
    cut = _cut(operation, in_rows, N, C, S, adjoining, itemsize, max(1, threads), kernels.caches)

    work = LINE
    for part in _rooms(cut, itemsize):
        work += part
    count = len(arrays.addresses)
    room = allocate(work if fits else work + count * _lines(nbytes))
    start = _lines(room)
    here = np.zeros(count, np.int64)
    steps = np.zeros((count + 1, 3), np.int64)
    there = 0
    for k in range(count + 1):
        if arrays.masked if k == count else arrays.addresses[k] != 0:
            for i in range(3):
                steps[k, i] = each[there, i]
            there += 1
    for k in range(count):
        here[k] = arrays.addresses[k]
        if here[k] and room and not fits:
            here[k] = start + work - LINE + k * _lines(nbytes)
            if k >= arrays.outputs:
                copy(
                    arrays.shape, itemsize,
                    here[k], arrays.dense, arrays.addresses[k], arrays.strides[k],
                )  # fmt: skip
    kernel = addresses[2 * in_rows + (threads > 1)]
    bound = 0
    if threads > 1 and room:
        bound = get_through(kernels.told_threads)
        set_through(kernels.set_threads, threads)
    return Run(kernel, _memory(cut, itemsize, start), cut.shape, here, steps, not fits, room, bound)


@primitive
def finish(kernels, run, arrays):
    """Put into place the outputs that could not be viewed, give threads and room back."""
    if run.bound:
        set_through(kernels.set_threads, run.bound)
    for k in range(arrays.outputs):
        if run.copied and arrays.addresses[k]:
            copy(
                arrays.shape, arrays.itemsize,
                arrays.addresses[k], arrays.strides[k], run.addresses[k], arrays.dense,
            )  # fmt: skip
    free(run.room)


@primitive
def map_of(run, k):
    """Give a view of an array."""
    return view(run.addresses[k], run.steps[k, 0], run.steps[k, 1], run.steps[k, 2])


@primitive
def mask_of(run, address):
    """Give a view of the mask."""
    k = len(run.addresses)
    return view(address, run.steps[k, 0], run.steps[k, 1], run.steps[k, 2])
