"""Hold a case's result against the float64 oracle before it is timed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ... import reference
from .arrays import EPS, MOMENTUM, Arrays
from .cases import Case

# Of the largest value: some sixteen roundings of float32 and fifty of float64, and two of the
# 16-bit types, whose results are rounded once.
TOLERANCES = {"float32": 2e-6, "float64": 1e-14, "float16": 2e-3, "bfloat16": 1.6e-2}
ELEMENTS = 1 << 26  # checked at most: a few seconds
BLOCK = 1 << 20  # checked at a time: the oracle keeps some ten float64 arrays of this size


@dataclass(frozen=True)
class Check:
    """What came of it.

    Attributes
    ----------
    channels : int
        How many were compared; each over the whole batch.
    errors : dict
        For each result the largest error, as a fraction of the largest expected value.
    problem : str or None
        Why the case is not timed.
    """

    channels: int
    errors: dict[str, float]
    problem: str | None


def check(case: Case, arrays: Arrays, call: Callable[[], Any]) -> Check:
    """Call once and compare every result, on all channels or as many as `ELEMENTS` allows."""
    before = arrays.running_mean.copy(), arrays.running_var.copy()
    arrays.out.fill(np.nan)  # an element left unwritten shows
    try:
        result = call()
    except (TypeError, ValueError) as error:
        return Check(0, {}, f"refused: {error}")
    count = arrays.x.size // case.channels
    channels = _spread(case.channels, max(1, ELEMENTS // count))
    actual = _actual(case, arrays, result)
    worst: dict[str, Any] = {}
    largest: dict[str, Any] = {}
    for block in np.array_split(channels, -(-len(channels) * count // BLOCK)):
        for name, exact in expected(case, arrays, before, block):
            ours = np.take(actual[name], block, case.axis if actual[name].ndim > 1 else 0)
            # Unlike max(), np.maximum lets NaN through.
            off = np.abs(ours.astype(np.float64) - exact).max()
            worst[name] = np.maximum(worst.get(name, 0.0), off)
            largest[name] = np.maximum(largest.get(name, 0.0), np.abs(exact).max())
    errors = {name: float(worst[name] / largest[name]) for name in worst}
    wrong = [name for name, error in errors.items() if not error <= TOLERANCES[case.dtype]]
    problem = None
    if wrong:
        problem = "wrong: " + ", ".join(f"{name} is off by {errors[name]:.1g}" for name in wrong)
    elif not np.isfinite(arrays.out).all():
        problem = "wrong: not all of the result is written"
    elif case.op == "add_relu" and (result.mask != _bits(arrays.out)).any():
        problem = "wrong: the mask is not that of the result"
    finite = {name: error for name, error in errors.items() if np.isfinite(error)}
    return Check(len(channels), finite, problem)


def _spread(channels: int, most: int) -> Any:
    """Choose `most` channels at most, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, channels - 1, min(most, channels)).round().astype(int))


def _bits(y: Any) -> Any:
    return np.packbits(y.reshape(-1) > 0, bitorder="little")


def _actual(case: Case, arrays: Arrays, result: Any) -> dict[str, Any]:
    if case.op == "inference":
        return {"y": result}
    if case.op == "backward":
        return {"dx": result.dx, "dweight": result.dweight, "dbias": result.dbias}
    return {
        "y": result.y,
        "mean": result.mean,
        "invstd": result.invstd,
        "running_mean": arrays.running_mean,
        "running_var": arrays.running_var,
    }


def expected(
    case: Case, arrays: Arrays, before: tuple[Any, Any], channels: Any
) -> Iterator[tuple[str, Any]]:
    """Give the oracle's results on a block of channels, by name."""
    x = np.take(arrays.x, channels, case.axis)
    other: Any = None if arrays.other is None else np.take(arrays.other, channels, case.axis)
    weight, bias = arrays.weight[channels], arrays.bias[channels]
    running_mean, running_var = (running[channels] for running in before)
    axis = case.axis
    if case.op == "inference":
        yield (
            "y",
            reference.inference(x, running_mean, running_var, weight, bias, eps=EPS, axis=axis),
        )
    elif case.op == "backward":
        mean, invstd = arrays.mean[channels], arrays.invstd[channels]
        gradients = reference.backward(other, x, weight, mean, invstd, axis=axis)
        yield from zip(("dx", "dweight", "dbias"), gradients[:3], strict=True)
    else:
        activation = None if other is None else "relu"
        y, mean, invstd = reference.forward(
            x, weight, bias, eps=EPS, axis=axis, residual=other, activation=activation
        )
        yield from zip(("y", "mean", "invstd"), (y, mean, invstd), strict=True)
        count = x.size // len(channels)
        m2 = (invstd**-2 - EPS) * count
        running = reference.running_update(running_mean, running_var, count, mean, m2, MOMENTUM)
        yield from zip(("running_mean", "running_var"), running, strict=True)
