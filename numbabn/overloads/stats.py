"""`BatchStats` in functions that numba compiles: made, merged, returned and passed in."""

import operator

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import (
    NativeValue,
    box,
    intrinsic,
    make_attribute_wrapper,
    models,
    overload,
    overload_attribute,
    overload_method,
    register_jitable,
    register_model,
    typeof_impl,
    unbox,
)

from ..stats import BatchStats
from .kinds import FLOATS, check_numbers, check_per_channel, given, refuse, value_of

_PER_CHANNEL = types.Array(types.float64, 1, "C")
# The caller's own fast-math flags would reach in here, and let NaN and infinity be dropped.
_EXACT = {"fastmath": False}


class _Stats(types.Type):
    """`BatchStats` in compiled functions."""

    def __init__(self):
        super().__init__("BatchStats")


stats_type = _Stats()


@register_model(_Stats)
class _StatsModel(models.StructModel):
    def __init__(self, manager, kind):
        members = [("count", types.int64), ("mean", _PER_CHANNEL), ("m2", _PER_CHANNEL)]
        super().__init__(manager, kind, members)


for _name in ("count", "mean", "m2"):
    make_attribute_wrapper(_Stats, _name, _name)


@typeof_impl.register(BatchStats)
def _type_of_stats(stats: BatchStats, context):
    return stats_type


@intrinsic
def made(typing_context, count, mean, m2):
    """Put statistics together whose arrays are of one length."""

    def codegen(context, builder, signature, args):
        stats = cgutils.create_struct_proxy(stats_type)(context, builder)
        stats.count, stats.mean, stats.m2 = args
        for array in args[1:]:
            context.nrt.incref(builder, _PER_CHANNEL, array)
        return stats._getvalue()

    return stats_type(types.int64, _PER_CHANNEL, _PER_CHANNEL), codegen


def _wide(array):
    """Stand for an array as statistics have it, none of nothing, in compiled functions."""
    raise NotImplementedError


@overload(_wide)
def _overload_wide(array):
    if not given(array):
        return lambda array: np.zeros(0)
    if array == _PER_CHANNEL:
        return lambda array: array

    def impl(array):
        target = np.empty(len(array))
        for c in range(len(array)):
            target[c] = array[c]
        return target

    return impl


@overload(BatchStats)
def _batch_stats(count=0, mean=None, m2=None):
    if not isinstance(value_of(count), types.Integer | int) or isinstance(value_of(count), bool):
        refuse("count", "an integer", count)
    check_per_channel(FLOATS, mean=mean, m2=m2)

    def impl(count=0, mean=None, m2=None):
        a, b = _wide(mean), _wide(m2)
        if len(a) != len(b):
            raise ValueError(f"mean, m2: expected one shape (C,), got ({len(a)},) and ({len(b)},)")
        return made(count, a, b)

    return impl


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


@register_jitable(fastmath=False)
def _variance(stats, correction):
    if stats.count <= correction:
        return np.full_like(stats.m2, np.nan)
    return stats.m2 / (stats.count - correction)


@overload_attribute(_Stats, "var", jit_options=_EXACT)
def _var(stats):
    return lambda stats: _variance(stats, 0)


@overload_attribute(_Stats, "unbiased_var", jit_options=_EXACT)
def _unbiased_var(stats):
    return lambda stats: _variance(stats, 1)


@overload_method(_Stats, "invstd", jit_options=_EXACT)
def _invstd(stats, eps=1e-5):
    check_numbers(eps=eps)
    return lambda stats, eps=1e-5: 1.0 / np.sqrt(stats.var + eps)


@overload_method(_Stats, "merge", jit_options=_EXACT)
def _merge(stats, other):
    if other != stats_type:
        refuse("other", "BatchStats", other)

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
        return made(count, mean, m2)

    return impl


@overload(operator.iadd)
@overload(operator.add)
def _add(a, b):
    if stats_type not in (a, b):
        return None
    if a != b:
        refuse("other", "BatchStats", b if a == stats_type else a)
    return lambda a, b: a.merge(b)
