"""The public functions within functions that numba compiles: same names, keywords and bits.

What types tell is checked while the caller's function is compiled, and refused with a
``TypingError``; what values tell is checked when it runs. All work is done in the calling thread,
so that the caller's own `prange` stays the only parallel region.

`BatchStats` is a type there, too: made, merged, returned and passed in.
"""

import operator

import numpy as np
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.cpython.unsafe.tuple import tuple_setitem
from numba.extending import (
    NativeValue,
    box,
    lower_builtin,
    make_attribute_wrapper,
    models,
    overload,
    overload_attribute,
    overload_method,
    register_jitable,
    register_model,
    type_callable,
    typeof_impl,
    unbox,
)

from . import functional
from .cpu import native
from .cpu.arguments import Backward, Forward, Gradients, Parameters, Settings, numbers_of, strided
from .stats import BatchStats

_FLOATS = (types.float32, types.float64)
_BITS = np.empty(0, np.uint8)  # what a mask is like
_PER_CHANNEL = types.Array(types.float64, 1, "C")


# What types tell.


def _refuse(name, expected, kind):
    raise TypingError(f"{name}: expected {expected}, got {kind}")


def _given(kind):
    """Whether an argument is there: neither left out nor None."""
    return _value(kind) is not None


def _value(kind):
    """Give the value of a literal, of a default, or of None; any other type itself."""
    if isinstance(kind, types.Omitted):
        return kind.value
    if isinstance(kind, types.Literal):
        return kind.literal_value
    return None if isinstance(kind, types.NoneType) else kind


def _check_data(name, kind):
    if not isinstance(kind, types.Array) or kind.dtype not in _FLOATS or not kind.aligned:
        _refuse(name, "an array of float32 or float64", kind)
    if kind.ndim < 2:
        _refuse(name, "2 or more dimensions", kind)


def _check_like(x, **kinds):
    for name, kind in kinds.items():
        if _given(kind):
            _check_data(name, kind)
            if (kind.dtype, kind.ndim) != (x.dtype, x.ndim):
                _refuse(name, f"an array of {x.dtype}, {x.ndim}d, like x", kind)


def _check_per_channel(dtypes, **kinds):
    for name, kind in kinds.items():
        if not _given(kind):
            continue
        if not isinstance(kind, types.Array) or kind.ndim != 1 or kind.dtype not in dtypes:
            _refuse(name, f"a 1d array of {' or '.join(map(str, dtypes))}", kind)


def _check_written(**kinds):
    for name, kind in kinds.items():
        if _given(kind) and not kind.mutable:
            _refuse(name, "a writeable array", kind)


def _check_numbers(**kinds):
    for name, kind in kinds.items():
        value = _value(kind)
        real = isinstance(value, types.Integer | types.Float | int | float)
        if not real or isinstance(value, bool | types.Boolean):
            _refuse(name, "a real number", kind)


def _check_axis(kind):
    if not isinstance(_value(kind), types.Integer | int) or isinstance(_value(kind), bool):
        _refuse("axis", "an integer", kind)


def _rectifies(kind):
    if _value(kind) not in (None, "relu"):
        _refuse("activation", "None or 'relu', as a literal", kind)
    return _given(kind)


def _flag(name, kind):
    value = _value(kind)
    if not isinstance(value, bool):
        _refuse(name, "True or False, as a literal", kind)
    return bool(value)


# Arrays.


@register_jitable
def _tell(array, k, like, shapes, steps):
    """Put an array's sizes and steps into row `k`; those of another where it is None."""
    told = like if array is None else array
    for i in range(told.ndim):
        shapes[k, i] = told.shape[i]
        steps[k, i] = told.strides[i] // told.itemsize


