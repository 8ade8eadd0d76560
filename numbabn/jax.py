"""Batch normalization inside JAX's own programs, on the CPU: jitted, differentiated, vmapped.

XLA calls numbabn's kernels on its own buffers, without a copy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from .extras import needed

with needed("jax", "JAX"):
    import jax
    import jax.numpy as jnp

from . import checks, functional, xla

Named = dict[str, Any]  # arrays by the names of numbabn's arguments and results, if they are there
RUNNING = ("running_mean", "running_var")
_TYPED = hasattr(jax.sharding, "ManualAxisType")  # whether types tell of meshes, as of JAX 0.10


class Normalized(NamedTuple):
    """What `batch_norm` gives.

    Attributes
    ----------
    y : jax.Array
        The result, of x's shape and dtype.
    running_mean, running_var : jax.Array, shape (C,), or None
        In training the new running statistics, otherwise those that were given.
    """

    y: Any
    running_mean: Any
    running_var: Any


class _Settings(NamedTuple):
    """What is the same in every call of a compiled program."""

    ndim: int  # of x, without the axes that vmap adds
    training: bool
    axis: int
    eps: float
    momentum: float
    correction: float
    activation: str | None
    with_residual: bool


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
) -> Normalized:
    """Batch normalization, as `numbabn.batch_norm`, for ``jax.jit``, ``jax.grad`` and ``jax.vmap``.

    JAX's arrays are never written: the new running statistics are results. Settings are static.

    Parameters
    ----------
    x : jax.Array of float16, bfloat16, float32 or float64, 2 or more dimensions
        On the CPU. NumPy arrays are taken as ``jnp.asarray`` does.
    running_mean, running_var : jax.Array, shape (C,), optional
        In x's dtype, or float32 beside 16-bit x, as weight and bias. Required unless training.
    weight, bias : jax.Array, shape (C,), optional
        Scale and shift; None means ones and zeros.
    training : bool
        Whether to normalize by the batch's own statistics.
    momentum, eps, axis, activation, correction
        As of `numbabn.batch_norm`: numbers, not arrays.
    residual : jax.Array of x's shape and dtype, optional
        Added after scale and shift.

    Returns
    -------
    Normalized
        ``y``, ``running_mean`` and ``running_var``. In training no gradient flows through the new
        running statistics, as through PyTorch's buffers.

    Raises
    ------
    TypeError, ValueError
        As `numbabn.batch_norm`, while the program is traced.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numbabn.jax
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> mean, var = jnp.zeros(2), jnp.ones(2)
    >>> y, mean, var = numbabn.jax.batch_norm(x, mean, var, training=True, momentum=0.5)
    >>> y.round(3).tolist(), mean.tolist(), var.tolist()
    ([[-1.0, -1.0], [1.0, 1.0]], [1.0, 10.0], [1.5, 100.5])
    >>> loss = lambda x: (numbabn.jax.batch_norm(x, training=True).y ** 3).sum()
    >>> bool(abs(jax.jit(jax.grad(loss))(x)).max() < 1e-3)
    True
    """
    checks.flag("training", training)
    given = {
        name: _array(name, array)
        for name, array in (
            ("x", x), ("running_mean", running_mean), ("running_var", running_var),
            ("weight", weight), ("bias", bias), ("residual", residual),
        )
        if array is not None or name == "x"
    }  # fmt: skip
    settings = _check(given, training, momentum, eps, axis, activation, correction)
    arrays = _alike(*map(_gather, given.values()))
    results = _normalize(settings, dict(zip(given, arrays, strict=True)))
    results = {name: _scatter(a, given.get(name, given["x"])) for name, a in results.items()}
    running = results if training else given
    return Normalized(results["y"], *map(running.get, RUNNING))


def _array(name: str, array: Any) -> jax.Array:
    if not isinstance(array, jax.Array | np.ndarray):
        raise TypeError(f"{name}: expected a JAX array, got {type(array).__qualname__}")
    return jnp.asarray(array)


def _gather(array: jax.Array) -> jax.Array:
    """Have the whole of an array whose type says that it is sharded."""
    sharding = jax.typeof(array).sharding
    if _TYPED and any(sharding.spec):
        whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        array = jax.reshard(array, whole)
    return array


def _scatter(array: jax.Array, like: jax.Array) -> jax.Array:
    """Shard an array as the type of another says."""
    sharding = jax.typeof(like).sharding
    return jax.reshard(array, sharding) if _TYPED and any(sharding.spec) else array


def _alike(*arrays: jax.Array) -> list[jax.Array]:
    """Let arrays differ between shards of a shard_map along each mesh axis along which one does."""
    if not _TYPED:
        return list(arrays)
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    union = frozenset[str]().union(*varying)
    return [
        jax.lax.pcast(array, tuple(union - own), to="varying")
        for array, own in zip(arrays, varying, strict=True)
    ]


def _check(
    given: Named, training: bool,
    momentum: Any, eps: Any, axis: Any, activation: Any, correction: Any,
) -> _Settings:  # fmt: skip
    """Check arguments as NumPy's are checked: by arrays of these forms that have no memory."""
    x, mean, var, weight, bias, residual = (
        np.broadcast_to(np.empty((), given[name].dtype), given[name].shape)
        if name in given
        else None
        for name in ("x", *RUNNING, "weight", "bias", "residual")
    )
    others = momentum, eps, axis, residual, activation, correction, None
    if training:
        sweep = functional.check_forward(x, weight, bias, mean, var, *others)
    else:
        sweep = functional.check_inference(x, mean, var, weight, bias, *others)
    return _Settings(
        given["x"].ndim, bool(training), sweep.axis, sweep.eps, sweep.momentum, sweep.correction,
        activation, residual is not None,
    )  # fmt: skip


