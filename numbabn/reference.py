"""The float64 oracle: batch normalization as its formulas, never fast.

Every test and the demo compare against this module, so it shares no code with the rest of the
package: it imports NumPy only. Data arrays hold their C channels at `axis` (any axis, negative
counts from the end) and m values per channel over all others; per-channel arrays have shape
``(C,)``. Any float dtype goes in and is converted to float64 first; float64 comes out, unrounded.
NaN and infinity pass through without a warning.

References
----------
.. [1] S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
   Internal Covariate Shift", ICML 2015, arXiv:1502.03167.
.. [2] T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for Computing the Sample Variance:
   Analysis and Recommendations", The American Statistician 37(3), 1983.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64 = NDArray[np.float64]


def _float64(values: ArrayLike) -> Float64:
    """Return a float64 copy, so that no result shares memory with an argument."""
    return np.array(values, dtype=np.float64)


def _rows(x: Float64, axis: int) -> Float64:
    """Return `x` as ``(C, m)``: one contiguous row per channel, which NumPy sums pairwise."""
    return np.ascontiguousarray(np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1))


def _spread(values: ArrayLike | None, x: Float64, axis: int, default: float = 0.0) -> Float64:
    """Return a ``(C,)`` array, or C times `default`, in the shape that broadcasts against `x`."""
    C = x.shape[axis]
    shape = [1] * x.ndim
    shape[axis] = C
    return (np.full(C, default) if values is None else _float64(values)).reshape(shape)


@np.errstate(all="ignore")
def statistics(x: ArrayLike, *, axis: int = 1) -> tuple[int, Float64, Float64]:
    """Count, mean and sum of squared deviations (M2) of every channel.

    ``mean = sum(x) / m`` and ``m2 = sum((x - mean)**2)``, first two steps of Algorithm 1 of [1]_,
    M2 in two passes and corrected for the rounding of the mean as in [2]_. A constant channel
    gives that constant and 0, both exactly; an empty batch gives zeros.

    Returns
    -------
    count : int
    mean, m2 : (C,) arrays
    """
    rows = _rows(_float64(x), axis)
    C, count = rows.shape
    if count == 0:
        return 0, np.zeros(C), np.zeros(C)
    # Centring on a value of the channel makes constants exact. Doing it again on the result
    # removes what rounding the first differences cost, if that value was an outlier.
    mean = rows[:, 0]
    for _ in range(2):
        center = np.where(np.isfinite(mean), mean, 0.0)
        mean = center + np.mean(rows - center[:, None], axis=1)
    deviation = rows - mean[:, None]
    # Not quite 0, because `mean` is rounded to float64.
    remainder = np.mean(deviation, axis=1)
    return count, mean, np.sum((deviation - remainder[:, None]) ** 2, axis=1)


def relu_mask(z: ArrayLike) -> NDArray[np.bool_]:
    """Return where ReLU lets `z` through: ``not z <= 0``, so NaN passes."""
    return np.asarray(~(_float64(z) <= 0.0))


@np.errstate(all="ignore")
def forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: str | None = None,
) -> tuple[Float64, Float64, Float64]:
    """Normalize with the statistics of the batch itself (training), Algorithm 1 of [1]_.

    ``y = act((x - mean) * invstd * weight + bias + residual)`` with
    ``invstd = 1 / sqrt(m2 / m + eps)``. `weight` and `bias` (gamma and beta) are ``(C,)``,
    `residual` the shape of `x`, `activation` is None or "relu". An empty batch has the mean and
    the variance 0.

    Returns
    -------
    y : array of the shape of `x`
    mean, invstd : (C,) arrays
    """
    x = _float64(x)
    count, mean, m2 = statistics(x, axis=axis)
    var = m2 / max(count, 1)
    y = inference(
        x, mean, var, weight, bias, eps=eps, axis=axis, residual=residual, activation=activation
    )
    return y, mean, 1.0 / np.sqrt(var + eps)


@np.errstate(all="ignore")
def inference(
    x: ArrayLike,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: str | None = None,
) -> Float64:
    """Normalize with given statistics; Algorithm 2, step 11 of [1]_.

    Formula and shapes are those of `forward`, with ``invstd = 1 / sqrt(running_var + eps)``.
    """
    x = _float64(x)
    invstd = 1.0 / np.sqrt(_float64(running_var) + eps)
    x_hat = (x - _spread(running_mean, x, axis)) * _spread(invstd, x, axis)
    z = x_hat * _spread(weight, x, axis, default=1.0) + _spread(bias, x, axis)
    if residual is not None:
        z = z + _float64(residual)
    if activation is None:
        return z
    if activation == "relu":
        return np.where(relu_mask(z), z, 0.0)
    raise ValueError(f"activation must be None or 'relu', got {activation!r}")


@np.errstate(all="ignore")
def backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    mean: ArrayLike,
    invstd: ArrayLike,
    *,
    axis: int = 1,
    training: bool = True,
    mask: ArrayLike | None = None,
) -> tuple[Float64, Float64, Float64, Float64]:
    """Gradients of a loss from its gradient `dy` by y; the chain rule of section 3 of [1]_.

    With ``x_hat = (x - mean) * invstd``, ``dbias = sum(dy)`` and ``dweight = sum(dy * x_hat)``.
    In training ``dx = weight * invstd * (dy - dbias / m - x_hat * dweight / m)``: the equations
    of [1]_ put into one, where ``sum(x - mean) = 0`` removes the last term of the mean's
    gradient. Otherwise `mean` and `invstd` are constants and ``dx = dy * weight * invstd``.
    `mask`, boolean and of the shape of `x`, is True where the activation let the value through;
    elsewhere `dy` counts as 0, even if it is NaN.

    Returns
    -------
    dx : array of the shape of `x`
    dweight, dbias : (C,) arrays
    dresidual : array of the shape of `x`, `dy` behind the mask
    """
    dy, x = _float64(dy), _float64(x)
    if mask is not None:
        dy = np.where(np.asarray(mask, dtype=np.bool_), dy, 0.0)
    invstd = _spread(invstd, x, axis)
    scale = _spread(weight, x, axis, default=1.0) * invstd
    x_hat = (x - _spread(mean, x, axis)) * invstd
    dbias = np.sum(_rows(dy, axis), axis=1)
    dweight = np.sum(_rows(dy * x_hat, axis), axis=1)
    if not training:
        return dy * scale, dweight, dbias, dy
    m = x.size // x.shape[axis]
    dx = scale * (dy - _spread(dbias / m, x, axis) - x_hat * _spread(dweight / m, x, axis))
    return dx, dweight, dbias, dy


@np.errstate(all="ignore")
def running_update(
    running_mean: ArrayLike,
    running_var: ArrayLike,
    count: int,
    mean: ArrayLike,
    m2: ArrayLike,
    momentum: float = 0.1,
    *,
    correction: int = 1,
) -> tuple[Float64, Float64]:
    """Move the running statistics towards those of a batch; the moving averages of 3.1 of [1]_.

    ``running = (1 - momentum) * running + momentum * batch``, the variance of the batch being
    ``m2 / (count - correction)``. All arrays are ``(C,)``; returns the new mean and variance,
    which are the old ones if `count` is 0.
    """
    running_mean, running_var = _float64(running_mean), _float64(running_var)
    if count == 0:
        return running_mean, running_var
    var = _float64(m2) / (count - correction)
    new_mean = (1.0 - momentum) * running_mean + momentum * _float64(mean)
    return new_mean, (1.0 - momentum) * running_var + momentum * var


@np.errstate(all="ignore")
def fold(
    conv_weight: ArrayLike,
    conv_bias: ArrayLike | None,
    running_mean: ArrayLike,
    running_var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[Float64, Float64]:
    """Fold `inference` into the linear map before it (Algorithm 2, step 11 of [1]_).

    ``w = conv_weight * scale`` and ``b = (conv_bias - running_mean) * scale + bias`` with
    ``scale = weight / sqrt(running_var + eps)``. `conv_weight` is ``(C, ...)`` with the output
    channels first, all else ``(C,)``; `conv_bias` None means zeros.
    """
    w, mean, var = _float64(conv_weight), _float64(running_mean), _float64(running_var)
    scale = _spread(weight, var, 0, default=1.0) / np.sqrt(var + eps)
    b = (_spread(conv_bias, mean, 0) - mean) * scale + _spread(bias, mean, 0)
    return w * _spread(scale, w, 0), b


@np.errstate(all="ignore")
def population(
    batches: Iterable[ArrayLike], *, axis: int = 1, method: str = "exact"
) -> tuple[Float64, Float64]:
    """Mean and variance, both ``(C,)``, of a data set that comes in batches.

    "exact": of all values together, ``var = m2 / count``. "paper": Algorithm 2, step 10 of [1]_,
    the mean over the batches of their means and of ``m / (m - 1)`` times their variances
    ``m2 / m``, each with its own m, which must be 2 or more; empty batches are left out.
    """
    rows = [_rows(_float64(batch), axis) for batch in batches]
    if method == "exact":
        count, mean, m2 = statistics(np.concatenate(rows, axis=1), axis=0)
        return mean, m2 / max(count, 1)
    if method == "paper":
        moments = [statistics(row, axis=0) for row in rows if row.size]
        _, mean, _ = statistics(np.stack([mean for _, mean, _ in moments]))
        _, var, _ = statistics(np.stack([m2 / (m - 1) for m, _, m2 in moments]))
        return mean, var
    raise ValueError(f"method must be 'exact' or 'paper', got {method!r}")
