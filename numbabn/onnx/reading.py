"""The batch norms of a model as layers."""

import os

from onnx import ModelProto

from ..conventions import CONVENTIONS, settings_from, state_dict_from
from ..layers import BatchNorm
from .graph import array_of, attributes_of, batch_norms, decimal, loaded, scopes_of
from .operator import widest


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
        that of its output where the node has none, or another one's; with a number where that is
        taken, too. In eval mode, of the widest dtype among the four parameters, with eps, and with
        momentum and correction such that training goes on as ONNX defines it.

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
    parameters = CONVENTIONS["onnx"].names.values()
    for name, node, scope in batch_norms(scopes_of(loaded(model))):
        attributes = attributes_of(node)
        if not attributes.get("spatial", 1):
            raise ValueError(f"model: expected spatial=1 in {name!r}, got 0")
        arrays = {}
        for parameter, source in zip(parameters, node.input[1:5], strict=True):
            if source not in scope.constants:
                expected = f"{parameter} of {name!r} to be an initializer or a Constant"
                raise ValueError(f"model: expected {expected}, got {source!r}, which is neither")
            arrays[parameter] = array_of(scope.constants[source])
        floats = {k: decimal(v) for k, v in attributes.items() if k in ("epsilon", "momentum")}
        layer = BatchNorm(
            arrays["scale"].size,
            **settings_from("onnx", floats),
            dtype=widest(*arrays.values()),
        )
        layer.load_state_dict(state_dict_from("onnx", arrays))
        found[name] = layer.eval()
    return found
