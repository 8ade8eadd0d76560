"""Count, mean and sum of squared deviations per channel, and how samples of them join."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .libraries import is_on_device, library_of, namespace

PerChannel = Any  # an array of float64 of any library, shape (C,)


def _none() -> PerChannel:
    return np.zeros(0)


@dataclass(frozen=True, eq=False)
class BatchStats:
    """Statistics of each channel over a batch, or over several batches merged.

    Parameters
    ----------
    count : int
        Values per channel. 0, the default, is an empty sample, which merges with any other.
    mean : ndarray of float64, shape (C,)
        Their mean.
    m2 : ndarray of float64, shape (C,)
        The sum of their squared deviations from it.

    Notes
    -----
    Statistics of a CUDA array are arrays of its library on its device and stay there: what is made
    of them is too. For Numba's, which have no arithmetic, anything beyond ``count``, ``mean`` and
    ``m2`` is a ``TypeError``.

    Examples
    --------
    >>> import numpy as np
    >>> from numbabn import BatchStats, batch_stats
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 20.0]])
    >>> total = BatchStats()
    >>> for batch in (x[:1], x[1:]):
    ...     total += batch_stats(batch)
    >>> total.count, total.mean, total.var
    (3, array([ 4., 20.]), array([ 8.66666667, 66.66666667]))
    """

    count: int = 0
    mean: PerChannel = field(default_factory=_none)
    m2: PerChannel = field(default_factory=_none)

    def __post_init__(self) -> None:
        for name in ("mean", "m2"):
            array = getattr(self, name)
            # To look at its numbers there would copy them to the host.
            if not is_on_device(array):
                object.__setattr__(self, name, np.asarray(array, np.float64))
        if len(self.mean.shape) != 1 or self.mean.shape != self.m2.shape:
            raise ValueError(
                f"mean, m2: expected one shape (C,), got {self.mean.shape} and {self.m2.shape}"
            )

    @classmethod
    def empty(cls, num_features: int) -> BatchStats:
        """Statistics of no values in each of ``num_features`` channels: zeros."""
        return cls(0, np.zeros(num_features), np.zeros(num_features))

    def _variance(self, correction: int) -> PerChannel:
        xp = namespace("m2", self.m2)
        if self.count <= correction:
            return xp.full_like(self.m2, np.nan)
        return self.m2 / (self.count - correction)

    @property
    def var(self) -> PerChannel:
        """The biased variance, ``m2 / count``; NaN where nothing was counted."""
        return self._variance(0)

    @property
    def unbiased_var(self) -> PerChannel:
        """The unbiased variance, ``m2 / (count - 1)``; NaN below two values."""
        return self._variance(1)

    def invstd(self, eps: float = 1e-5) -> PerChannel:
        """``1 / sqrt(var + eps)``."""
        with np.errstate(all="ignore"):
            return 1.0 / namespace("m2", self.m2).sqrt(self.var + eps)

    def merge(self, other: BatchStats) -> BatchStats:
        """Return the statistics of both samples taken together; neither is changed.

        Chan, Golub & LeVeque, "Algorithms for computing the sample variance" (1983), eq. 2.1.

        Raises
        ------
        TypeError, ValueError
            If both count something, in different numbers of channels or arrays of two libraries.
        """
        if not isinstance(other, BatchStats):
            raise TypeError(f"other: expected BatchStats, got {type(other).__qualname__}")
        channels, others = self.mean.shape[0], other.mean.shape[0]
        if self.count == 0 and channels in (0, others):
            return other
        if other.count == 0 and others in (0, channels):
            return self
        if channels != others:
            raise ValueError(f"other: expected {channels} channels, got {others}")
        if library_of(self.mean) != library_of(other.mean):
            raise TypeError(
                f"other: expected statistics in {type(self.mean).__qualname__}, "
                f"got {type(other.mean).__qualname__}"
            )
        xp = namespace("mean", self.mean)
        count = self.count + other.count
        part = other.count / count
        with np.errstate(all="ignore"):
            delta = other.mean - self.mean
            # Beside an infinite mean, or where it overflows, the difference says nothing.
            mean = xp.where(
                xp.isfinite(delta),
                self.mean + delta * part,
                self.mean * (self.count / count) + other.mean * part,
            )
            m2 = self.m2 + other.m2 + delta * delta * (self.count * part)
            return BatchStats(count, mean, m2)

    def __add__(self, other: BatchStats) -> BatchStats:
        if not isinstance(other, BatchStats):
            return NotImplemented
        return self.merge(other)
