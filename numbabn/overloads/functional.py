"""The public functions within functions that numba compiles: same names, keywords and bits.

What types tell is checked while the caller's function is compiled, and refused with a
``TypingError``; what values tell is checked when it runs. All work is done in the calling thread,
so that the caller's own `prange` stays the only parallel region.
"""

import numpy as np
from numba import types
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import overload, register_jitable

from .. import functional
from ..cpu import native
from ..cpu.arguments import Backward, Forward, Gradients, Parameters, Settings, numbers_of, strided
from .kinds import (
    FLOATS,
    check_axis,
    check_data,
    check_like,
    check_numbers,
    check_per_channel,
    check_written,
    flag,
    given,
    rectifies,
    refuse,
    value_of,
)
from .stats import made, stats_type

_BITS = np.empty(0, np.uint8)  # what a mask is like


# Arrays.


@register_jitable
def _tell(array, k, like, shapes, strides):
    """Put an array's sizes and strides into row `k`; those of another where it is None."""
    told = like if array is None else array
    for i in range(told.ndim):
        shapes[k, i] = told.shape[i]
        strides[k, i] = told.strides[i]


@register_jitable
def _tell_bits(x, k, shapes, strides):
    """Put the sizes and strides of a mask of x into row `k`, its bits as if elements of x."""
    stride = x.itemsize
    for i in range(x.ndim - 1, -1, -1):
        shapes[k, i] = x.shape[i]
        strides[k, i] = stride
        stride *= x.shape[i]