@register_jitable
def _tell_bits(x, k, shapes, steps):
    """Put the sizes and steps of a mask of x into row `k`: bits in C order."""
    step = 1
    for i in range(x.ndim - 1, -1, -1):
        shapes[k, i] = x.shape[i]
        steps[k, i] = step
        step *= x.shape[i]


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
    shapes, steps = np.empty((4, x.ndim), np.int64), np.empty((4, x.ndim), np.int64)
    _tell(y, 0, x, shapes, steps)
    _tell(x, 1, x, shapes, steps)
    _tell(residual, 2, x, shapes, steps)
    if mask is None:
        _tell(x, 3, x, shapes, steps)
    else:
        _tell_bits(x, 3, shapes, steps)
    maps = Forward(strided(y, x), strided(x, x), strided(residual, x), strided(mask, _BITS))
    parameters = Parameters(
        numbers_of(weight), numbers_of(bias), numbers_of(running_mean), numbers_of(running_var),
        numbers_of(mean), numbers_of(invstd),
    )  # fmt: skip
    lengths = _length(weight), _length(bias), _length(running_mean), _length(running_var)
    settings = Settings(float(eps), float(momentum), float(correction), rectify)
    return run((maps, parameters, lengths, settings, shapes, np.int64(axis), steps))


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
            run, axis, target, np.ascontiguousarray(x), _contiguous(residual), mask, weight, bias,
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


def _contiguous(array):
    """Stand for an array, or None, in C order, in compiled functions."""
    raise NotImplementedError


