"""A model's graphs: what is constant in each, who makes and who uses what, and its batch norms."""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto


class Scope(NamedTuple):
    """A graph, and what can be known about names in it."""

    graph: GraphProto
    outer: "Scope | None"
    names: set[str]  # its own: inputs, initializers and what its nodes make
    constants: dict[str, TensorProto]  # those of the graphs around it, too
    makers: dict[str, NodeProto]
    uses: Counter[str]  # by nodes, in subgraphs too, and as outputs of a graph
    folded: set[str]  # what layers made that do what batch norm behind them did, too
    freed: set[str]  # what they used


def loaded(model: Any) -> ModelProto:
    """Give a model, read if it is a path, all of whose batch norms can be seen."""
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
        if any(is_standard(node, "BatchNormalization") for node in nodes_of(function)):
            raise ValueError(
                "model: expected no batch norm in functions, which onnx.inliner puts in their "
                f"place, got one in {function.name!r}"
            )
    return model


def decimal(value: float) -> float:
    """Give the number that was written: attributes are float32, whose 0.9 is 0.89999998."""
    return float(str(np.float32(value)))


def array_of(tensor: TensorProto) -> Any:
    """Give a tensor as an array."""
    if onnx.external_data_helper.uses_external_data(tensor):
        raise ValueError(f"model: expected external data loaded, got none for {tensor.name!r}")
    return onnx.numpy_helper.to_array(tensor)


def is_standard(node: NodeProto, *kinds: str) -> bool:
    """Tell whether a node is one of these operators of ONNX's own."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Give the attributes that are written."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def subgraphs_of(node: NodeProto) -> list[GraphProto]:
    """List the graphs within a node."""
    single = [a.g for a in node.attribute if a.type == AttributeProto.GRAPH]
    return single + [g for a in node.attribute for g in a.graphs]


def nodes_of(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Give the nodes of a graph or function, those of the graphs within them, too."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs_of(node):
            yield from nodes_of(subgraph)


def tensors_of(model: ModelProto) -> list[TensorProto]:
    """List all tensors of a model: initializers, and attributes of nodes."""
    nodes = [node for part in (model.graph, *model.functions) for node in nodes_of(part)]
    graphs = [model.graph, *(graph for node in nodes for graph in subgraphs_of(node))]
    attributes = [attribute for node in nodes for attribute in node.attribute]
    return [
        *(tensor for graph in graphs for tensor in graph.initializer),
        *(attribute.t for attribute in attributes if attribute.HasField("t")),
        *(tensor for attribute in attributes for tensor in attribute.tensors),
    ]


def uses_of(graph: GraphProto) -> Counter[str]:
    """Count the uses of names by nodes, in subgraphs too, and as outputs."""
    uses = Counter(output.name for output in graph.output)
    for node in graph.node:
        uses.update(node.input)
        for subgraph in subgraphs_of(node):
            uses.update(uses_of(subgraph))
    return uses


def scopes_of(model: ModelProto) -> list[Scope]:
    """List a model's graph, then those within its nodes."""
    # What is an input, too, may be overridden, except that before version 4 all had to be inputs.
    return list(_scopes_within(model.graph, None, overridable=model.ir_version >= 4))


def _scopes_within(graph: GraphProto, outer: Scope | None, overridable: bool) -> Iterator[Scope]:
    inputs = {i.name for i in graph.input}
    initializers = {t.name: t for t in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    names = {*inputs, *initializers, *makers}
    # A name of its own hides that of a graph around it: a Loop's value may go by its initial one's.
    around = outer.constants.items() if outer else ()
    constants = {name: t for name, t in around if name not in names}
    constants |= {n: t for n, t in initializers.items() if not (overridable and n in inputs)}
    for node in graph.node:
        if is_standard(node, "Identity") and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
        elif is_standard(node, "Constant"):
            for kind, value in attributes_of(node).items():
                if kind in ("value_float", "value_floats"):
                    value = onnx.numpy_helper.from_array(np.array(value, np.float32))
                if isinstance(value, TensorProto):
                    constants[node.output[0]] = value
    scope = Scope(graph, outer, names, constants, makers, uses_of(graph), set(), set())
    yield scope
    for node in graph.node:
        for subgraph in subgraphs_of(node):
            yield from _scopes_within(subgraph, scope, overridable)


def batch_norms(scopes: list[Scope]) -> Iterator[tuple[str, NodeProto, Scope]]:
    """Give every batch norm, under a name that no other has; branches may share an output's."""
    names = {""}
    for scope in scopes:
        for node in scope.graph.node:
            if is_standard(node, "BatchNormalization"):
                yield (
                    new_name(node.output[0] if node.name in names else node.name, names),
                    node,
                    scope,
                )


def new_name(wanted: str, taken: set[str]) -> str:
    """Give a name that none is, and take it."""
    name = next(n for i in count() if (n := f"{wanted}{i or ''}") not in taken)
    taken.add(name)
    return name
