"""Batch normalization's statistics as a scikit-learn transformer."""

from copy import copy
from typing import Any

import numpy as np

from .extras import needed

with needed("sklearn", "scikit-learn"):
    from sklearn import config_context
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
    from sklearn.utils.validation import FLOAT_DTYPES, check_is_fitted, validate_data

from . import checks
from .functional import batch_norm_inference, batch_stats, update_running_stats
from .stats import BatchStats


class BatchNormScaler(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Scale columns, or channels of them, by ``(X - mean) / sqrt(var + eps)``.

    It is to batch normalization in eval mode what scikit-learn's ``StandardScaler`` is to columns,
    with statistics in float64 whatever X is, and over channels of columns if asked for.

    Parameters
    ----------
    eps : float
        Added to the variance. 0, the default, gives unit variance, and leaves constant channels
        unscaled; 1e-5 is what layers have.
    momentum : float or None
        None for the statistics of all batches that `partial_fit` has seen, as if in one. A number
        for running statistics, ``running = (1 - momentum) * running + momentum * batch``, which
        begin as the first batch's.
    correction : float
        The variance is divided by ``count - correction``: 0 for the biased one, 1 for the unbiased
        one, of which PyTorch's layers take their running average.
    channels : int or None
        None if each column is a channel. Otherwise rows are flattened arrays of so many channels,
        such as images, and each channel's columns have their statistics in common.
    axis : {1, -1}
        With channels: where they were before rows were flattened, 1 for ``(N, C, H, W)`` and -1 for
        ``(N, H, W, C)``.

    Attributes
    ----------
    mean_, var_ : ndarray of float64, shape (C,)
        Of each channel.
    scale_ : ndarray of float64, shape (C,)
        What deviations are divided by: ``sqrt(var_ + eps)``, and 1 where that is 0.
    n_samples_seen_ : int
        Rows that the statistics are of.
    n_features_in_ : int
        Columns.
    feature_names_in_ : ndarray of str
        Their names, if X had such.

    See Also
    --------
    numbabn.BatchNorm : The layer, with weight, bias and gradients.

    Notes
    -----
    Float64, float32 and float16 stay what they are; other numbers become float64. Sparse X is
    refused, since to center it would fill it. So are NaN and infinity, which no mean survives:
    impute what is missing before.

    Examples
    --------
    >>> import numpy as np
    >>> from numbabn.sklearn import BatchNormScaler
    >>> X = np.array([[1.0, 10.0], [3.0, 30.0], [5.0, 20.0]])
    >>> scaler = BatchNormScaler().partial_fit(X[:1]).partial_fit(X[1:])
    >>> scaler.mean_.tolist(), scaler.transform(X).round(3).tolist()
    ([3.0, 20.0], [[-1.225, -1.225], [0.0, 1.225], [1.225, 0.0]])
    >>> BatchNormScaler(channels=1).fit(X).mean_.tolist()
    [11.5]
    """

    mean_: Any
    var_: Any
    scale_: Any
    n_samples_seen_: int
    _stats: BatchStats  # of all batches

    def __init__(
        self,
        *,
        eps: float = 0.0,
        momentum: float | None = None,
        correction: float = 0,
        channels: int | None = None,
        axis: int = 1,
    ) -> None:
        self.eps = eps
        self.momentum = momentum
        self.correction = correction
        self.channels = channels
        self.axis = axis

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32", "float16"]
        return tags

    def fit(self, X: Any, y: Any = None) -> "BatchNormScaler":
        """Take the statistics of X, and forget all others.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            A memmap of floats is read from disk as it is summed.
        y : None
            Ignored.

        Returns
        -------
        BatchNormScaler
            Itself.

        Raises
        ------
        TypeError, ValueError
            If X or a parameter is not as above.
        """
        return self._take(X, first=True)

    def partial_fit(self, X: Any, y: Any = None) -> "BatchNormScaler":
        """Add the statistics of a batch to those of earlier ones.

        Parameters, results and errors are those of `fit`.
        """
        return self._take(X, first=not hasattr(self, "mean_"))

    def transform(self, X: Any) -> Any:
        """Scale X.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            It is never written.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            ``(X - mean_) / scale_``, in X's float dtype.
        """
        X, (high, low) = self._fitted(X)
        return self._apply(X, high, 1.0 / self.scale_, -low / self.scale_)

    def inverse_transform(self, X: Any) -> Any:
        """Undo `transform`.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            As `transform` gave it.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
            ``X * scale_ + mean_``, in X's float dtype.
        """
        X, (high, low) = self._fitted(X)
        return self._apply(X, -low / self.scale_, self.scale_, high)

    def _take(self, X: Any, first: bool) -> "BatchNormScaler":
        eps = checks.epsilon(self.eps)
        if self.momentum is not None:
            checks.real("momentum", self.momentum)
        correction = checks.real("correction", self.correction)
        fitted = copy(self)  # so that an error leaves this one as it was
        X = _validated(fitted, X, reset=first)
        batch = batch_stats(self._view(X, None if first else len(self.mean_)), axis=self.axis)
        stats = batch if first else self._stats + batch
        counted = stats if self.momentum is None else batch
        if counted.count - correction <= 0:
            rows = counted.count * len(stats.mean) // X.shape[1]
            raise ValueError(
                f"correction: expected less than the {counted.count} values per channel, "
                f"got {correction} with n_samples = {rows}"
            )
        if self.momentum is None or first:
            mean, var = stats.mean, stats.m2 / (stats.count - correction)
        else:
            mean, var = self.mean_.copy(), self.var_.copy()
            update_running_stats(mean, var, batch, self.momentum, correction=correction)
        scale = np.sqrt(var + eps)
        fitted._stats = stats
        fitted.mean_ = mean
        fitted.var_ = var
        fitted.scale_ = np.where(scale == 0, 1.0, scale)
        fitted.n_samples_seen_ = stats.count * len(mean) // X.shape[1]
        self.__dict__ = fitted.__dict__
        return self

    def _view(self, X: Any, channels: int | None) -> Any:
        """View X with an axis of channels, which is `axis`; of so many, if there are statistics."""
        if self.axis not in (1, -1):
            raise ValueError(f"axis: expected 1 or -1, got {self.axis!r}")
        rows, columns = X.shape
        if channels is not None and channels != (self.channels or columns):
            raise ValueError(
                f"channels: expected {channels}, of which there are statistics, got {self.channels}"
            )
        if self.channels is None:
            return X
        checks.positive_integer("channels", self.channels)
        if columns % self.channels:
            raise ValueError(
                f"channels: expected a divisor of the {columns} columns of X, got {self.channels}"
            )
        places = columns // self.channels
        return X.reshape(
            (rows, self.channels, places) if self.axis == 1 else (rows, places, self.channels)
        )

    def _fitted(self, X: Any) -> tuple[Any, tuple[Any, Any]]:
        """Check X, and split the mean into a number of the parameters' dtype and what it lacks."""
        check_is_fitted(self)
        X = _validated(self, X, reset=False)
        high = self.mean_.astype(checks.parameter_dtypes(X.dtype)[-1])
        return X, (high, self.mean_ - high)

    def _apply(self, X: Any, mean: Any, weight: Any, bias: Any) -> Any:
        """``(X - mean) * weight + bias``."""
        dtype = checks.parameter_dtypes(X.dtype)[-1]
        limits = np.finfo(np.float32)  # within which a weight is as exact as others
        if dtype == np.float32 and ((weight < limits.tiny) | (weight > limits.max)).any():
            return self._apply(X.astype(np.float64), mean, weight, bias).astype(X.dtype)
        mean, weight, bias = (array.astype(dtype) for array in (mean, weight, bias))
        view, ones = self._view(X, len(mean)), np.ones_like(mean)
        y = batch_norm_inference(view, mean, ones, weight, bias, eps=0.0, axis=self.axis)
        return y.reshape(X.shape)


def _validated(scaler: BatchNormScaler, X: Any, reset: bool) -> Any:
    """Give X as a NumPy array, whatever array namespaces others let scikit-learn compute in."""
    with config_context(array_api_dispatch=False):
        return validate_data(scaler, X, dtype=FLOAT_DTYPES, reset=reset)