@overload(_contiguous)
def _overload_contiguous(array):
    if _given(array):
        return lambda array: np.ascontiguousarray(array)
    return lambda array: None


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
    _check_data("x", x)
    _check_like(x, residual=residual, out=out)
    _check_per_channel(
        (x.dtype,), weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    _check_written(out=out)
    _check_numbers(eps=eps)
    _check_axis(axis)


@overload(functional.batch_norm, prefer_literal=True)
def _batch_norm(
    x, running_mean=None, running_var=None, weight=None,
    bias=None, training=False, momentum=0.1, eps=1e-5, axis=1,
    residual=None, activation=None, correction=1, out=None,
):  # fmt: skip
    _check_call(x, weight, bias, running_mean, running_var, residual, out, eps, axis)
    _check_numbers(momentum=momentum, correction=correction)
    if not isinstance(_value(training), bool | types.Boolean):
        _refuse("training", "True or False", training)
    rectify = _rectifies(activation)
    always, never = _value(training) is True, _value(training) is False
    if not never:
        _check_written(running_mean=running_mean, running_var=running_var)
    lacking = next(
        (
            name
            for name, kind in (("running_mean", running_mean), ("running_var", running_var))
            if not _given(kind)
        ),
        None,
    )
    if lacking and never:
        _refuse(lacking, "an array of shape (C,) in inference", "None")
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
    _check_numbers(momentum=momentum, correction=correction)
    _check_written(running_mean=running_mean, running_var=running_var)
    rectify = _rectifies(activation)
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
        if not _given(kind):
            _refuse(name, "an array of shape (C,) in inference", "None")
    rectify = _rectifies(activation)

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
    shapes, steps = np.empty((5, x.ndim), np.int64), np.empty((5, x.ndim), np.int64)
    _tell(dx, 0, x, shapes, steps)
    _tell(dresidual, 1, dx, shapes, steps)
    _tell(dy, 2, x, shapes, steps)
    _tell(x, 3, x, shapes, steps)
    if mask is None:
        _tell(dx, 4, x, shapes, steps)
    else:
        _tell_bits(x, 4, shapes, steps)
    maps = Backward(
        strided(dx, x), strided(dresidual, x), strided(dy, x), strided(x, x), strided(mask, _BITS)
    )
    gradients = Gradients(
        numbers_of(weight), numbers_of(mean), numbers_of(invstd), numbers_of(dweight),
        numbers_of(dbias),
    )  # fmt: skip
    lengths = _length(weight), _length(mean), _length(invstd)
    return native.backward(
        (maps, gradients, lengths, bool(training), _length(mask), shapes, np.int64(axis), steps)
    )


@overload(functional.batch_norm_backward, prefer_literal=True)
def _batch_norm_backward(
    dy, x, weight, mean, invstd, axis=1, training=True,
    mask=None, with_residual=False, out=None,
):  # fmt: skip
    _check_data("x", x)
    _check_like(x, dy=dy, out=out)
    _check_per_channel((x.dtype,), weight=weight)
    for name, kind in (("dy", dy), ("mean", mean), ("invstd", invstd)):
        if not _given(kind):
            _refuse(name, "an array", "None")
    _check_per_channel(_FLOATS, mean=mean, invstd=invstd)
    _check_per_channel((types.uint8,), mask=mask)
    if _given(mask) and mask.layout == "A":
        _refuse("mask", "a contiguous array", mask)
    _check_written(out=out)
    _check_axis(axis)
    if not isinstance(_value(training), bool | types.Boolean):
        _refuse("training", "True or False", training)
    wanted, masked = _flag("with_residual", with_residual), _given(mask)
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
            target, passed = np.empty(x.shape, x.dtype), _contiguous(gated)
            _gradients_of(
                axis, target, passed, np.ascontiguousarray(dy), np.ascontiguousarray(x), mask,
                weight, mean, invstd, dweight, dbias, training,
            )  # fmt: skip
            _copy(dx, target)
            _copy(gated, passed)
        _copy(dresidual, kept)
        return functional.Gradients(dx, dweight, dbias, dresidual)

    return impl


@register_jitable
def _moments(axis, x, mean, m2):
    shapes, steps = np.empty((1, x.ndim), np.int64), np.empty((1, x.ndim), np.int64)
    _tell(x, 0, x, shapes, steps)
    maps = Forward(strided(None, x), strided(x, x), strided(None, x), strided(None, _BITS))
    return native.statistics(
        (maps, numbers_of(mean), numbers_of(m2), shapes, np.int64(axis), steps)
    )


# Statistics.


class _Stats(types.Type):
    """`BatchStats` in compiled functions."""

    def __init__(self):
        super().__init__("BatchStats")


_stats = _Stats()


@register_model(_Stats)
class _StatsModel(models.StructModel):
    def __init__(self, manager, kind):
        members = [("count", types.int64), ("mean", _PER_CHANNEL), ("m2", _PER_CHANNEL)]
        super().__init__(manager, kind, members)


for _name in ("count", "mean", "m2"):
    make_attribute_wrapper(_Stats, _name, _name)


@typeof_impl.register(BatchStats)
def _type_of_stats(stats: BatchStats, context):
    return _stats


@type_callable(BatchStats)
def _type_stats(context):
    def typer(count=None, mean=None, m2=None):
        if count is None:
            return _stats
        if isinstance(count, types.Integer) and (mean, m2) == (_PER_CHANNEL, _PER_CHANNEL):
            return _stats
        return None

    return typer


@lower_builtin(BatchStats, types.Integer, _PER_CHANNEL, _PER_CHANNEL)
def _make_stats(context, builder, signature, args):
    stats = cgutils.create_struct_proxy(_stats)(context, builder)
    stats.count = context.cast(builder, args[0], signature.args[0], types.int64)
    stats.mean, stats.m2 = args[1:]
    for array in args[1:]:
        context.nrt.incref(builder, _PER_CHANNEL, array)
    return stats._getvalue()


@lower_builtin(BatchStats)
def _make_empty_stats(context, builder, signature, args):
    def empty():
        return BatchStats(0, np.zeros(0), np.zeros(0))

    return context.compile_internal(builder, empty, signature, args)


@unbox(_Stats)
def _unbox_stats(kind, thing, c):
    stats = cgutils.create_struct_proxy(kind)(c.context, c.builder)
    failed = cgutils.false_bit
    for name, member in (("count", types.int64), ("mean", _PER_CHANNEL), ("m2", _PER_CHANNEL)):
        attribute = c.pyapi.object_getattr_string(thing, name)
        if member is _PER_CHANNEL:
            # Whoever made the statistics chose their strides.
            contiguous = c.pyapi.unserialize(c.pyapi.serialize_object(np.ascontiguousarray))
            given, attribute = attribute, c.pyapi.call_function_objargs(contiguous, [attribute])
            c.pyapi.decref(given)
            c.pyapi.decref(contiguous)
        native_value = c.unbox(member, attribute)
        setattr(stats, name, native_value.value)
        failed = c.builder.or_(failed, native_value.is_error)
        c.pyapi.decref(attribute)
    return NativeValue(stats._getvalue(), is_error=failed)


@box(_Stats)
def _box_stats(kind, value, c):
    stats = cgutils.create_struct_proxy(kind)(c.context, c.builder, value=value)
    members = [
        c.box(types.int64, stats.count),
        c.box(_PER_CHANNEL, stats.mean),
        c.box(_PER_CHANNEL, stats.m2),
    ]
    made = c.pyapi.unserialize(c.pyapi.serialize_object(BatchStats))
    result = c.pyapi.call_function_objargs(made, members)
    for member in (made, *members):
        c.pyapi.decref(member)
    return result


@overload(functional.batch_stats, prefer_literal=True)
def _batch_stats(x, axis=1):
    _check_data("x", x)
    _check_axis(axis)

    def impl(x, axis=1):
        C = _channels(x, axis)
        mean, m2 = np.zeros(C), np.zeros(C)
        fits, count = _moments(axis, x, mean, m2)
        if not fits:
            _moments(axis, np.ascontiguousarray(x), mean, m2)
        return BatchStats(count, mean, m2)

    return impl


@register_jitable
def _variance(stats, correction):
    if stats.count <= correction:
        return np.full_like(stats.m2, np.nan)
    return stats.m2 / (stats.count - correction)


@overload_attribute(_Stats, "var")
def _var(stats):
    return lambda stats: _variance(stats, 0)


@overload_attribute(_Stats, "unbiased_var")
def _unbiased_var(stats):
    return lambda stats: _variance(stats, 1)


@overload_method(_Stats, "invstd")
def _invstd(stats, eps=1e-5):
    return lambda stats, eps=1e-5: 1.0 / np.sqrt(stats.var + eps)


@overload_method(_Stats, "merge")
def _merge(stats, other):
    if other != _stats:
        _refuse("other", "BatchStats", other)

    def impl(stats, other):  # Chan, Golub & LeVeque (1983), eq. 2.1, as `BatchStats.merge`
        channels, others = stats.mean.shape[0], other.mean.shape[0]
        if stats.count == 0 and (channels == 0 or channels == others):
            return other
        if other.count == 0 and (others == 0 or channels == others):
            return stats
        if channels != others:
            raise ValueError(f"other: expected {channels} channels, got {others}")
        count = stats.count + other.count
        part = other.count / count
        mean, m2 = np.empty(channels), np.empty(channels)
        for c in range(channels):
            delta = other.mean[c] - stats.mean[c]
            if np.isfinite(delta):
                mean[c] = stats.mean[c] + delta * part
            else:
                mean[c] = stats.mean[c] * (stats.count / count) + other.mean[c] * part
            m2[c] = stats.m2[c] + other.m2[c] + delta * delta * (stats.count * part)
        return BatchStats(count, mean, m2)

    return impl


@overload(operator.iadd)
@overload(operator.add)
def _add(a, b):
    if a == _stats and b == _stats:
        return lambda a, b: a.merge(b)
    return None


@overload(functional.update_running_stats, prefer_literal=True)
def _update_running_stats(running_mean, running_var, stats, momentum=0.1, correction=1):
    _check_per_channel(_FLOATS, running_mean=running_mean, running_var=running_var)
    _check_written(running_mean=running_mean, running_var=running_var)
    if stats != _stats:
        _refuse("stats", "BatchStats", stats)
    _check_numbers(momentum=momentum, correction=correction)

    def impl(running_mean, running_var, stats, momentum=0.1, correction=1):
        native.update((
            numbers_of(running_mean), numbers_of(running_var), len(running_mean), len(running_var),
            stats.count, numbers_of(stats.mean), numbers_of(stats.m2), len(stats.mean),
            float(momentum), float(correction),
        ))  # fmt: skip

    return impl
