"""ONNX Runtime: a model of one BatchNormalization, its inputs and outputs bound; inference only."""

import importlib
from collections.abc import Callable
from typing import Any

from ..arrays import EPS, Arrays
from ..cases import Case
from .worker import Unable

OPSET, IR_VERSION = 15, 8  # the last BatchNormalization, and the format of its time
onnx: Any = None  # both loaded in the peer's own process alone
onnxruntime: Any = None
_threads = 1


def load(threads: int) -> str:
    """Import it, keep the number of threads, return its version."""
    global onnx, onnxruntime, _threads
    onnx, onnxruntime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    _threads = threads
    return str(onnxruntime.__version__)


def calls_of(case: Case, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the ways to do a case."""
    if case.op != "inference":
        raise Unable("inference only")
    # It has no channels last; rows (M, C) are the same bytes.
    shape = case.shape if case.layout == "nchw" else (-1, case.channels)
    x, y = arrays.x.reshape(shape), arrays.out.reshape(shape)
    inputs = {
        "x": x,
        "weight": arrays.weight,
        "bias": arrays.bias,
        "mean": arrays.running_mean,
        "var": arrays.running_var,
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = _threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    model = _model(inputs, y)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, _type(array), array.shape, array.ctypes.data)
    binding.bind_output("y", "cpu", 0, _type(y), y.shape, y.ctypes.data)
    # Bound by address alone: the closure keeps the arrays alive.
    keep = inputs, y
    return {"bound": lambda: keep and session.run_with_iobinding(binding)}


def _type(array: Any) -> Any:
    return onnx.helper.np_dtype_to_tensor_dtype(array.dtype)


def _model(inputs: dict[str, Any], y: Any) -> bytes:
    make = onnx.helper
    values = {
        name: make.make_tensor_value_info(name, _type(array), array.shape)
        for name, array in (inputs | {"y": y}).items()
    }
    node = make.make_node("BatchNormalization", list(inputs), ["y"], epsilon=EPS)
    graph = make.make_graph([node], "bn", [values[name] for name in inputs], [values["y"]])
    opset = make.make_opsetid("", OPSET)
    model = make.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())
