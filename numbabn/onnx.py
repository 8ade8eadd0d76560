"""ONNX: batch norm of its reference evaluator, layers read from a model, and a model folded."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .extras import needed

with needed("onnx", "onnx"):
    import onnx
    from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto
    from onnx.reference.op_run import OpRun

from . import checks
from .conventions import CONVENTIONS, settings_from, state_dict_from
from .fold import fold as fold_weights
from .functional import batch_norm_forward, batch_norm_inference
from .layers import BatchNorm

_PARAMETERS = ("scale", "B", "input_mean", "input_var")
_MAPS = ("Conv", "ConvTranspose", "Gemm")
_ONE_FILE = 2**31 - 2**24  # bytes of weights that leave a protobuf room for all else


class BatchNormalization(OpRun):
    """BatchNormalization of opsets 7 and later for ``onnx.reference``, run by numbabn's kernels.

    In training mode (``training_mode=1`` from opset 14 on) the running statistics come back beside
    Y, in their own dtype: ``running = running * momentum + batch * (1 - momentum)``, the variance
    divided by the count. X has 2 or more dimensions, or one, which are values of one channel;
    dtypes may differ as opset 15 allows. Training by the outputs of opsets before 14, whose
    saved statistics are not defined, and ``spatial=0`` of opsets 7 and 8 raise ``ValueError``.

    Examples
    --------
    >>> from onnx.reference import ReferenceEvaluator
    >>> from numbabn.onnx import BatchNormalization
    >>> ReferenceEvaluator("model.onnx", new_ops=[BatchNormalization])  # doctest: +SKIP
    >>> import numpy as np
    >>> x, two = np.array([[1.0, 10.0], [3.0, 30.0]]), np.full(2, 2.0)
    >>> BatchNormalization.eval(x, two, two, two, two, epsilon=2.0)
    array([[ 1., 10.],
           [ 3., 30.]])
    """

    op_domain = ""

    def _run(
        self,
        x: Any,
        scale: Any,
        bias: Any,
        mean: Any,
        var: Any,
        *,
        epsilon: float,
        momentum: float,
        training_mode: int = 0,
        spatial: int = 1,
    ) -> tuple[Any, ...]:
        opset = self.run_params["opsets"][self.op_domain]
        asked = [name for name in self.onnx_node.output if name]
        if not spatial:
            raise ValueError("spatial: expected 1, got 0, for which reshape X to (N, C * S)")
        if len(asked) > 1 and not (opset >= 14 and training_mode):
            expected = "training_mode=1 of opset 14 or later for more outputs than Y"
            raise ValueError(f"outputs: expected {expected}, got {asked} in opset {opset}")
        data = x[:, None] if x.ndim == 1 else x
        data, *parameters = _together(data, scale, bias, mean, var)
        if not training_mode:
            scale, bias, mean, var = parameters
            y = batch_norm_inference(data, mean, var, scale, bias, eps=epsilon)
            return (y.reshape(x.shape).astype(x.dtype, copy=False),)
        # One value per channel is defined here: it is that value twice, as far as statistics go.
        if data.size == data.shape[1]:
            data = np.concatenate([data, data])
        running = [array.copy() for array in parameters[2:]]
        y = batch_norm_forward(
            data, *parameters[:2], *running, momentum=1 - momentum, eps=epsilon, correction=0
        ).y
        y = y[: len(x)].reshape(x.shape).astype(x.dtype, copy=False)
        return y, running[0].astype(mean.dtype), running[1].astype(var.dtype)


def _together(x: Any, *parameters: Any) -> list[Any]:
    """Give dtypes that numbabn takes beside each other, none of them narrower than it was."""
    allowed = checks.parameter_dtypes(x.dtype)
    if all(array.dtype in allowed for array in parameters):
        return [x, *parameters]
    widest = _widest(x, *parameters)
    return [array.astype(widest, copy=False) for array in (x, *parameters)]


def _widest(*arrays: Any) -> Any:
    """Give the narrowest dtype that holds the numbers of all."""
    dtypes = {array.dtype for array in arrays}
    if dtypes >= {*checks.NARROW}:  # neither holds the other's, and NumPy knows no third
        dtypes.add(np.dtype(np.float32))
        dtypes -= {*checks.NARROW}
    return np.result_type(*dtypes)


def layers(model: ModelProto | str | os.PathLike[str]) -> dict[str, BatchNorm]:
    """Read every batch norm of a model as a layer, ready to infer.

    Parameters
    ----------
    model : ModelProto or path
        Opset 7 or later, without batch norm in functions of its own (see ``onnx.inliner``).

    Returns
    -------
    dict of str to BatchNorm
        In the model's order, those of subgraphs behind their node, by the name of the node; by
        that of its output where the node has none, or another one's. In eval mode, of the widest
        dtype among the four parameters, with eps, and with momentum and correction such that
        training goes on as ONNX defines it.

    Raises
    ------
    TypeError, ValueError
        If the model is none, or not as above; if a parameter is neither an initializer nor a
        Constant, or is one that callers may override; or if ``spatial=0``.

    Examples
    --------
    >>> import numbabn.onnx
    >>> layers = numbabn.onnx.layers("resnet50.onnx")  # doctest: +SKIP
    >>> y = layers["/layer1/bn1/BatchNormalization"](x)  # doctest: +SKIP
    """
    found: dict[str, BatchNorm] = {}
    for name, node, scope in _batch_norms(_scopes(_loaded(model))):
        attributes = _attributes(node)
        if not attributes.get("spatial", 1):
            raise ValueError(f"model: expected spatial=1 in {name!r}, got 0")
        arrays = {}
        for parameter, source in zip(_PARAMETERS, node.input[1:5], strict=True):
            if source not in scope.constants:
                expected = f"{parameter} of {name!r} to be an initializer or a Constant"
                raise ValueError(f"model: expected {expected}, got {source!r}, which is neither")
            arrays[parameter] = _array(scope.constants[source])
        floats = {k: _decimal(v) for k, v in attributes.items() if k in ("epsilon", "momentum")}
        layer = BatchNorm(
            arrays["scale"].size,
            **settings_from("onnx", floats),
            dtype=_widest(*arrays.values()),
        )
        layer.load_state_dict(state_dict_from("onnx", arrays))
        found[name] = layer.eval()
    return found


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
    model = _loaded(model)
    return Folded(model, *_fold_in_place(model))


def fold_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Folded:
    """Fold a model as `fold` does, from one file to another, which may be the same.

    Weights are written beside the target, in a file of its name and ".data", if those of the
    source were in files of their own, or if the model would not fit in one file (2 GiB). Both are
    written whole before they take the place of what is there.

    Parameters
    ----------
    source, target : path
        Where the model is, and where the folded one goes.

    Returns
    -------
    Folded
        As from `fold`; with external data, the model's weights are in its file, not in memory.

    Raises
    ------
    TypeError, ValueError, OSError
        As `fold`, and where files cannot be read or written.
    """
    target = Path(target)
    outside = any(
        onnx.external_data_helper.uses_external_data(tensor)
        for tensor in onnx.load(source, load_external_data=False).graph.initializer
    )
    model = _loaded(source)
    folded, kept = _fold_in_place(model)
    data = f"{target.name}.data"
    if outside or sum(tensor.ByteSize() for tensor in model.graph.initializer) > _ONE_FILE:
        for tensor in model.graph.initializer:
            if len(tensor.raw_data) >= 1024:  # as onnx.save
                onnx.external_data_helper.set_external_data(tensor, data)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name) as folder:
        saved = Path(folder) / target.name
        onnx.save(model, saved)
        for name in (data, target.name):
            if (saved.parent / name).exists():
                (saved.parent / name).replace(target.parent / name)
    return Folded(model, folded, kept)


class _Scope(NamedTuple):
    """A graph, and what can be known about names in it."""

    graph: GraphProto
    constants: dict[str, TensorProto]  # those of the graphs around it, too
    makers: dict[str, NodeProto]
    uses: Counter[str]  # by nodes, in subgraphs too, and as outputs of a graph
    folded: set[str]  # outputs of batch norms in this graph that are to be removed


def _loaded(model: Any) -> ModelProto:
    if isinstance(model, str | os.PathLike):
        model = onnx.load(model)
    if not isinstance(model, ModelProto):
        raise TypeError(f"model: expected a ModelProto or a path, got {type(model).__qualname__}")
    opset = max((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), default=7)
    if opset < 7:
        raise ValueError(
            f"model: expected opset 7 or later, as onnx.version_converter makes it, got {opset}"
        )
    for function in model.functions:
        if any(_is_standard(node, "BatchNormalization") for node in function.node):
            raise ValueError(
                "model: expected no batch norm in functions, which onnx.inliner puts in their "
                f"place, got one in {function.name!r}"
            )
    return model


def _decimal(value: float) -> float:
    """Give the number that was written: attributes are float32, whose 0.9 is 0.89999998."""
    return float(str(np.float32(value)))


def _array(tensor: TensorProto) -> Any:
    if onnx.external_data_helper.uses_external_data(tensor):
        raise ValueError(f"model: expected external data loaded, got none for {tensor.name!r}")
    return onnx.numpy_helper.to_array(tensor)


def _is_standard(node: NodeProto, *kinds: str) -> bool:
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    single = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return single + [g for a in node.attribute for g in a.graphs]


def _uses(graph: GraphProto) -> Counter[str]:
    uses = Counter(output.name for output in graph.output)
    for node in graph.node:
        uses.update(node.input)
        for subgraph in _subgraphs(node):
            uses.update(_uses(subgraph))
    return uses


def _scopes(model: ModelProto) -> list[_Scope]:
    """List a model's graph, then those within its nodes."""
    # What is an input, too, may be overridden, except that before version 4 all had to be inputs.
    inputs = {i.name for i in model.graph.input} if model.ir_version >= 4 else set()
    return list(_scopes_within(model.graph, {}, inputs))


