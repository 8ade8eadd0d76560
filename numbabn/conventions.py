"""Weights and settings of other libraries' batch norm, and the way back: one table says it all."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from . import checks
from .backends import to_numpy


class Convention(NamedTuple):
    """How a library keeps batch norm.

    ``names`` are its names for ours, those of PyTorch, in its own order; a slash stands for a
    mapping within a mapping. ``momentum``, ``eps`` and ``axis`` are its defaults, ``momentum`` in
    its own sense: ``momentum_of`` says which share it is in ``running``, that of the new batch or
    of the old value. ``epsilon`` is its name for eps. The running variance is divided by
    ``count - correction``.
    """

    names: Mapping[str, str]
    momentum: float
    momentum_of: str
    epsilon: str
    eps: float
    correction: int
    axis: int


_KERAS = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
_ONNX = {"weight": "scale", "bias": "B", "running_mean": "input_mean", "running_var": "input_var"}
_FLAX = {
    "weight": "params/scale",
    "bias": "params/bias",
    "running_mean": "batch_stats/mean",
    "running_var": "batch_stats/var",
}
_PYTORCH = {name: name for name in (*_KERAS, "num_batches_tracked")}

# "keras" is Keras 3 on any backend. "tensorflow" is tf.keras of TensorFlow 2 up to 2.15 on images
# and volumes, where the fused kernel leaves an unbiased variance; on other ranks it did as Keras 3.
CONVENTIONS: Mapping[str, Convention] = {
    "pytorch": Convention(_PYTORCH, 0.1, "new", "eps", 1e-5, correction=1, axis=1),
    "keras": Convention(_KERAS, 0.99, "old", "epsilon", 1e-3, correction=0, axis=-1),
    "tensorflow": Convention(_KERAS, 0.99, "old", "epsilon", 1e-3, correction=1, axis=-1),
    "flax": Convention(_FLAX, 0.99, "old", "epsilon", 1e-5, correction=0, axis=-1),
    "onnx": Convention(_ONNX, 0.9, "old", "epsilon", 1e-5, correction=0, axis=1),
}


def state_dict_from(library: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Give one layer's weights under the names of `BatchNorm.state_dict`.

    Parameters
    ----------
    library : {"pytorch", "keras", "tensorflow", "flax", "onnx"}
        Whose names they have.
    weights : mapping of str to array
        The layer's arrays, of shape (C,), or mappings of such arrays, as Flax has them. What
        counts of a name is its end, behind any slash or dot and in front of any colon, so that
        "bn1.weight" and "batch_normalization/gamma:0" will do; what is in front has to be the
        same in all.

    Returns
    -------
    dict of str to ndarray
        Copies, for `BatchNorm.load_state_dict`. Where the library leaves out one of scale and
        shift, it is ones or zeros; where it leaves out both, so does the result, for a layer with
        ``affine=False``. Likewise without running statistics.

    Raises
    ------
    TypeError, ValueError
        If the library or a name is unknown, a name comes twice, names are of several layers, one
        running statistic is missing, or an array's dtype or shape is not as above.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> from numbabn import conventions
    >>> layer = numbabn.BatchNorm(2, **conventions.settings_from("flax", {"momentum": 0.9}))
    >>> params = {"scale": np.array([1.0, 2.0]), "bias": np.array([3.0, 4.0])}
    >>> batch_stats = {"mean": np.array([5.0, 6.0]), "var": np.array([7.0, 8.0])}
    >>> variables = {"params": params, "batch_stats": batch_stats}
    >>> layer.load_state_dict(conventions.state_dict_from("flax", variables))
    >>> layer.weight.tolist(), layer.running_var.tolist()
    ([1.0, 2.0], [7.0, 8.0])
    """
    convention = _convention(library)
    named = _by_our_names("weights", weights, convention)
    state = {name: to_numpy(array, path) for name, (path, array) in named.items()}
    if ("running_mean" in state) != ("running_var" in state):
        raise ValueError(f"weights: expected both running statistics or none, got {list(weights)}")
    arrays = {name: array for name, array in state.items() if name != "num_batches_tracked"}
    for name, array in arrays.items():
        checks.per_channel(convention.names[name], array, next(iter(arrays.values())).size)
    if "weight" not in state and "bias" in state:
        state["weight"] = np.ones_like(state["bias"])
    if "bias" not in state and "weight" in state:
        state["bias"] = np.zeros_like(state["weight"])
    return {name: state[name] for name in _PYTORCH if name in state}


