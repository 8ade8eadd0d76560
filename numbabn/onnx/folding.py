"""A model whose batch norms are folded into the layers before them."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto

from ..conventions import CONVENTIONS
from ..fold import fold as fold_weights
from .graph import (
    Scope,
    array_of,
    attributes_of,
    batch_norms,
    decimal,
    is_standard,
    loaded,
    new_name,
    scopes_of,
    uses_of,
)

_MAPS = ("Conv", "ConvTranspose", "Gemm")


class Folded(NamedTuple):
    """A model after `fold`.

    ``folded`` names the batch norms that are gone; ``kept`` says of each that stayed why.
    """

    model: ModelProto
    folded: list[str]
    kept: dict[str, str]


def fold(model: ModelProto | str | os.PathLike[str]) -> Folded:
    """Fold batch norm in inference mode into the Conv, ConvTranspose or Gemm in front of it.

    That layer's weights and bias are multiplied and shifted in float64 and rounded once
    (`numbabn.fold`); the batch norm goes, and the layer gives its output, under its name. It is
    done where nothing else sees what lies between the two, where all their weights are
    initializers or Constants, and where the new weights are finite. Weights that others use, too,
    stay as they are for those.

    Parameters
    ----------
    model : ModelProto or path
        As for `layers`; a ModelProto has its external data loaded, and is not changed.

    Returns
    -------
    Folded
        ``model``, ``folded`` and ``kept``.

    Raises
    ------
    TypeError, ValueError
        If the model is none, or not as above.

    Examples
    --------
    >>> import numbabn.onnx
    >>> model, folded, kept = numbabn.onnx.fold("resnet50.onnx")  # doctest: +SKIP
    """
    if isinstance(model, ModelProto):
        model, given = ModelProto(), model
        model.CopyFrom(given)
    model = loaded(model)
    return Folded(model, *fold_in_place(model))


def fold_in_place(model: ModelProto) -> tuple[list[str], dict[str, str]]:
    """Fold, and name the batch norms that are gone, and those that stayed, with the reason."""
    scopes = scopes_of(model)
    taken = {name for scope in scopes for name in (*scope.names, *scope.uses)}
    folded: list[str] = []
    kept: dict[str, str] = {}
    for name, node, scope in batch_norms(scopes):
        reason = _reason_to_keep(node, scope)
        if reason is not None:
            kept[name] = reason
            continue
        before = scope.makers[node.input[0]]
        arrays = _folded_weights(node, before, scope)
        if not all(np.isfinite(array).all() for array in arrays):
            kept[name] = f"the folded weights are not finite in {arrays[0].dtype}"
            continue
        folded.append(name)
        scope.folded.add(node.input[0])
        scope.freed.update(node.input, before.input[1:])
        output = node.output[0]
        tensors = [
            onnx.numpy_helper.from_array(array, new_name(f"{output}.{kind}", taken))
            for kind, array in zip(("weight", "bias"), arrays, strict=True)
        ]
        model.graph.initializer.extend(tensors)
        if model.ir_version < 4:
            model.graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors
            )
        scope.constants.update({tensor.name: tensor for tensor in tensors})
        node.CopyFrom(before)
        del node.input[1:]
        node.input.extend(tensor.name for tensor in tensors)
        node.output[0] = output
        _delete(node.attribute, lambda a: a.name == "beta")
    for scope in reversed(scopes):  # from within, since weights may be of graphs around
        _remove(scope)
        if scope.outer:
            scope.outer.freed.update(scope.freed - scope.names)
    return folded, kept


def _delete(values: Any, unwanted: Callable[[Any], bool]) -> None:
    for i in reversed(range(len(values))):
        if unwanted(values[i]):
            del values[i]


def _remove(scope: Scope) -> None:
    """Remove layers that others took the place of, and of what they used what nothing uses now."""
    graph, freed = scope.graph, scope.freed
    _delete(graph.node, lambda node: not scope.folded.isdisjoint(node.output))
    uses = uses_of(graph)

    def unused(name: str) -> bool:
        return name in freed and not uses[name]

    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if is_standard(node, "Constant", "Identity") and unused(node.output[0]):
            uses.subtract(node.input)
            freed.update(node.input)
            del graph.node[i]
    for values in (graph.initializer, graph.input, graph.value_info):
        _delete(values, lambda value: unused(value.name))


def _reason_to_keep(node: NodeProto, scope: Scope) -> str | None:
    """Say why a batch norm cannot be folded, if it cannot."""
    attributes = attributes_of(node)
    if attributes.get("training_mode", 0) or any(node.output[1:]):
        return "it is in training mode"
    if not attributes.get("spatial", 1):
        return "it has spatial=0"
    if not scope.constants.keys() >= set(node.input[1:]):
        return "its parameters are not constant"
    source = node.input[0]
    before = scope.makers.get(source)
    if before is None:
        return "nothing in its graph is in front of it"
    if not is_standard(before, *_MAPS):
        return f"{before.op_type} is in front of it"
    if any(output.name == source for output in scope.graph.output):
        return f"the output of {before.op_type} in front of it is one of the graph"
    if scope.uses[source] > 1:
        return f"the output of {before.op_type} in front of it goes elsewhere, too"
    if not scope.constants.keys() | {""} >= set(before.input[1:]):
        return f"the weights of {before.op_type} in front of it are not constant"
    return None


def _folded_weights(node: NodeProto, before: NodeProto, scope: Scope) -> tuple[Any, Any]:
    """Give the weight and the bias of a layer that does what the batch norm did, too."""
    weight: Any = array_of(scope.constants[before.input[1]])
    bias: Any = None
    if any(before.input[2:]):
        bias = array_of(scope.constants[before.input[2]])
    scale, shift, mean, var = (array_of(scope.constants[name]) for name in node.input[1:])
    eps = decimal(attributes_of(node).get("epsilon", CONVENTIONS["onnx"].eps))
    norm = partial(
        fold_weights, running_mean=mean, running_var=var, weight=scale, bias=shift, eps=eps
    )
    attributes = attributes_of(before)
    if before.op_type == "Conv":
        return norm(weight, bias)
    if before.op_type == "ConvTranspose":
        # [G * I, O, ...], G groups of I channels in and O out, and with channels out in front.
        grouped = weight.reshape(attributes.get("group", 1), -1, *weight.shape[1:])
        swapped = grouped.swapaxes(1, 2)
        rows, bias = norm(swapped.reshape(-1, *swapped.shape[2:]), bias)
        return rows.reshape(swapped.shape).swapaxes(1, 2).reshape(weight.shape), bias
    # Gemm: alpha goes on multiplying the product, beta becomes 1. C may differ from row to row.
    turned = bool(attributes.get("transB", 0))
    columns, _ = norm(weight if turned else weight.T, None)
    C = attributes.get("beta", 1.0) * np.asarray(0.0 if bias is None else bias, np.float64)
    C = np.broadcast_to(C, (C.shape[0] if C.ndim == 2 else 1, len(columns)))
    shifts = np.stack([norm(columns[:, :0], row)[1] for row in C])
    return columns if turned else columns.T, shifts[0] if len(shifts) == 1 else shifts