def _scopes_within(
    graph: GraphProto, around: dict[str, TensorProto], inputs: set[str]
) -> Iterator[_Scope]:
    constants = around | {t.name: t for t in graph.initializer if t.name not in inputs}
    for node in graph.node:
        if _is_standard(node, "Identity") and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif _is_standard(node, "Constant"):
            value = _attributes(node)
            if "value_floats" in value:
                floats = np.array(value["value_floats"], np.float32)
                constants[node.output[0]] = onnx.numpy_helper.from_array(floats)
            elif "value" in value:
                constants[node.output[0]] = value["value"]
    makers = {output: node for node in graph.node for output in node.output}
    yield _Scope(graph, constants, makers, _uses(graph), set())
    for node in graph.node:
        for subgraph in _subgraphs(node):
            yield from _scopes_within(subgraph, constants, set())


def _batch_norms(scopes: list[_Scope]) -> Iterator[tuple[str, NodeProto, _Scope]]:
    """Give every batch norm, under a name that no other has; branches may share an output's."""
    names = {""}
    for scope in scopes:
        for node in scope.graph.node:
            if _is_standard(node, "BatchNormalization"):
                yield (
                    _new_name(node.output[0] if node.name in names else node.name, names),
                    node,
                    scope,
                )


def _fold_in_place(model: ModelProto) -> tuple[list[str], dict[str, str]]:
    scopes = _scopes(model)
    taken = {name for scope in scopes for name in (*scope.constants, *scope.makers, *scope.uses)}
    taken.update(value.name for value in model.graph.input)
    folded: list[str] = []
    kept: dict[str, str] = {}
    freed: set[str] = set()
    for name, node, scope in _batch_norms(scopes):
        reason = _reason_to_keep(node, scope)
        if reason is not None:
            kept[name] = reason
            continue
        before = scope.makers[node.input[0]]
        arrays = _folded_weights(node, before, scope)
        if not all(np.isfinite(array).all() for array in arrays):
            kept[name] = f"the folded weights are not finite in {arrays[0].dtype}"
            continue
        freed.update(node.input, before.input[1:])
        output = node.output[0]
        folded.append(name)
        scope.folded.add(output)
        tensors = [
            onnx.numpy_helper.from_array(array, _new_name(f"{output}.{kind}", taken))
            for kind, array in zip(("weight", "bias"), arrays, strict=True)
        ]
        model.graph.initializer.extend(tensors)
        if model.ir_version < 4:
            model.graph.input.extend(
                onnx.helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors
            )
        scope.constants.update({tensor.name: tensor for tensor in tensors})
        del before.input[1:]
        before.input.extend(tensor.name for tensor in tensors)
        before.output[0] = output
        scope.makers[output] = before
        _delete(before.attribute, lambda a: a.name == "beta")
    for scope in reversed(scopes):
        _remove(scope.graph, scope.folded, freed)
    return folded, kept


