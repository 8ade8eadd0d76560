"""What a kernel of your own needs to normalize: four numbers at a time, and a block's statistics.

To be called within ``@numba.cuda.jit``. A block takes a channel: its threads load the channel four
numbers at a time, do what comes before to them, and add them up; the block puts together what its
threads have; then they load again, normalize, do what comes after, and store.

Numbers are added up in float32, but by deviations from a mean that is kept as two float32, its sum
and what that sum has rounded away, as are the squares: as exact for a million numbers of a thread
as for four, whatever the data's offset. What threads put together is float64. Squares that leave
float32's range, of deviations below 1e-19 or above 1e18, are lost.

Examples
--------
One block of a multiple of 32 threads for each channel of ``x`` ``[C, M]``, and a tanh behind:

>>> import math
>>> from numba import cuda
>>> from numbabn.cuda import device as bn
>>> @cuda.jit
... def normalize_tanh(x, weight, bias, eps, y):
...     c, step = cuda.blockIdx.x, 4 * cuda.blockDim.x
...     moments = bn.no_moments()
...     for i in range(4 * cuda.threadIdx.x, x.shape[1], step):
...         moments = bn.add4(moments, bn.load4(x[c], i), x.shape[1] - i)
...     stats = bn.block_stats(moments)
...     constants = bn.affine(stats.mean, stats.m2 / stats.count, weight[c], bias[c], eps)
...     for i in range(4 * cuda.threadIdx.x, x.shape[1], step):
...         p, q, r, s = bn.normalize4(bn.load4(x[c], i), constants)
...         bn.store4(y[c], i, (math.tanh(p), math.tanh(q), math.tanh(r), math.tanh(s)))

It is launched as ``normalize_tanh[C, 256](x, weight, bias, 1e-5, y)``.
"""

from typing import Any, NamedTuple

import numpy as np

from .target import (
    device,
    get_four,
    is_aligned,
    put_four,
    reciprocal,
    shared_sums,
    square_root,
    threads,
)
from .vector import Affine, crew_sum

__all__ = [
    "Affine",
    "Moments",
    "Stats",
    "add4",
    "affine",
    "block_stats",
    "load4",
    "no_moments",
    "normalize4",
    "store4",
]


class Moments(NamedTuple):
    """What a thread has added up: all float32, of up to 2**24 numbers."""

    count: Any
    mean: Any
    mean_rest: Any  # what `mean` has rounded away
    m2: Any  # sum of squared deviations from the mean
    m2_rest: Any


class Stats(NamedTuple):
    """Statistics of a channel, all float64; the biased variance is ``m2 / count``."""

    count: Any
    mean: Any
    m2: Any  # sum of squared deviations from the mean


# Four numbers.


@device
def load4(x, i):
    """Load ``x[i]`` to ``x[i + 3]``; 0 in place of what lies behind the end.

    Parameters
    ----------
    x : array, one dimension without gaps, any numbers
        Such as ``a[n, c]`` of an array ``[N, C, S]``.
    i : int, 0 or more

    Returns
    -------
    tuple of four numbers of x's dtype
        Loaded at once, float32 as 16 bytes, where their address is a multiple of their size, and
        else one by one.
    """
    if i + 4 <= len(x) and is_aligned(x, i):
        return get_four(x, i)
    zero = x.dtype.type(0)
    return (
        x[i] if i < len(x) else zero,
        x[i + 1] if i + 1 < len(x) else zero,
        x[i + 2] if i + 2 < len(x) else zero,
        x[i + 3] if i + 3 < len(x) else zero,
    )


@device
def store4(y, i, values):
    """Write four numbers to ``y[i]`` to ``y[i + 3]``, but for what lies behind the end.

    Parameters
    ----------
    y : array, one dimension without gaps, any numbers
        Written at once where `load4` loads at once.
    i : int, 0 or more
    values : tuple of four numbers
        Converted to y's dtype as ``y[i] = value`` does; int8 wants them rounded and in range.
    """
    p, q, r, s = values
    if i + 4 <= len(y) and is_aligned(y, i):
        kind = y.dtype.type
        put_four(y, i, (kind(p), kind(q), kind(r), kind(s)))
        return
    if i < len(y):
        y[i] = p
    if i + 1 < len(y):
        y[i + 1] = q
    if i + 2 < len(y):
        y[i + 2] = r
    if i + 3 < len(y):
        y[i + 3] = s


