"""JAX: jitted formulas, each result written into the last one's memory, which is donated."""

import importlib
import os
from collections.abc import Callable
from typing import Any

from ..arrays import EPS, MOMENTUM, Arrays
from ..cases import Case
from .worker import Unable

jax: Any = None  # loaded in the peer's own process alone


def load(threads: int) -> str:
    """Import it, return its version; XLA reads the number of threads from the environment."""
    global jax
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return str(jax.__version__)


def calls_of(case: Case, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the ways to do a case."""
    formulas = {"forward": _forward, "inference": _inference, "backward": _backward}
    if case.op not in formulas:
        raise Unable(f"no {case.op}")
    formula, given = formulas[case.op](case, arrays)
    # A donated argument's memory is reused for a result of its shape, though it is never read.
    compiled = jax.jit(lambda out, *given: formula(*given), donate_argnums=0, keep_unused=True)
    given = [jax.device_put(array) for array in given]
    results = [jax.device_put(arrays.out)]

    def call() -> Any:
        results[:] = jax.block_until_ready(compiled(results[0], *given))
        return results

    return {"donated": call}


def _total(case: Case) -> Callable[[Any], Any]:
    """Sum over all but the channel, in the parameters' dtype."""
    axis = case.axis % len(case.shape)
    axes = tuple(i for i in range(len(case.shape)) if i != axis)
    dtype = jax.numpy.float64 if case.dtype == "float64" else jax.numpy.float32
    return lambda a: jax.numpy.sum(a, axes, dtype=dtype)


def _forward(case: Case, arrays: Arrays) -> Any:
    total, spread = _total(case), case.per_channel
    m = arrays.x.size // case.channels

    def formula(x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any) -> Any:
        mean = total(x) / m
        var = total(jax.numpy.square(x - spread(mean))) / m
        invstd = jax.lax.rsqrt(var + EPS)
        y = (x - spread(mean)) * spread(invstd * weight) + spread(bias)
        running_mean = (1 - MOMENTUM) * running_mean + MOMENTUM * mean
        running_var = (1 - MOMENTUM) * running_var + MOMENTUM * var * (m / (m - 1))
        return y.astype(x.dtype), mean, invstd, running_mean, running_var

    return formula, (
        arrays.x, arrays.weight, arrays.bias, arrays.running_mean, arrays.running_var
    )  # fmt: skip


def _inference(case: Case, arrays: Arrays) -> Any:
    spread = case.per_channel

    def formula(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> Any:
        scale = weight * jax.lax.rsqrt(var + EPS)
        return (((x - spread(mean)) * spread(scale) + spread(bias)).astype(x.dtype),)

    return formula, (
        arrays.x, arrays.running_mean, arrays.running_var, arrays.weight, arrays.bias
    )  # fmt: skip


def _backward(case: Case, arrays: Arrays) -> Any:
    total, spread = _total(case), case.per_channel
    m = arrays.x.size // case.channels

    def formula(dy: Any, x: Any, weight: Any, mean: Any, invstd: Any) -> Any:
        deviation = x - spread(mean)
        dbias, product = total(dy), total(dy * deviation)
        slope = spread(invstd**2 * product / m)
        dx = (dy - spread(dbias / m) - deviation * slope) * spread(weight * invstd)
        return dx.astype(x.dtype), product * invstd, dbias

    wide = arrays.weight.dtype
    return formula, (
        arrays.other, arrays.x, arrays.weight,
        arrays.mean.astype(wide), arrays.invstd.astype(wide),
    )  # fmt: skip