def _new_name(wanted: str, taken: set[str]) -> str:
    name = next(n for i in count() if (n := f"{wanted}{i or ''}") not in taken)
    taken.add(name)
    return name


def _delete(values: Any, unwanted: Callable[[Any], bool]) -> None:
    for i in reversed(range(len(values))):
        if unwanted(values[i]):
            del values[i]


def _remove(graph: GraphProto, outputs: set[str], freed: set[str]) -> None:
    """Remove batch norms by their outputs, and of the names freed those that nothing uses now."""
    _delete(graph.node, lambda n: _is_standard(n, "BatchNormalization") and n.output[0] in outputs)
    uses = _uses(graph)

    def unused(name: str) -> bool:
        return name in freed and not uses[name]

    for i in reversed(range(len(graph.node))):
        node = graph.node[i]
        if _is_standard(node, "Constant", "Identity") and unused(node.output[0]):
            uses.subtract(node.input)
            freed.update(node.input)
            del graph.node[i]
    for values in (graph.initializer, graph.input, graph.value_info):
        _delete(values, lambda value: unused(value.name))


def _reason_to_keep(node: NodeProto, scope: _Scope) -> str | None:
    """Say why a batch norm cannot be folded, if it cannot."""
    attributes = _attributes(node)
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
    if not _is_standard(before, *_MAPS):
        return f"{before.op_type} is in front of it"
    if any(output.name == source for output in scope.graph.output):
        return f"the output of {before.op_type} in front of it is one of the graph"
    if scope.uses[source] > 1:
        return f"the output of {before.op_type} in front of it goes elsewhere, too"
    if not scope.constants.keys() | {""} >= set(before.input[1:]):
        return f"the weights of {before.op_type} in front of it are not constant"
    return None


def _folded_weights(node: NodeProto, before: NodeProto, scope: _Scope) -> tuple[Any, Any]:
    """Give the weight and the bias of a layer that does what the batch norm did, too."""
    weight: Any = _array(scope.constants[before.input[1]])
    bias: Any = None
    if any(before.input[2:]):
        bias = _array(scope.constants[before.input[2]])
    scale, shift, mean, var = (_array(scope.constants[name]) for name in node.input[1:])
    eps = _decimal(_attributes(node).get("epsilon", CONVENTIONS["onnx"].eps))
    norm = partial(
        fold_weights, running_mean=mean, running_var=var, weight=scale, bias=shift, eps=eps
    )
    attributes = _attributes(before)
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