@register_jitable
def _zero_bits(x):
    return np.zeros((x.size + 7) // 8, np.uint8)


@register_jitable
def _itself(array):
    return array


@register_jitable
def _copied(array):
    return array.copy()


@register_jitable
def _nothing(array):
    return None


@register_jitable
def _length(array):
    return -1 if array is None else array.shape[0]


@register_jitable
def _channels(x, axis):
    """Count channels; an axis that x has not is refused later."""
    return x.shape[axis % x.ndim]


def _empty_like(x):
    """Stand for an array like x, its axes in the same order in memory, in compiled functions."""
    raise NotImplementedError


@overload(_empty_like)
def _overload_empty_like(x):
    if x.layout in "CF":
        return lambda x: np.empty_like(x)

    def impl(x):  # as NumPy's with order="K"
        order = np.empty(x.ndim, np.int64)
        for i in range(x.ndim):
            k = i
            while k and abs(x.strides[order[k - 1]]) < abs(x.strides[i]):
                order[k] = order[k - 1]
                k -= 1
            order[k] = i
        strides = x.strides
        step = x.itemsize
        for k in range(x.ndim - 1, -1, -1):
            strides = tuple_setitem(strides, order[k], step)
            step *= x.shape[order[k]]
        return np.lib.stride_tricks.as_strided(np.empty(x.size, x.dtype), x.shape, strides)

    return impl


# The operations on arrays. Addresses are taken of arguments alone; see `numbabn.cpu.native`.


@register_jitable
def _sweep(
    run, axis, y, x, residual, mask, weight, bias, running_mean, running_var, mean, invstd,
    eps, momentum, correction, rectify,
):  # fmt: skip
    shapes, strides = np.empty((4, x.ndim), np.int64), np.empty((4, x.ndim), np.int64)
    _tell(y, 0, x, shapes, strides)
    _tell(x, 1, x, shapes, strides)
    _tell(residual, 2, x, shapes, strides)
    if mask is None:
        _tell(x, 3, x, shapes, strides)
    else:
        _tell_bits(x, 3, shapes, strides)
    maps = Forward(strided(y, x), strided(x, x), strided(residual, x), strided(mask, _BITS))
    parameters = Parameters(
        numbers_of(weight), numbers_of(bias), numbers_of(running_mean), numbers_of(running_var),
        numbers_of(mean), numbers_of(invstd),
    )  # fmt: skip
    lengths = _length(weight), _length(bias), _length(running_mean), _length(running_var)
    settings = Settings(float(eps), float(momentum), float(correction), rectify)
    return run((maps, parameters, lengths, settings, shapes, np.int64(axis), strides))


@register_jitable
def _swept(
    run, axis, y, x, residual, mask, weight, bias, running_mean, running_var, mean, invstd,
    eps, momentum, correction, rectify,
):  # fmt: skip
    """Sweep; where the arrays have no view in common, contiguous copies."""
    if not _sweep(
        run, axis, y, x, residual, mask, weight, bias, running_mean, running_var, mean, invstd,
        eps, momentum, correction, rectify,
    ):  # fmt: skip
        target = np.empty(x.shape, x.dtype)
        _sweep(
            run, axis, target, _duplicate(x), _duplicate(residual), mask, weight, bias,
            running_mean, running_var, mean, invstd, eps, momentum, correction, rectify,
        )  # fmt: skip
        _copy(y, target)


@register_jitable
def _copy(target, source):
    if source is None:
        return
    # An assignment to a slice takes 3 s to compile: it would say so if shapes differed.
    for index in np.ndindex(source.shape):
        target[index] = source[index]


def _duplicate(array):
    """Stand for a copy in C order of an array, or for None, in compiled functions."""
    raise NotImplementedError


@overload(_duplicate)
def _overload_duplicate(array):
    if not given(array):
        return lambda array: None

    def impl(array):
        target = np.empty(array.shape, array.dtype)
        _copy(target, array)
        return target

    return impl


@register_jitable
def _forward(
    x, weight, bias, running_mean, running_var, residual, out,
    momentum, eps, axis, rectify, correction, mask,
):  # fmt: skip
    """Give y, mean and invstd."""
    y = _empty_like(x) if out is None else out
    C = _channels(x, axis)
    mean, invstd = np.empty(C), np.empty(C)
    _swept(
        native.forward, axis, y, x, residual, mask, weight, bias, running_mean, running_var,
        mean, invstd, eps, momentum, correction, rectify,
    )  # fmt: skip
    return y, mean, invstd


@register_jitable
def _inference(
    x, running_mean, running_var, weight, bias, residual, out, eps, axis, rectify
):  # fmt: skip
    y = _empty_like(x) if out is None else out
    _swept(
        native.normalize, axis, y, x, residual, None, weight, bias, running_mean, running_var,
        None, None, eps, 0.0, 0.0, rectify,
    )  # fmt: skip
    return y


def _check_call(x, weight, bias, running_mean, running_var, residual, out, eps, axis):
    check_data("x", x)
    check_like(x, residual=residual, out=out)
    check_per_channel(
        (x.dtype,), weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    check_written(out=out)
    check_numbers(eps=eps)
    check_axis(axis)


@overload(functional.batch_norm, prefer_literal=True)
def _batch_norm(
    x, running_mean=None, running_var=None, weight=None,
    bias=None, training=False, momentum=0.1, eps=1e-5, axis=1,
    residual=None, activation=None, correction=1, out=None,
):  # fmt: skip
    _check_call(x, weight, bias, running_mean, running_var, residual, out, eps, axis)
    check_numbers(momentum=momentum, correction=correction)
    if not isinstance(value_of(training), bool | types.Boolean):
        refuse("training", "True or False", training)
    rectify = rectifies(activation)
    always, never = value_of(training) is True, value_of(training) is False
    if not never:
        check_written(running_mean=running_mean, running_var=running_var)
    lacking = next(
        (
            name
            for name, kind in (("running_mean", running_mean), ("running_var", running_var))
            if not given(kind)
        ),
        None,
    )
    if lacking and never:
        refuse(lacking, "an array of shape (C,) in inference", "None")
    incomplete = lacking is not None
    message = f"{lacking}: expected an array of shape (C,) in inference, got None"

    # Apart, as each operation that is called has to be compiled.
    def train(
        x, running_mean=None, running_var=None, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5, axis=1, residual=None, activation=None, correction=1, out=None,
    ):  # fmt: skip
        return _forward(
            x, weight, bias, running_mean, running_var, residual, out,
            momentum, eps, axis, rectify, correction, None,
        )[0]  # fmt: skip

    def infer(
        x, running_mean=None, running_var=None, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5, axis=1, residual=None, activation=None, correction=1, out=None,
    ):  # fmt: skip
        return _inference(
            x, running_mean, running_var, weight, bias, residual, out, eps, axis, rectify
        )

    def either(
        x, running_mean=None, running_var=None, weight=None, bias=None, training=False,
        momentum=0.1, eps=1e-5, axis=1, residual=None, activation=None, correction=1, out=None,
    ):  # fmt: skip
        if training:
            return _forward(
                x, weight, bias, running_mean, running_var, residual, out,
                momentum, eps, axis, rectify, correction, None,
            )[0]  # fmt: skip
        if incomplete:
            raise ValueError(message)
        return _inference(
            x, running_mean, running_var, weight, bias, residual, out, eps, axis, rectify
        )

    if always:
        return train
    return infer if never else either


@overload(functional.batch_norm_forward, prefer_literal=True)
def _batch_norm_forward(
    x, weight=None, bias=None, running_mean=None,
    running_var=None, momentum=0.1, eps=1e-5, axis=1,
    residual=None, activation=None, correction=1, out=None,
):  # fmt: skip
    _check_call(x, weight, bias, running_mean, running_var, residual, out, eps, axis)
    check_numbers(momentum=momentum, correction=correction)
    check_written(running_mean=running_mean, running_var=running_var)
    rectify = rectifies(activation)
    allocate_mask = _zero_bits if rectify else _nothing

    def impl(
        x, weight=None, bias=None, running_mean=None, running_var=None, momentum=0.1, eps=1e-5,
        axis=1, residual=None, activation=None, correction=1, out=None,
    ):  # fmt: skip
        mask = allocate_mask(x)
        y, mean, invstd = _forward(
            x, weight, bias, running_mean, running_var, residual, out,
            momentum, eps, axis, rectify, correction, mask,
        )  # fmt: skip
        return functional.ForwardResult(y, mean, invstd, mask)

    return impl


@overload(functional.batch_norm_inference, prefer_literal=True)
def _batch_norm_inference(
    x, running_mean, running_var, weight=None, bias=None,
    eps=1e-5, axis=1, residual=None, activation=None, out=None,
):  # fmt: skip
    _check_call(x, weight, bias, running_mean, running_var, residual, out, eps, axis)
    for name, kind in (("running_mean", running_mean), ("running_var", running_var)):
        if not given(kind):
            refuse(name, "an array of shape (C,) in inference", "None")
    rectify = rectifies(activation)

    def impl(
        x, running_mean, running_var, weight=None, bias=None, eps=1e-5, axis=1, residual=None,
        activation=None, out=None,
    ):  # fmt: skip
        return _inference(
            x, running_mean, running_var, weight, bias, residual, out, eps, axis, rectify
        )

    return impl


@register_jitable
def _gradients_of(
    axis, dx, dresidual, dy, x, mask, weight, mean, invstd, dweight, dbias, training
):  # fmt: skip
    shapes, strides = np.empty((5, x.ndim), np.int64), np.empty((5, x.ndim), np.int64)
    _tell(dx, 0, x, shapes, strides)
    _tell(dresidual, 1, dx, shapes, strides)
    _tell(dy, 2, x, shapes, strides)
    _tell(x, 3, x, shapes, strides)
    if mask is None:
        _tell(dx, 4, x, shapes, strides)
    else:
        _tell_bits(x, 4, shapes, strides)
    maps = Backward(
        strided(dx, x), strided(dresidual, x), strided(dy, x), strided(x, x), strided(mask, _BITS)
    )
    gradients = Gradients(
        numbers_of(weight), numbers_of(mean), numbers_of(invstd), numbers_of(dweight),
        numbers_of(dbias),
    )  # fmt: skip
    lengths = _length(weight), _length(mean), _length(invstd)
    return native.backward(
        (maps, gradients, lengths, bool(training), _length(mask), shapes, np.int64(axis), strides)
    )


@overload(functional.batch_norm_backward, prefer_literal=True)
def _batch_norm_backward(
    dy, x, weight, mean, invstd, axis=1, training=True,
    mask=None, with_residual=False, out=None,
):  # fmt: skip
    check_data("x", x)
    check_like(x, dy=dy, out=out)
    check_per_channel((x.dtype,), weight=weight)
    for name, kind in (("dy", dy), ("mean", mean), ("invstd", invstd)):
        if not given(kind):
            refuse(name, "an array", "None")
    check_per_channel(FLOATS, mean=mean, invstd=invstd)
    check_per_channel((types.uint8,), mask=mask)
    if given(mask) and mask.layout == "A":
        refuse("mask", "a contiguous array", mask)
    check_written(out=out)
    check_axis(axis)
    if not isinstance(value_of(training), bool | types.Boolean):
        refuse("training", "True or False", training)
    wanted, masked = flag("with_residual", with_residual), given(mask)
    allocate = _empty_like if wanted else _nothing
    # What has no mask to go through is dy, and is copied before dx may be written over it.
    gate = _itself if masked else _nothing
    keep = _copied if wanted and not masked else _nothing
    number = np.dtype(x.dtype.name).type

    def impl(
        dy, x, weight, mean, invstd, axis=1, training=True, mask=None, with_residual=False,
        out=None,
    ):  # fmt: skip
        C = _channels(x, axis)
        dweight, dbias = np.empty(C, number), np.empty(C, number)
        dresidual = allocate(dy)
        gated, kept = gate(dresidual), keep(dy)
        dx = _empty_like(x) if out is None else out
        if not _gradients_of(
            axis, dx, gated, dy, x, mask, weight, mean, invstd, dweight, dbias, training
        ):
            target, passed = np.empty(x.shape, x.dtype), _duplicate(gated)
            _gradients_of(
                axis, target, passed, _duplicate(dy), _duplicate(x), mask,
                weight, mean, invstd, dweight, dbias, training,
            )  # fmt: skip
            _copy(dx, target)
            _copy(gated, passed)
        _copy(dresidual, kept)
        return functional.Gradients(dx, dweight, dbias, dresidual)

    return impl


@register_jitable
def _moments(axis, x, mean, m2):
    shapes, strides = np.empty((1, x.ndim), np.int64), np.empty((1, x.ndim), np.int64)
    _tell(x, 0, x, shapes, strides)
    maps = Forward(strided(None, x), strided(x, x), strided(None, x), strided(None, _BITS))
    return native.statistics(
        (maps, numbers_of(mean), numbers_of(m2), shapes, np.int64(axis), strides)
    )


@overload(functional.batch_stats, prefer_literal=True)
def _batch_stats(x, axis=1):
    check_data("x", x)
    check_axis(axis)

    def impl(x, axis=1):
        C = _channels(x, axis)
        mean, m2 = np.zeros(C), np.zeros(C)
        fits, count = _moments(axis, x, mean, m2)
        if not fits:
            _moments(axis, _duplicate(x), mean, m2)
        return made(count, mean, m2)

    return impl


@overload(functional.update_running_stats, prefer_literal=True)
def _update_running_stats(running_mean, running_var, stats, momentum=0.1, correction=1):
    check_per_channel(FLOATS, running_mean=running_mean, running_var=running_var)
    check_written(running_mean=running_mean, running_var=running_var)
    if stats != stats_type:
        refuse("stats", "BatchStats", stats)
    check_numbers(momentum=momentum, correction=correction)

    def impl(running_mean, running_var, stats, momentum=0.1, correction=1):
        native.update((
            numbers_of(running_mean), numbers_of(running_var), len(running_mean), len(running_var),
            stats.count, numbers_of(stats.mean), numbers_of(stats.m2), len(stats.mean),
            float(momentum), float(correction),
        ))  # fmt: skip

    return impl