def state_dict_to(library: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """Give one layer's weights under a library's names: the way back of `state_dict_from`.

    Parameters
    ----------
    library : {"pytorch", "keras", "tensorflow", "flax", "onnx"}
        Whose names to give.
    state : mapping of str to array
        As `BatchNorm.state_dict` gives it, or one from PyTorch, "bn1.weight" and all.

    Returns
    -------
    dict of str to ndarray
        The same arrays in the library's order (that of Keras' ``set_weights``); for Flax within
        "params" and "batch_stats". Only PyTorch counts batches.

    Raises
    ------
    TypeError, ValueError
        If the library or a name is unknown, a name comes twice, or names are of several layers.

    Examples
    --------
    >>> import numbabn
    >>> from numbabn import conventions
    >>> list(conventions.state_dict_to("keras", numbabn.BatchNorm(2).state_dict()))
    ['gamma', 'beta', 'moving_mean', 'moving_variance']
    """
    convention = _convention(library)
    arrays = _by_our_names("state", state, CONVENTIONS["pytorch"])
    weights: dict[str, Any] = {}
    for own, path in convention.names.items():
        if own in arrays:
            group, _, name = path.rpartition("/")
            (weights.setdefault(group, {}) if group else weights)[name] = arrays[own][1]
    return weights


def settings_from(library: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Give a library's settings as arguments of `BatchNorm`.

    Parameters
    ----------
    library : {"pytorch", "keras", "tensorflow", "flax", "onnx"}
        Whose settings they are.
    settings : mapping, optional
        Its "momentum" and "eps" or "epsilon", as it names and means them; its own defaults where
        they are missing.

    Returns
    -------
    dict
        "eps", "momentum" (the share of the new batch), "correction" and "axis", the last by the
        library's default.

    Raises
    ------
    TypeError, ValueError
        If the library or a name is unknown, or a value is no finite real number.

    Examples
    --------
    >>> from numbabn import conventions
    >>> conventions.settings_from("keras", {"momentum": 0.9})
    {'eps': 0.001, 'momentum': 0.1, 'correction': 0, 'axis': -1}
    """
    convention = _convention(library)
    given = {} if settings is None else settings
    _known("settings", given, ("momentum", convention.epsilon))
    return {
        "eps": checks.epsilon(given.get(convention.epsilon, convention.eps)),
        "momentum": _share(convention, given.get("momentum", convention.momentum)),
        "correction": convention.correction,
        "axis": convention.axis,
    }


def settings_to(library: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give ``momentum`` and ``eps`` of a layer as a library names and means them.

    Parameters
    ----------
    library : {"pytorch", "keras", "tensorflow", "flax", "onnx"}
        Whose settings to give.
    settings : mapping
        "momentum" and "eps" of a `BatchNorm`, both or one. The rest is not for a library to be
        told: the correction is its own, and the axis is that of the data there.

    Returns
    -------
    dict
        What was given.

    Raises
    ------
    TypeError, ValueError
        If the library or a name is unknown, or a value is no finite real number. A cumulative
        average, ``momentum=None``, is for PyTorch alone.

    Examples
    --------
    >>> from numbabn import conventions
    >>> conventions.settings_to("flax", {"momentum": 0.1, "eps": 1e-3})
    {'momentum': 0.9, 'epsilon': 0.001}
    """
    convention = _convention(library)
    _known("settings", settings, ("momentum", "eps"))
    theirs: dict[str, Any] = {}
    if "momentum" in settings:
        theirs["momentum"] = _share(convention, settings["momentum"])
    if "eps" in settings:
        theirs[convention.epsilon] = checks.epsilon(settings["eps"])
    return theirs


def _convention(library: Any) -> Convention:
    if not isinstance(library, str):
        raise TypeError(f"library: expected a string, got {type(library).__qualname__}")
    if library not in CONVENTIONS:
        raise ValueError(f"library: expected one of {list(CONVENTIONS)}, got {library!r}")
    return CONVENTIONS[library]


def _known(argument: str, given: Any, names: Any) -> None:
    if not isinstance(given, Mapping):
        raise TypeError(f"{argument}: expected a mapping, got {type(given).__qualname__}")
    if not given.keys() <= set(names):
        raise ValueError(f"{argument}: expected some of {list(names)}, got {list(given)}")


def _by_our_names(
    argument: str, weights: Any, convention: Convention
) -> dict[str, tuple[str, Any]]:
    """Give one layer's arrays, each with its path, under our name for it."""
    theirs = {path.rpartition("/")[2]: (own, path) for own, path in convention.names.items()}
    arrays: dict[str, tuple[str, Any]] = {}
    layers: dict[tuple[str, ...], str] = {}  # the first name of each
    for path, value in _leaves(argument, weights):
        *layer, end = re.split(r"[/.]", path)
        own, whole = theirs.get(end.partition(":")[0], ("", ""))
        if not own or own in arrays:
            raise ValueError(f"{argument}: expected each of {list(theirs)} once, got {path!r}")
        if layer and whole.startswith(f"{layer[0]}/"):  # Flax has its layers within collections
            del layer[0]
        layers.setdefault(tuple(layer), path)
        if len(layers) > 1:
            raise ValueError(f"{argument}: expected one layer's names, got {[*layers.values()]}")
        arrays[own] = path, value
    return arrays


def _leaves(argument: str, tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Give all arrays of mappings within mappings, each with its path."""
    if not isinstance(tree, Mapping):
        raise TypeError(f"{argument}: expected a mapping, got {type(tree).__qualname__}")
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(argument, value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value


def _share(convention: Convention, momentum: Any) -> float | None:
    """Turn the old value's share into the new one's and back, where the library has that."""
    if convention.momentum_of == "new":
        return None if momentum is None else checks.real("momentum", momentum)
    # In decimals, as they were written: 0.99 and 0.01 belong together.
    return float(1 - Decimal(repr(checks.real("momentum", momentum))))
