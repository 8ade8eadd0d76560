"""The operations as C functions: they check a call's struct and run a kernel.

No Python object is touched and no exception raised, so that no GIL is needed. One function serves
all dtypes, because kernels take addresses and steps, and are called by their own address.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import carray

from ..cpu import planes
from ..cpu.arguments import set_number
from ..cpu.compilation import Entry, primitive
from .addresses import channel_numbers, clear, copy, launcher, read, view
from .runs import finish, gather, map_of, mask_of, operation, prepare
from .structs import CALLS, MAX_NDIM, Kernels, Status, pointer_to

_FLOAT32, _FLOAT64 = 11, 12  # NumPy's numbers of dtypes
_STATISTICS, _NORMALIZE, _FORWARD, _BACKWARD = map(
    operation, ("statistics", "normalize", "forward", "backward")
)
# Planes and rows take the same arguments.
_launch_statistics = launcher(planes.statistics_planes)
_launch_sweep = launcher(planes.forward_planes)
_launch_backward = launcher(planes.backward_planes)


class _Batch(NamedTuple):
    """What all calls begin with, checked."""

    status: Any
    shape: Any  # int64 [ndim]
    dense: Any  # strides of C order, in bytes
    axis: Any
    C: Any
    values: Any  # per channel
    itemsize: Any
    parameter: Any  # bytes of a parameter ...
    type_number: Any  # ... and NumPy's number of its dtype
    threads: Any


@primitive
def _check_batch(kernels, given):
    ndim, axis = np.int64(given.ndim), np.int64(given.axis)
    itemsize = parameter = kernels.itemsize
    type_number = kernels.type_number
    if given.float32_parameters:
        parameter, type_number = 4, _FLOAT32
    status = Status.OK
    if not 2 <= ndim <= MAX_NDIM:
        status = Status.NDIM
    elif not -ndim <= axis < ndim:
        status = Status.AXIS
    elif given.shape == 0:
        status = Status.SHAPE
    elif parameter < itemsize:
        status = Status.PARAMETERS
    axis += ndim * (axis < 0)

    known = ndim if status == Status.OK else 0
    shape, dense = np.empty(known, np.int64), np.empty(known, np.int64)
    C, values, step, whole = 1, 1, itemsize, np.float64(itemsize)
    for k in range(known - 1, -1, -1):
        size = read(np.int64(given.shape) + 8 * k)
        shape[k], dense[k] = size, step
        step *= size
        if k == axis:
            C = size
        else:
            values *= size
        whole *= size
        if size < 0 or C == 0 or whole >= 2.0**62:
            status = Status.SHAPE
    threads = np.int64(given.threads)
    return _Batch(status, shape, dense, axis, C, values, itemsize, parameter, type_number, threads)


@primitive
def _arrays(batch, outputs, given, masked):
    return gather(batch.shape, batch.dense, batch.axis, batch.itemsize, outputs, given, masked)


@primitive
def _no_map():
    return view(0, 0, 0, 0)


@primitive
def _parameter(batch, address):
    return channel_numbers(np.int64(address), batch.parameter, batch.type_number)


@primitive
def _wide(address):
    return channel_numbers(np.int64(address), 8, _FLOAT64)


@primitive
def _fill(numbers, C, value):
    for c in range(C):
        set_number(numbers, c, value)


@primitive
def _run_statistics(kernels, call):
    kernels, call = carray(kernels, 1)[0], carray(call, 1)[0]
    batch = _check_batch(kernels, call.batch)
    if batch.status != Status.OK:
        return batch.status
    if call.mean == 0 or call.m2 == 0:
        return Status.MISSING_STATISTICS
    mean, m2 = _wide(call.mean), _wide(call.m2)
    if batch.values == 0:
        _fill(mean, batch.C, 0.0)
        _fill(m2, batch.C, 0.0)
        return Status.OK
    if call.x.data == 0:
        return Status.MISSING_X

    arrays = _arrays(batch, 0, ((call.x.data, call.x.strides),), False)
    run = prepare(_STATISTICS, kernels.statistics, kernels, batch.threads, arrays)
    if run.room == 0:
        return Status.MEMORY
    maps = _no_map(), map_of(run, 0), _no_map(), _no_map()
    _launch_statistics(run.kernel, (maps, mean, m2, run.memory, run.shape))
    finish(kernels, run, arrays)
    return Status.OK


@primitive
def _run_inference(kernels, call):
    kernels, call = carray(kernels, 1)[0], carray(call, 1)[0]
    batch = _check_batch(kernels, call.batch)
    if batch.status != Status.OK:
        return batch.status
    if call.running_mean == 0 or call.running_var == 0:
        return Status.MISSING_RUNNING
    if not 0 <= call.eps < np.inf:
        return Status.EPS
    if batch.values == 0:
        return Status.OK
    if call.x.data == 0:
        return Status.MISSING_X
    if call.y.data == 0:
        return Status.MISSING_Y

    y, x = (call.y.data, call.y.strides), (call.x.data, call.x.strides)
    residual = call.residual.data, call.residual.strides
    arrays = _arrays(batch, 1, (y, x, residual), False)
    run = prepare(_NORMALIZE, kernels.inference, kernels, batch.threads, arrays)
    if run.room == 0:
        return Status.MEMORY
    maps = map_of(run, 0), map_of(run, 1), map_of(run, 2), _no_map()
    parameters = (
        _parameter(batch, call.weight), _parameter(batch, call.bias),
        _parameter(batch, call.running_mean), _parameter(batch, call.running_var),
        _wide(0), _wide(0),
    )  # fmt: skip
    settings = call.eps, 0.0, 0.0, call.relu != 0
    _launch_sweep(run.kernel, (maps, parameters, settings, run.memory, run.shape))
    finish(kernels, run, arrays)
    return Status.OK


@primitive
def _check_forward(batch, call):
    if call.mean == 0 or call.invstd == 0:
        return Status.MISSING_STATISTICS
    if call.mask != 0 and call.relu == 0:
        return Status.MASK
    if not 0 <= call.eps < np.inf:
        return Status.EPS
    if not np.isfinite(call.momentum):
        return Status.MOMENTUM
    if batch.values == 1:
        return Status.VALUES
    enough = call.correction < batch.values or batch.values == 0 or call.running_var == 0
    if not (np.isfinite(call.correction) and enough):
        return Status.CORRECTION
    if batch.values != 0 and call.x.data == 0:
        return Status.MISSING_X
    if batch.values != 0 and call.y.data == 0:
        return Status.MISSING_Y
    return Status.OK


@primitive
def _run_forward(kernels, call):
    kernels, call = carray(kernels, 1)[0], carray(call, 1)[0]
    batch = _check_batch(kernels, call.batch)
    if batch.status != Status.OK:
        return batch.status
    status = _check_forward(batch, call)
    if status != Status.OK:
        return status
    mean, invstd = _wide(call.mean), _wide(call.invstd)
    if batch.values == 0:
        _fill(mean, batch.C, 0.0)
        _fill(invstd, batch.C, 1.0 / np.sqrt(call.eps))
        return Status.OK

    y, x = (call.y.data, call.y.strides), (call.x.data, call.x.strides)
    residual = call.residual.data, call.residual.strides
    arrays = _arrays(batch, 1, (y, x, residual), call.mask != 0)
    run = prepare(_FORWARD, kernels.forward, kernels, batch.threads, arrays)
    if run.room == 0:
        return Status.MEMORY
    if call.mask != 0:
        clear(np.int64(call.mask), (batch.values * batch.C + 7) // 8)  # kernels set bits alone
    maps = map_of(run, 0), map_of(run, 1), map_of(run, 2), mask_of(run, np.int64(call.mask))
    parameters = (
        _parameter(batch, call.weight), _parameter(batch, call.bias),
        _parameter(batch, call.running_mean), _parameter(batch, call.running_var), mean, invstd,
    )  # fmt: skip
    settings = call.eps, call.momentum, call.correction, call.relu != 0
    _launch_sweep(run.kernel, (maps, parameters, settings, run.memory, run.shape))
    finish(kernels, run, arrays)
    return Status.OK


@primitive
def _check_backward(batch, call):
    if call.mean == 0 or call.invstd == 0:
        return Status.MISSING_STATISTICS
    if call.dweight == 0 or call.dbias == 0:
        return Status.MISSING_GRADIENTS
    if batch.values == 1 and call.eval == 0:
        return Status.VALUES
    if batch.values != 0 and call.dy.data == 0:
        return Status.MISSING_DY
    if batch.values != 0 and call.x.data == 0:
        return Status.MISSING_X
    if batch.values != 0 and call.dx.data == 0:
        return Status.MISSING_DX
    return Status.OK


@primitive
def _run_backward(kernels, call):
    kernels, call = carray(kernels, 1)[0], carray(call, 1)[0]
    batch = _check_batch(kernels, call.batch)
    if batch.status != Status.OK:
        return batch.status
    status = _check_backward(batch, call)
    if status != Status.OK:
        return status
    dweight, dbias = _parameter(batch, call.dweight), _parameter(batch, call.dbias)
    if batch.values == 0:
        _fill(dweight, batch.C, 0.0)
        _fill(dbias, batch.C, 0.0)
        return Status.OK

    masked = call.mask != 0
    dx, dy = (call.dx.data, call.dx.strides), (call.dy.data, call.dy.strides)
    x = call.x.data, call.x.strides
    dresidual = call.dresidual.data, call.dresidual.strides
    # Without a mask dresidual is dy, and no business of the kernel's.
    gated = dresidual if masked else (np.uint64(0), np.uint64(0))
    arrays = _arrays(batch, 2, (dx, gated, dy, x), masked)
    run = prepare(_BACKWARD, kernels.backward, kernels, batch.threads, arrays)
    if run.room == 0:
        return Status.MEMORY
    if not masked and call.dresidual.data != 0:
        # Before dx, which may be written over dy.
        same = _arrays(batch, 1, (dresidual, dy), False)
        to, source = same.addresses[0], same.addresses[1]
        copy(batch.shape, batch.itemsize, to, same.strides[0], source, same.strides[1])
    maps = (
        map_of(run, 0),
        map_of(run, 1),
        map_of(run, 2),
        map_of(run, 3),
        mask_of(run, np.int64(call.mask)),
    )
    gradients = _parameter(batch, call.weight), _wide(call.mean), _wide(call.invstd), dweight, dbias
    training = call.eval == 0
    _launch_backward(run.kernel, (maps, gradients, training, run.memory, run.shape))
    finish(kernels, run, arrays)
    return Status.OK


def _entry(function):
    """Compile, where asked for its address, the function of an operation."""
    return Entry(function, (pointer_to(Kernels), pointer_to(CALLS[function.__name__])))


# All that can be raised is that there is no memory for sizes and strides.


@_entry
def statistics(kernels, call):
    """Mean and M2 of each channel."""
    try:
        return _run_statistics(kernels, call)
    except Exception:
        return Status.MEMORY


@_entry
def inference(kernels, call):
    """Normalize by running statistics."""
    try:
        return _run_inference(kernels, call)
    except Exception:
        return Status.MEMORY


@_entry
def forward(kernels, call):
    """Statistics, normalize and running averages."""
    try:
        return _run_forward(kernels, call)
    except Exception:
        return Status.MEMORY


@_entry
def backward(kernels, call):
    """Gradients by x, weight, bias and residual."""
    try:
        return _run_backward(kernels, call)
    except Exception:
        return Status.MEMORY