# Statistics.


@device
def no_moments():
    """Begin with nothing: the `Moments` of no numbers."""
    zero = np.float32(0)
    return Moments(zero, zero, zero, zero, zero)


@device
def _two_sum(a, b):
    """Sum, and what it has rounded away: Knuth's TwoSum."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@device
def _if(valid, value):
    return np.float32(value) if valid else np.float32(0)


@device
def _is_finite(value):
    return value - value == np.float32(0)


@device
def add4(moments, values, count):
    """Add numbers to a thread's moments.

    Parameters
    ----------
    moments : Moments
    values : tuple of four numbers
        Taken as float32.
    count : int
        How many of them there are, from the first on; more than 4 is as 4, so that ``len(x) - i``
        does for what `load4` gave.

    Returns
    -------
    Moments
    """
    zero = np.float32(0)
    if count < 1:
        return moments
    number = moments.count + np.float32(np.int32(min(count, 4)))
    p, q = np.float32(values[0]), _if(count > 1, values[1])
    r, s = _if(count > 2, values[2]), _if(count > 3, values[3])
    mean, rest = moments.mean, moments.mean_rest
    if not _is_finite(mean):  # and it stays so
        return Moments(number, mean + ((p + q) + (r + s)), zero, moments.m2, moments.m2_rest)
    if moments.count == zero and _is_finite(p):
        mean = p
    p, q = (p - mean) - rest, _if(count > 1, (q - mean) - rest)
    r, s = _if(count > 2, (r - mean) - rest), _if(count > 3, (s - mean) - rest)
    # As Chan, Golub & LeVeque (1983) put samples together; those before do not deviate.
    total, squares = (p + q) + (r + s), (p * p + q * q) + (r * r + s * s)
    share = total * reciprocal(number)
    mean, rest = _two_sum(mean, rest + share)
    m2, m2_rest = _two_sum(moments.m2, squares - total * share)
    return Moments(number, mean, rest, m2, moments.m2_rest + m2_rest)


@device
def block_stats(moments):
    """Put together the moments of a block's threads.

    All threads of the block must call, those that have added nothing too. They wait for one
    another, and may call again. The order of sums depends on the size of the block alone.

    Parameters
    ----------
    moments : Moments
        Of this thread. The block has one dimension, and is a multiple of 32 threads.

    Returns
    -------
    Stats
        Of the block, given to all of its threads. Without any numbers the mean is NaN.
    """
    memory, crew = shared_sums(), threads()
    own = np.float64(moments.count)
    mean, m2 = np.float64(moments.mean), np.float64(moments.m2) + np.float64(moments.m2_rest)
    if _is_finite(moments.mean):
        mean += np.float64(moments.mean_rest)
    count = crew_sum(own, memory, crew)
    center = crew_sum(mean * own, memory, crew) / count
    off = mean - center
    return Stats(count, center, crew_sum(m2 + off * off * own if own > 0.0 else 0.0, memory, crew))


# Normalization.


@device
def affine(mean, var, weight, bias, eps):
    """Compute the constants of `normalize4`.

    Parameters
    ----------
    mean, var : float
        Of the channel: ``stats.mean`` and ``stats.m2 / stats.count``, or its running statistics.
    weight, bias : float
        Its scale and shift; 1 and 0 if there are none.
    eps : float
        Added to the variance.

    Returns
    -------
    Affine
        ``mean``, ``scale`` and ``shift`` in float32; what the mean's rounding leaves is in the
        shift.
    """
    scale = np.float64(weight) / square_root(np.float64(var) + eps)
    near = np.float32(mean)
    shift = np.float64(bias) - (np.float64(mean) - np.float64(near)) * scale
    return Affine(near, np.float32(scale), np.float32(shift))


@device
def normalize4(values, constants):
    """``(value - mean) * scale + shift`` of four numbers.

    Parameters
    ----------
    values : tuple of four numbers
        Taken as float32.
    constants : Affine
        From `affine`.

    Returns
    -------
    tuple of four float32
    """
    p, q, r, s = values
    mean, scale, shift = constants
    return (
        (np.float32(p) - mean) * scale + shift,
        (np.float32(q) - mean) * scale + shift,
        (np.float32(r) - mean) * scale + shift,
        (np.float32(s) - mean) * scale + shift,
    )
