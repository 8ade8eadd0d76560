"""NumPy at its best: few sweeps, all in place, nothing of x's size allocated.

The sums of a training step run over contiguous rows, or as products with a vector of ones, which
BLAS spreads over threads; all else is one in-place sweep per arithmetic operation.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import EPS, MOMENTUM, Arrays
from ..cases import Case
from .worker import Unable


def load(threads: int) -> str:
    """Return the version; BLAS reads the number of threads from the environment."""
    return str(np.__version__)


def calls_of(case: Case, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the ways to do a case."""
    if arrays.x.dtype.itemsize == 2:
        raise Unable("NumPy has no arithmetic of 16 bits to speak of")
    calls = {"forward": _forward, "inference": _inference, "backward": _backward}
    if case.op not in calls:
        raise Unable(f"no {case.op}")
    return {"out=": calls[case.op](case, arrays)}


class _View:
    """Arrays as planes ``(N, C, S)`` or rows ``(M, C)``, and sums over all but the channel."""

    def __init__(self, case: Case, dtype: Any) -> None:
        N, C = case.shape[:2]
        self.planes = case.layout == "nchw"
        self._shape = (N, C, -1) if self.planes else (-1, C)
        self.count = int(np.prod(case.shape)) // C
        self._ones = np.ones(self.count, dtype)
        self._dtype = dtype

    def of(self, array: Any) -> Any:
        return array.reshape(self._shape)

    def spread(self, values: Any) -> Any:
        values = np.asarray(values, self._dtype)
        return values[:, np.newaxis] if self.planes else values

    def sum(self, a: Any) -> Any:
        if self.planes:
            return a.sum(axis=2).sum(axis=0, dtype=np.float64)
        return (self._ones @ a).astype(np.float64)

    def dot(self, a: Any, b: Any) -> Any:
        if self.planes:
            return np.einsum("ncs,ncs->nc", a, b).sum(axis=0, dtype=np.float64)
        return np.einsum("mc,mc->c", a, b).astype(np.float64)


def _forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    view = _View(case, arrays.x.dtype)
    x, y = view.of(arrays.x), view.of(arrays.out)
    weight, bias = arrays.weight, arrays.bias
    running_mean, running_var = arrays.running_mean, arrays.running_var
    m = view.count

    def call() -> Any:
        mean = view.sum(x) / m
        np.subtract(x, view.spread(mean), out=y)
        var = view.dot(y, y) / m
        invstd = 1 / np.sqrt(var + EPS)
        np.multiply(y, view.spread(weight * invstd), out=y)
        np.add(y, view.spread(bias), out=y)
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * var * (m / (m - 1))
        return y, mean, invstd

    return call


def _inference(case: Case, arrays: Arrays) -> Callable[[], Any]:
    view = _View(case, arrays.x.dtype)
    x, y = view.of(arrays.x), view.of(arrays.out)

    def call() -> Any:
        scale = arrays.weight / np.sqrt(arrays.running_var + EPS)
        np.multiply(x, view.spread(scale), out=y)
        np.add(y, view.spread(arrays.bias - arrays.running_mean * scale), out=y)
        return (y,)

    return call


def _backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    view = _View(case, arrays.x.dtype)
    x, dy, dx = view.of(arrays.x), view.of(arrays.other), view.of(arrays.out)
    weight, mean, invstd = arrays.weight, arrays.mean, arrays.invstd
    m = view.count

    def call() -> Any:
        dbias = view.sum(dy)
        np.subtract(x, view.spread(mean), out=dx)
        product = view.dot(dy, dx)
        # dx = weight * invstd * (dy - dbias / m - (x - mean) * invstd**2 * product / m)
        np.multiply(dx, view.spread(-(invstd**2) * product / m), out=dx)
        np.add(dx, dy, out=dx)
        np.subtract(dx, view.spread(dbias / m), out=dx)
        np.multiply(dx, view.spread(weight * invstd), out=dx)
        return dx, product * invstd, dbias

    return call
