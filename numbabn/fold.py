"""Folding a trained batch norm into the convolution or linear layer before it."""

from typing import Any

import numpy as np

from . import checks


def fold(
    conv_weight: Any,
    conv_bias: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
) -> tuple[Any, Any]:
    """Fold inference-mode batch norm into the layer whose output it normalizes.

    With the result, ``conv(x)`` equals ``batch_norm_inference(conv(x), ...)`` before it.

    Parameters
    ----------
    conv_weight : ndarray, shape (C, ...)
        Output channels first, as PyTorch keeps convolutions and linear layers.
    conv_bias : ndarray, shape (C,), or None
        None means zeros.
    running_mean, running_var : ndarray, shape (C,)
        The batch norm's statistics.
    weight, bias : ndarray, shape (C,), optional
        Its scale and shift; None means ones and zeros.
    eps : float
        Added to the variance.

    Returns
    -------
    conv_weight : ndarray, shape (C, ...)
        ``conv_weight * weight / sqrt(running_var + eps)``, a new array of the same dtype.
    conv_bias : ndarray, shape (C,)
        ``(conv_bias - running_mean) * weight / sqrt(running_var + eps) + bias``, in that dtype.

    Raises
    ------
    TypeError, ValueError
        If an argument's kind, dtype, shape or value is not as above.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> w, b = numbabn.fold(np.eye(2), None, np.array([1.0, 2.0]), np.array([4.0, 9.0]), eps=0.0)
    >>> w.tolist(), b.tolist()
    ([[0.5, 0.0], [0.0, 0.3333333333333333]], [-0.5, -0.6666666666666666])
    """
    checks.numpy_array("conv_weight", conv_weight)
    checks.data("conv_weight", conv_weight)
    C = conv_weight.shape[0]
    for name, array in (("running_mean", running_mean), ("running_var", running_var)):
        checks.per_channel(name, array, C)
    for name, array in (("conv_bias", conv_bias), ("weight", weight), ("bias", bias)):
        if array is not None:
            checks.per_channel(name, array, C)
    eps = checks.epsilon(eps)
    # Subclasses such as np.matrix multiply in a way of their own.
    conv_weight, conv_bias, running_mean, running_var, weight, bias = (
        array if array is None else np.asarray(array)
        for array in (conv_weight, conv_bias, running_mean, running_var, weight, bias)
    )

    with np.errstate(all="ignore"):
        scale = 1.0 / np.sqrt(running_var.astype(np.float64) + eps)
        if weight is not None:
            scale = scale * weight
        shift = (
            -running_mean.astype(np.float64)
            if conv_bias is None
            else conv_bias - running_mean.astype(np.float64)
        )
        shift = shift * scale
        if bias is not None:
            shift = shift + bias
        columns = scale.reshape(C, *[1] * (conv_weight.ndim - 1))
        return (conv_weight * columns).astype(conv_weight.dtype), shift.astype(conv_weight.dtype)
