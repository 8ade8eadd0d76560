"""The public functions: check the arguments, view the arrays, call the backend."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .backends import backend_of, borrow, on_arrays, tell_autograd
from .layout import arrange
from .libraries import DeviceArray, is_on_device, namespace
from .stats import BatchStats, PerChannel


class ForwardResult(NamedTuple):
    """What a training step's forward pass leaves for its backward pass.

    Attributes
    ----------
    y : ndarray
        The result, of x's shape and dtype.
    mean, invstd : ndarray of float64, shape (C,)
        The batch's mean and ``1 / sqrt(biased variance + eps)``.
    mask : ndarray of uint8, or None
        With an activation: bit ``i % 8`` of byte ``i // 8`` says whether element ``i`` of y, in C
        order, passed the ReLU.
    """

    y: Any
    mean: PerChannel
    invstd: PerChannel
    mask: Any


class Gradients(NamedTuple):
    """Gradients of a loss by each input of the forward pass.

    Attributes
    ----------
    dx : ndarray
        Of x's shape and dtype.
    dweight, dbias : ndarray, shape (C,)
        In weight's dtype; where there is no weight in x's, or float32 if that has 16 bits.
    dresidual : ndarray or None
        dy through the activation, if it was asked for.
    """

    dx: Any
    dweight: Any
    dbias: Any
    dresidual: Any


# Past the constructors of named tuples, as in `arrange`.
_forward_result = partial(tuple.__new__, ForwardResult)
_gradients = partial(tuple.__new__, Gradients)


def _data(x: Any, axis: Any) -> tuple[Any, int, int, int]:
    """Backend, axis from the front, channels, values per channel."""
    backend = backend_of("x", x)
    checks.data("x", x)
    axis = checks.channel_axis(axis, x)
    C = x.shape[axis]
    return backend, axis, C, x.size // C


def _check_like(x: Any, **arrays: Any) -> None:
    for name, array in arrays.items():
        if array is not None:
            checks.like(name, array, x)


def _check_parameters(x: Any, C: int, **arrays: Any) -> None:
    for name, array in arrays.items():
        if array is not None:
            checks.per_channel(name, array, C, checks.parameter_dtypes(x.dtype))


def _average(running: Any, batch: PerChannel, momentum: float) -> None:
    kept = namespace("stats", batch).full_like(batch, 1.0 - momentum)  # in float64
    running[...] = kept * running + momentum * batch


class _Sweep(NamedTuple):
    """What a forward pass or inference has found out about its arguments."""

    backend: Any
    axis: int
    values: int  # per channel
    momentum: float
    eps: float
    correction: float
    relu: bool


@checks.remembered
def check_forward(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
    momentum: Any, eps: Any, axis: Any, residual: Any, activation: Any, correction: Any, out: Any,
) -> _Sweep:  # fmt: skip
    """Check what a forward pass in training is given."""
    backend, axis, C, count = _data(x, axis)
    _check_parameters(
        x, C, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    eps = checks.epsilon(eps)
    relu = checks.relu(activation)
    checks.trainable(x, count)
    _check_like(x, residual=residual, out=out)
    momentum = checks.real("momentum", momentum)
    correction = checks.real("correction", correction)
    if running_var is not None:
        checks.denominator(count, correction)
    return _Sweep(backend, axis, count, momentum, eps, correction, relu)


@on_arrays(
    "x", "weight", "bias", "running_mean", "running_var", "residual", "out",
    written=("running_mean", "running_var", "out"),
)  # fmt: skip
def _forward(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, residual: Any, out: Any,
    momentum: Any, eps: Any, axis: Any, activation: Any, correction: Any, to_go_back: bool,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Give y and, for a backward pass to come, mean, invstd and mask."""
    sweep: _Sweep = check_forward(
        x, weight, bias, running_mean, running_var,
        momentum, eps, axis, residual, activation, correction, out,
    )  # fmt: skip
    if running_mean is not None or running_var is not None:
        inputs = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        checks.writable("running_mean", running_mean, {"running_var": running_var, **inputs})
        checks.writable("running_var", running_var, inputs)
    if out is not None:
        inputs = {
            "x": x, "residual": residual, "weight": weight, "bias": bias,
            "running_mean": running_mean, "running_var": running_var,
        }  # fmt: skip
        checks.writable("out", out, inputs, in_place=("x", "residual"))

    backend = sweep.backend
    y = backend.empty_like(x) if out is None else out
    mask = backend.allocate_mask(x) if sweep.relu and to_go_back else None
    if sweep.values == 0:
        C = x.shape[sweep.axis]
        with np.errstate(divide="ignore"):
            invstd = np.full(C, 1.0 / np.sqrt(sweep.eps))
        return y, backend.upload(np.zeros(C), x), backend.upload(invstd, x), mask
    layout = arrange(backend, sweep.axis, (x, residual), (y,), mask=mask)
    mean, invstd = backend.forward(
        layout, (weight, bias, running_mean, running_var),
        sweep.eps, sweep.momentum, sweep.correction, sweep.relu, to_go_back,
    )  # fmt: skip
    layout.finish(backend)
    return y, mean, invstd, mask