def _like(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _outputs(settings: _Settings, given: Named) -> Named:
    """Describe y and, in training, the new running statistics."""
    names = [name for name in RUNNING if settings.training and name in given]
    return {"y": _like(given["x"]), **{name: _like(given[name]) for name in names}}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(settings: _Settings, given: Named) -> Named:
    return _call("forward", settings, given, _outputs(settings, given))


def _normalize_forward(settings: _Settings, given: Named) -> tuple[Named, Named]:
    x = given["x"]
    further = {}
    if settings.training:
        # Mean and invstd are float64, which JAX may lack: it keeps their bits.
        further["saved"] = jax.ShapeDtypeStruct((2, 2 * x.shape[settings.axis]), np.uint32)
        if settings.activation:
            further["mask"] = jax.ShapeDtypeStruct((-(-x.size // 8),), np.uint8)
    results = _call("forward", settings, given, {**_outputs(settings, given), **further})
    kept = {name: array for name, array in given.items() if name != "residual"}
    kept |= {name: results.pop(name) for name in further}
    if settings.activation and not settings.training:
        kept["y"] = results["y"]
    return results, kept


def _normalize_backward(settings: _Settings, kept: Named, cotangents: Named) -> tuple[Named]:
    x, weight = kept["x"], kept.get("weight")
    dy = cotangents["y"]
    if "y" in kept:
        dy = jnp.where(kept["y"] <= 0, jnp.zeros_like(dy), dy)
    # Of 16 bits a sum over the batch may be too large; bias may have float32 where weight has not.
    dtype = checks.parameter_dtypes(x.dtype)[-1]
    parameter = jax.ShapeDtypeStruct((x.shape[settings.axis],), dtype)
    outputs = {"dx": _like(x), "dweight": parameter, "dbias": parameter}
    if settings.with_residual and "mask" in kept:
        outputs["dresidual"] = _like(x)
    names = ("x", "weight", "saved", "mask") if settings.training else ("x", "weight", *RUNNING)
    given = {"dy": dy, **{name: kept[name] for name in names if name in kept}}
    if weight is not None:
        given["weight"] = weight.astype(dtype)
    gradients = _call("backward", settings, given, outputs)

    by = {"x": gradients["dx"]}
    if weight is not None:
        by["weight"] = gradients["dweight"].astype(weight.dtype)
    if "bias" in kept:
        by["bias"] = gradients["dbias"].astype(kept["bias"].dtype)
    if settings.with_residual:
        by["residual"] = gradients.get("dresidual", dy)
    if settings.training:
        by |= {name: None for name in RUNNING if name in kept}  # which means zeros
    else:
        mean, var = (kept[name] for name in RUNNING)
        invstd = jax.lax.rsqrt(var.astype(dtype) + settings.eps)
        scale = invstd if weight is None else invstd * weight
        by["running_mean"] = (-gradients["dbias"] * scale).astype(mean.dtype)
        by["running_var"] = (-gradients["dweight"] * scale * invstd / 2).astype(var.dtype)
    return (by,)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _call(operation: str, settings: _Settings, given: Named, outputs: Named) -> Named:
    """Call `_forward` or `_backward` from a program."""
    values = {"given": list(given), "outputs": list(outputs), **settings._asdict()}
    results = xla.call(f"numbabn_{operation}", tuple(outputs.values()), values, *given.values())
    return dict(zip(outputs, _alike(*results, *given.values()), strict=False))


def _target(operation: str, function: Callable[[Named, Named, Any], None]) -> None:
    """Let programs call a function of arrays to read, arrays to write, and settings."""

    def run(settings: Any, given: list[Any], outputs: list[Any]) -> None:
        added = outputs[0].ndim - settings["ndim"]
        mapped = outputs[0].shape[:added]
        # Along an axis that vmap has added, arrays that it does not map have size 1.
        given = [np.broadcast_to(array, mapped + array.shape[added:]) for array in given]
        for index in np.ndindex(mapped):
            function(
                {name: array[index] for name, array in zip(settings["given"], given, strict=True)},
                {name: a[index] for name, a in zip(settings["outputs"], outputs, strict=True)},
                settings,
            )

    xla.register(f"numbabn_{operation}", run)


@partial(_target, "forward")
def _forward(given: Named, outputs: Named, settings: Any) -> None:
    names = ("axis", "eps", "momentum", "activation", "correction")
    options = {name: settings[name] for name in names}
    running = {name: outputs[name] for name in RUNNING if name in outputs}
    for name, array in running.items():
        array[...] = given[name]
    given = {**given, **running}
    if "saved" not in outputs:
        functional.batch_norm(**given, training=settings["training"], out=outputs["y"], **options)
        return
    _, *saved, mask = functional.batch_norm_forward(**given, out=outputs["y"], **options)
    outputs["saved"].view(np.float64)[...] = saved
    if mask is not None:
        outputs["mask"][...] = mask


@partial(_target, "backward")
def _backward(given: Named, outputs: Named, settings: Any) -> None:
    if settings["training"]:
        mean, invstd = given["saved"].view(np.float64)
    else:
        mean, var = (given[name].astype(np.float64) for name in RUNNING)
        with np.errstate(all="ignore"):
            invstd = 1.0 / np.sqrt(var + settings["eps"])
    gradients = functional.batch_norm_backward(
        given["dy"], given["x"], given.get("weight"), mean, invstd,
        axis=settings["axis"], training=settings["training"], mask=given.get("mask"),
        with_residual="dresidual" in outputs, out=outputs["dx"],
    )  # fmt: skip
    for name in outputs.keys() - {"dx"}:
        outputs[name][...] = getattr(gradients, name)
