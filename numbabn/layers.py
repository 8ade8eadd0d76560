"""Batch normalization as a layer: parameters, running statistics, and what backward needs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import checks, host
from .backends import backend_of, borrow, duplicate, to_numpy
from .functional import batch_norm_backward, batch_norm_forward, batch_norm_inference
from .libraries import DeviceArray, is_on_device, namespace


class _Pass(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    x: Any
    mean: Any
    spread: Any  # invstd in training, else the variance
    training: bool


class BatchNorm:
    """Batch normalization over every axis but the channel's, as ``torch.nn.BatchNorm1d/2d/3d``.

    Parameters
    ----------
    num_features : int
        Channels, C.
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of a new batch in the running statistics,
        ``running = (1 - momentum) * running + momentum * batch``; None for their cumulative
        average, in which all batches weigh alike.
    affine : bool
        Whether there are a weight and a bias.
    track_running_stats : bool
        Whether there are running statistics; without them the batch's own serve in eval mode too.
    axis : int
        Which dimension of x is the channel.
    dtype : dtype
        Of parameters and running statistics. A float32 layer takes float16 and bfloat16 too.
    correction : float
        The running variance is divided by ``count - correction``: 1 in PyTorch and TensorFlow,
        0 in ONNX, Keras and Flax.

    Attributes
    ----------
    weight, bias : ndarray, shape (C,), or None
        Scale and shift, ones and zeros at first.
    running_mean, running_var : ndarray, shape (C,), or None
        Zeros and ones at first. The variance is the unbiased one, unless ``correction`` is given.
    num_batches_tracked : int
        Batches seen in training mode, without the empty ones.
    grad_weight, grad_bias : ndarray, shape (C,), or None
        Set by `backward`.
    training : bool
        True at first; see `train` and `eval`.

    Raises
    ------
    TypeError, ValueError
        If an argument's kind or value is not as above.

    Notes
    -----
    Weight, bias and running statistics are NumPy arrays until the first CUDA array comes: then
    copies of them in its library, on its device, take their place, and the layer takes no NumPy
    arrays any more. On the CPU they stay NumPy's, whatever library x is of. `state_dict` gives
    NumPy arrays from anywhere, for another layer to load. JAX's arrays are never written, so that
    on a device a layer cannot track running statistics with them; Numba's have no arithmetic, so
    that with them there is no `backward` in eval mode.

    A copy, pickled or not, has all of that, but not the last batch, which `backward` is of.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> layer = numbabn.BatchNorm(2, dtype=np.float64)
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> layer(x).round(3).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> layer.backward(np.array([[1.0, 0.0], [0.0, 0.0]])).shape, layer.grad_bias.tolist()
    ((2, 2), [1.0, 0.0])
    >>> layer.running_mean.round(3).tolist()
    [0.2, 2.0]
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = 1,
        dtype: Any = np.float32,
        correction: float = 1,
    ) -> None:
        checks.positive_integer("num_features", num_features)
        checks.integer("axis", axis)
        if momentum is not None:
            checks.real("momentum", momentum)
        checks.flag("affine", affine)
        checks.flag("track_running_stats", track_running_stats)
        checks.real("correction", correction)
        if dtype is None:  # which NumPy takes for float64
            raise TypeError("dtype: expected a float dtype, got None")
        dtype = np.dtype(dtype)
        checks.dtype_in("dtype", np.empty(0, dtype), checks.FLOATS)
        self.num_features = num_features
        self.eps = checks.epsilon(eps)
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.axis = axis
        self.dtype = dtype
        self.correction = correction
        self.training = True
        self.num_batches_tracked = 0
        self.weight = np.ones(num_features, dtype) if affine else None
        self.bias = np.zeros(num_features, dtype) if affine else None
        self.running_mean = np.zeros(num_features, dtype) if track_running_stats else None
        self.running_var = np.ones(num_features, dtype) if track_running_stats else None
        self.grad_weight: Any = None
        self.grad_bias: Any = None
        self._pass: _Pass | None = None

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, "
            f"axis={self.axis}, dtype={self.dtype}, correction={self.correction})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last batch."""
        return vars(self) | {"_pass": None}

    def __call__(self, x: Any) -> Any:
        """Call `forward`."""
        return self.forward(x)

    def train(self, mode: bool = True) -> "BatchNorm":
        """Switch to the batch's statistics, or, with ``mode=False``, to the running ones."""
        checks.flag("mode", mode)
        self.training = bool(mode)
        return self

    def eval(self) -> "BatchNorm":
        """Switch to the running statistics."""
        return self.train(False)

    def forward(self, x: Any) -> Any:
        """Normalize x; in training mode also update the running statistics.

        Parameters
        ----------
        x : array
            Of the layer's dtype, or of 16 bits for a float32 layer. It is kept, not copied, for
            `backward`.

        Returns
        -------
        ndarray
            y, of x's shape and dtype.

        Raises
        ------
        TypeError, ValueError
            As `numbabn.batch_norm`; the layer is then as it was.
        """
        seen = given = x
        if type(x) is not np.ndarray:
            (seen,) = borrow(None, x=x)
            given = x if type(seen) is DeviceArray else seen
        backend_of("x", seen)
        checks.features(seen, self.axis, self.num_features, self.dtype)
        state = self._beside(seen)
        names = ("weight", "bias", "running_mean", "running_var")
        weight, bias, running_mean, running_var = map(state.get, names)
        if not self.training and running_mean is not None and running_var is not None:
            y = batch_norm_inference(
                given, running_mean, running_var, weight, bias, eps=self.eps, axis=self.axis
            )
            # As they are now, whatever they will be by then.
            mean, spread = duplicate(running_mean), duplicate(running_var)
            self._pass = _Pass(x, mean, spread, training=False)
        else:
            tracked = self.training and self.track_running_stats
            batches = self.num_batches_tracked + 1
            y, mean, invstd, _ = batch_norm_forward(
                given,
                weight,
                bias,
                running_mean if tracked else None,
                running_var if tracked else None,
                momentum=1.0 / batches if self.momentum is None else self.momentum,
                eps=self.eps,
                axis=self.axis,
                correction=self.correction,
            )
            if tracked and seen.size:  # an empty batch has no share in the average either
                self.num_batches_tracked = batches
            self._pass = _Pass(x, mean, invstd, training=True)
        for name, array in state.items():
            setattr(self, name, array)
        return y if given is x else host.give(x, y)

    def backward(self, dy: Any) -> Any:
        """Gradient by the last forward pass's x; sets ``grad_weight`` and ``grad_bias``.

        Parameters
        ----------
        dy : ndarray
            The gradient by y, of x's shape and dtype.

        Returns
        -------
        ndarray
            dx, of x's shape and dtype.

        Raises
        ------
        RuntimeError
            If there was no forward pass.
        TypeError, ValueError
            As `numbabn.batch_norm_backward`; the layer is then as it was.
        """
        if self._pass is None:
            raise RuntimeError("backward: expected a forward pass before it, got none")
        x, mean, invstd, training = self._pass
        given = x
        if type(x) is not np.ndarray:
            seen, dy_seen = borrow(None, x=x, dy=dy)
            if type(seen) is not DeviceArray:
                given, dy = seen, dy_seen
        if not training:
            mean, invstd = self._constants(mean, invstd)
        gradients = batch_norm_backward(
            dy, given, self.weight, mean, invstd, axis=self.axis, training=training
        )
        if self.affine:
            self.grad_weight, self.grad_bias = gradients.dweight, gradients.dbias
        return gradients.dx if given is x else host.give(x, gradients.dx)

    def _constants(self, mean: Any, var: Any) -> tuple[Any, Any]:
        """Give mean and invstd of an eval pass in float64."""
        xp = namespace("running_var", var)
        with np.errstate(all="ignore"):
            ones = xp.ones_like(var, dtype=xp.float64)
            return ones * mean, 1.0 / xp.sqrt(ones * var + self.eps)

    def _beside(self, x: Any) -> dict[str, Any]:
        """Give parameters and running statistics where x is, or copies there; keep them as is."""
        state = self._state()
        for name, array in state.items():
            if type(x) is DeviceArray and isinstance(array, np.ndarray):
                backend = backend_of("x", x)
                (state[name],) = backend.give(backend.upload(array, x))
            elif type(x) is not DeviceArray and is_on_device(array):
                kind = type(array).__qualname__
                raise TypeError(
                    f"x: expected a CUDA array, since the layer's {name} is a {kind}, got one "
                    "on the host; another layer takes those after load_state_dict(state_dict())"
                )
        return state

    def _state(self) -> dict[str, Any]:
        arrays = {
            "weight": self.weight,
            "bias": self.bias,
            "running_mean": self.running_mean,
            "running_var": self.running_var,
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def state_dict(self) -> dict[str, Any]:
        """Copy parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict of str to ndarray
            "weight", "bias", "running_mean", "running_var" and "num_batches_tracked" (an int64
            array without dimensions), as far as the layer has them. From a device they are copied
            to the host, which waits for it.

        Examples
        --------
        >>> import numpy as np, numbabn
        >>> np.savez("layer.npz", **numbabn.BatchNorm(2).state_dict())  # doctest: +SKIP
        >>> numbabn.BatchNorm(2).load_state_dict(np.load("layer.npz"))  # doctest: +SKIP
        """
        state = {name: to_numpy(array, name) for name, array in self._state().items()}
        if self.track_running_stats:
            state["num_batches_tracked"] = np.array(self.num_batches_tracked, np.int64)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy parameters and running statistics from a mapping such as `state_dict` returns.

        Parameters
        ----------
        state : mapping of str to array
            Arrays of any library, of shape (C,), or what NumPy makes arrays of; their values are
            cast to the layer's dtype. "num_batches_tracked" may be missing, as from old PyTorch
            versions.

        Raises
        ------
        TypeError, ValueError
            If a name is missing or unknown, or an array's dtype or shape is not as above. Nothing
            has been written then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__qualname__}")
        own = self._state()
        tracked = {"num_batches_tracked"} if self.track_running_stats else set()
        names = set(state.keys())
        if not own.keys() <= names <= own.keys() | tracked:
            raise ValueError(f"state: expected {sorted(own.keys() | tracked)}, got {sorted(names)}")
        arrays = {name: to_numpy(state[name], name) for name in own}
        for name, array in arrays.items():
            checks.per_channel(name, array, self.num_features)
        places = {name: next(iter(borrow(None, **{name: array}))) for name, array in own.items()}
        for name, place in places.items():
            checks.writable(name, place, {})
        with np.errstate(all="ignore"):
            arrays = {name: array.astype(self.dtype) for name, array in arrays.items()}
        if "num_batches_tracked" in names:
            seen = to_numpy(state["num_batches_tracked"], "num_batches_tracked")
            checks.count("num_batches_tracked", seen)
            self.num_batches_tracked = int(seen)
        for name, place in places.items():
            backend = backend_of(name, place)
            backend.copy(place, backend.upload(arrays[name], place))