def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    residual: Any = None,
    activation: str | None = None,
    correction: float = 1,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Batch normalization, with the arguments of ``torch.nn.functional.batch_norm``.

    ``y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`` per channel; mean and
    biased variance are the batch's in training, the running ones otherwise.

    Parameters
    ----------
    x : array of float16, bfloat16, float32 or float64, 2 or more dimensions
        NumPy's, or one on the CPU or a CUDA device of any library that exposes DLPack. Any strides.
        The other arrays of the call are of the same library and on the same device, and so are the
        results. Of a subclass of ndarray, y is what its ``__array_wrap__`` makes of it, and what
        has shape (C,) is plain. JAX's arrays are never written.
    running_mean, running_var : ndarray, shape (C,), optional
        In x's dtype, or float32 beside 16-bit x, as weight and bias. In training, updated in
        place where given: ``running = (1 - momentum) * running + momentum * batch``. Required
        otherwise, and then only read.
    weight, bias : ndarray, shape (C,), optional
        Scale and shift; None means ones and zeros.
    training : bool
        Whether to normalize by the batch's own statistics.
    momentum : float
        The weight of the new batch in the running statistics.
    eps : float
        Added to the variance.
    axis : int
        Which dimension is the channel.
    residual : ndarray of x's shape and dtype, optional
        Added after scale and shift.
    activation : {None, "relu"}
        Applied last.
    correction : float
        The running variance is divided by ``count - correction``: 1 in PyTorch and TensorFlow,
        0 in ONNX, Keras and Flax.
    out : ndarray of x's shape and dtype, optional
        Where to put the result; may be x or residual itself.
    stream : int or object, optional
        For CUDA arrays, the stream to work on: a handle, or a stream of any library. None means
        the caller's current one, as x's library tells it.

    Returns
    -------
    ndarray
        y, of x's shape and dtype; ``out`` if it was given.

    Raises
    ------
    TypeError, ValueError
        If an argument's kind, dtype, shape or value is not as above, if there is one value per
        channel in training, or if out overlaps an input in part. Nothing has been written then.

    References
    ----------
    S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", 2015, Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> numbabn.batch_norm(x, training=True, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    """
    if training is not True and training is not False:
        checks.flag("training", training)
    if not training:
        return _inference(
            stream, x, running_mean, running_var, weight, bias, residual, out,
            momentum, eps, axis, activation, correction,
        )[0]  # fmt: skip
    return _forward(
        stream, x, weight, bias, running_mean, running_var, residual, out,
        momentum, eps, axis, activation, correction, False,
    )[0]  # fmt: skip


def batch_norm_forward(
    x: Any,
    weight: Any = None,
    bias: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str | None = None,
    correction: float = 1,
    out: Any = None,
    stream: Any = None,
) -> ForwardResult:
    """Run the forward pass of a training step, keeping what `batch_norm_backward` needs.

    Parameters, errors and the update of the running statistics are those of `batch_norm` with
    ``training=True``.

    Returns
    -------
    ForwardResult
        ``y``, ``mean``, ``invstd`` and, with an activation, its ``mask``.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, mean, invstd, mask = numbabn.batch_norm_forward(x, eps=0.0, activation="relu")
    >>> y.tolist(), mean.tolist(), invstd.tolist(), mask.tolist()
    ([[0.0, 0.0], [1.0, 1.0]], [2.0, 20.0], [1.0, 0.1], [12])
    """
    return _forward_result(
        _forward(
            stream, x, weight, bias, running_mean, running_var, residual, out,
            momentum, eps, axis, activation, correction, True,
        )
    )  # fmt: skip


def batch_norm_inference(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    residual: Any = None,
    activation: str | None = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """Normalize by running statistics, which are only read.

    Parameters and errors are those of `batch_norm` with ``training=False``.

    Returns
    -------
    ndarray
        y, of x's shape and dtype; ``out`` if it was given.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> numbabn.batch_norm_inference(x, np.array([1.0, 10.0]), np.array([4.0, 100.0]), eps=0.0)
    array([[0., 0.],
           [1., 2.]])
    """
    return _inference(
        stream, x, running_mean, running_var, weight, bias, residual, out,
        0.0, eps, axis, activation, 0,
    )[0]  # fmt: skip


@on_arrays(
    "x", "running_mean", "running_var", "weight", "bias", "residual", "out", written=("out",)
)
def _inference(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, residual: Any, out: Any,
    momentum: Any, eps: Any, axis: Any, activation: Any, correction: Any,
) -> tuple[Any]:  # fmt: skip
    """Give y."""
    sweep: _Sweep = check_inference(
        x, running_mean, running_var, weight, bias,
        momentum, eps, axis, residual, activation, correction, out,
    )  # fmt: skip
    if out is not None:
        inputs = {
            "x": x, "residual": residual, "running_mean": running_mean,
            "running_var": running_var, "weight": weight, "bias": bias,
        }  # fmt: skip
        checks.writable("out", out, inputs, in_place=("x", "residual"))

    backend = sweep.backend
    y = backend.empty_like(x) if out is None else out
    if sweep.values:
        layout = arrange(backend, sweep.axis, (x, residual), (y,))
        parameters = weight, bias, running_mean, running_var
        backend.normalize(layout, parameters, sweep.eps, sweep.relu)
        layout.finish(backend)
    return (y,)


@checks.remembered
def check_inference(
    x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any, momentum: Any,
    eps: Any, axis: Any, residual: Any, activation: Any, correction: Any, out: Any,
) -> _Sweep:  # fmt: skip
    """Check what inference is given."""
    backend, axis, C, count = _data(x, axis)
    for name, array in (("running_mean", running_mean), ("running_var", running_var)):
        if array is None:
            raise ValueError(f"{name}: expected an array of shape ({C},) in inference, got None")
    _check_parameters(
        x, C, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias
    )
    checks.real("momentum", momentum)
    checks.real("correction", correction)
    eps = checks.epsilon(eps)
    relu = checks.relu(activation)
    _check_like(x, residual=residual, out=out)
    return _Sweep(backend, axis, count, 0.0, eps, 0.0, relu)


def batch_norm_backward(
    dy: Any,
    x: Any,
    weight: Any,
    mean: Any,
    invstd: Any,
    *,
    axis: int = 1,
    training: bool = True,
    mask: Any = None,
    with_residual: bool = False,
    out: Any = None,
    stream: Any = None,
) -> Gradients:
    """Gradients of a loss by x, weight, bias and residual, from its gradient by y.

    Parameters
    ----------
    dy : ndarray
        The gradient by y, of x's shape and dtype.
    x : ndarray of float16, bfloat16, float32 or float64
        The forward pass's input.
    weight : ndarray, shape (C,), or None
        The scale; None means ones.
    mean, invstd : ndarray of float32 or float64, shape (C,)
        As `batch_norm_forward` gave them; in eval mode ``running_mean`` and
        ``1 / sqrt(running_var + eps)``.
    axis : int
        Which dimension is the channel.
    training : bool
        False for a layer in eval mode, whose mean and invstd are constants:
        ``dx = dy * weight * invstd``.
    mask : ndarray of uint8, optional
        The activation's, from `batch_norm_forward`.
    with_residual : bool
        Whether to return ``dresidual`` too.
    out : ndarray of x's shape and dtype, optional
        Where to put dx; may be dy or x itself.
    stream : int or object, optional
        As of `batch_norm`.

    Returns
    -------
    Gradients
        ``dx``, ``dweight``, ``dbias``, and ``dresidual`` or None.

    Raises
    ------
    TypeError, ValueError
        If an argument's kind, dtype, shape or value is not as above, or if out overlaps an input
        in part. Nothing has been written then.

    References
    ----------
    S. Ioffe and C. Szegedy, "Batch Normalization", 2015, section 3.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd, _ = numbabn.batch_norm_forward(x, eps=0.0)
    >>> dx, dweight, dbias, _ = numbabn.batch_norm_backward(y, x, None, mean, invstd)
    >>> bool(abs(dx).max() < 1e-15), dweight.round(6).tolist(), dbias.round(6).tolist()
    (True, [3.0], [0.0])
    """
    return _gradients(
        _backward(stream, x, dy, weight, mean, invstd, mask, out, axis, training, with_residual)
    )


@on_arrays("x", "dy", "weight", "mean", "invstd", "mask", "out", written=("out",))
def _backward(
    x: Any, dy: Any, weight: Any, mean: Any, invstd: Any, mask: Any, out: Any,
    axis: Any, training: Any, with_residual: Any,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    """Give dx, dweight, dbias and dresidual."""
    backend, axis, C = _check_backward(
        dy, x, weight, mean, invstd, axis, training, mask, with_residual, out
    )
    if out is not None:
        inputs = {"dy": dy, "x": x, "weight": weight, "mean": mean, "invstd": invstd, "mask": mask}
        checks.writable("out", out, inputs, in_place=("dy", "x"))

    dtype = checks.parameter_dtypes(x.dtype)[-1] if weight is None else weight.dtype
    dresidual = backend.empty_like(dy) if with_residual else None
    if x.size == 0:
        dx = backend.empty_like(x) if out is None else out
        dweight, dbias = (backend.upload(np.zeros(C, dtype), x) for _ in range(2))
        return dx, dweight, dbias, dresidual
    if with_residual and mask is None:
        # Before dx, which may be written over dy.
        backend.copy(dresidual, dy)
    dx = backend.empty_like(x) if out is None else out
    layout = arrange(
        backend, axis, (dy, x), (dx, None if mask is None else dresidual),
        mask=None if mask is None else backend.contiguous(mask),
    )  # fmt: skip
    dweight, dbias = backend.backward(layout, weight, mean, invstd, dtype, bool(training))
    layout.finish(backend)
    return dx, dweight, dbias, dresidual


@checks.remembered
def _check_backward(
    dy: Any, x: Any, weight: Any, mean: Any, invstd: Any, axis: Any, training: Any, mask: Any,
    with_residual: Any, out: Any,
) -> tuple[Any, int, int]:  # fmt: skip
    backend, axis, C, count = _data(x, axis)
    checks.flag("training", training)
    checks.flag("with_residual", with_residual)
    checks.like("dy", dy, x)
    _check_parameters(x, C, weight=weight)
    checks.per_channel("mean", mean, C, checks.WIDE)
    checks.per_channel("invstd", invstd, C, checks.WIDE)
    if training:
        checks.trainable(x, count)
    if mask is not None:
        checks.mask(mask, x)
    _check_like(x, out=out)
    return backend, axis, C


def batch_stats(x: Any, *, axis: int = 1, stream: Any = None) -> BatchStats:
    """Take count, mean and sum of squared deviations of each channel.

    Parameters
    ----------
    x : ndarray of float16, bfloat16, float32 or float64, 2 or more dimensions
        Any strides.
    axis : int
        Which dimension is the channel.
    stream : int or object, optional
        As of `batch_norm`.

    Returns
    -------
    BatchStats
        In float64; zeros for an empty batch. Of a CUDA array, on its device, else in NumPy arrays.

    Raises
    ------
    TypeError, ValueError
        If x is no such array or has no such axis.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> stats = numbabn.batch_stats(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> stats.count, stats.mean, stats.var
    (2, array([ 2., 20.]), array([  1., 100.]))
    """
    if type(x) is not np.ndarray and not is_on_device(x):
        (x,) = borrow(stream, x=x)  # since statistics of all arrays on the host are NumPy's
    return BatchStats(*_statistics(stream, x, axis))


@on_arrays("x")
def _statistics(x: Any, axis: Any) -> tuple[int, Any, Any]:
    """Give count, mean and M2."""
    backend, axis, C, count = _data(x, axis)
    if count == 0:
        return count, backend.upload(np.zeros(C), x), backend.upload(np.zeros(C), x)
    return count, *backend.statistics(arrange(backend, axis, (x,)))


def update_running_stats(
    running_mean: Any,
    running_var: Any,
    stats: BatchStats,
    momentum: float = 0.1,
    *,
    correction: float = 1,
) -> None:
    """Update running statistics in place by those of a batch.

    ``running = (1 - momentum) * running + momentum * batch``, the batch's variance being
    ``m2 / (count - correction)``. An empty batch changes nothing.

    Parameters
    ----------
    running_mean, running_var : array of float32 or float64, shape (C,)
        Updated in place; on a device by the library that they and the statistics are of.
    stats : BatchStats
        The batch's statistics.
    momentum : float
        The weight of the batch.
    correction : float
        1 for the unbiased variance, 0 for the biased one.

    Raises
    ------
    TypeError, ValueError
        If an argument's kind, dtype, shape or value is not as above. Nothing has been written
        then.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> mean, var = np.zeros(2), np.ones(2)
    >>> stats = numbabn.batch_stats(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> numbabn.update_running_stats(mean, var, stats, momentum=0.5)
    >>> mean.tolist(), var.tolist()
    ([1.0, 10.0], [1.5, 100.5])
    """
    if not isinstance(stats, BatchStats):
        raise TypeError(f"stats: expected BatchStats, got {type(stats).__qualname__}")
    mean, var = borrow(None, running_mean=running_mean, running_var=running_var)
    # Statistics that start empty know no number of channels yet.
    C = stats.mean.shape[0] or np.size(mean)
    for name, array in (("running_mean", mean), ("running_var", var)):
        checks.per_channel(name, array, C)
    momentum = checks.real("momentum", momentum)
    correction = checks.real("correction", correction)
    checks.denominator(stats.count, correction)
    checks.writable("running_mean", mean, {"running_var": var})
    checks.writable("running_var", var, {})
    if stats.count == 0:
        return
    if type(mean) is DeviceArray:
        borrow(None, running_mean=running_mean, stats=stats.mean)  # which says if it is elsewhere
        mean, var = running_mean, running_var
    else:
        checks.numpy_array("stats", stats.mean)
    with np.errstate(all="ignore"):
        _average(mean, stats.mean, momentum)
        _average(var, stats.m2 / (stats.count - correction), momentum)
    if mean is not running_mean:
        tell_autograd(running_mean, running_var)
