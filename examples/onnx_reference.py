"""Run BatchNormalization of ONNX's reference evaluator by numbabn's kernels; read layers out.

A model with one batch norm in training mode is evaluated as onnx does it and as numbabn does, then
its layer is read out of the file and goes on by itself. Needs ``pip install ".[onnx]"``.
"""

import time

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import numbabn.onnx

C = 64
rng = np.random.default_rng(0)
parameters = {
    "scale": rng.uniform(0.5, 1.5, C).astype(np.float32),
    "B": rng.standard_normal(C, dtype=np.float32),
    "mean": np.zeros(C, np.float32),
    "var": np.ones(C, np.float32),
}


def model(outputs, **attributes):
    """Make a model of one batch norm."""
    node = helper.make_node(
        "BatchNormalization", ["x", *parameters], outputs, name="bn1", **attributes
    )
    float32 = onnx.TensorProto.FLOAT
    shapes = [["N", C, "H", "W"], [C], [C]]
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", float32, shapes[0])],
        [
            helper.make_tensor_value_info(name, float32, shape)
            for name, shape in zip(outputs, shapes, strict=False)
        ],
        [numpy_helper.from_array(array, name) for name, array in parameters.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


training = model(["y", "running_mean", "running_var"], training_mode=1, momentum=0.9)
x = rng.standard_normal((32, C, 56, 56), dtype=np.float32) + 3

evaluators = {
    "onnx": ReferenceEvaluator(training),
    "numbabn": ReferenceEvaluator(training, new_ops=[numbabn.onnx.BatchNormalization]),
}
results, seconds = {}, {}
for _ in range(2):  # the first call compiles numbabn's kernels, if they are not on disk yet
    for name, evaluator in evaluators.items():
        start = time.perf_counter()
        results[name] = evaluator.run(None, {"x": x})
        seconds[name] = time.perf_counter() - start
for got, expected in zip(results["numbabn"], results["onnx"], strict=True):
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
for name in evaluators:
    print(f"{name}: {1e3 * seconds[name]:.0f} ms for {x.nbytes / 2**20:.0f} MiB in training mode")

# The layer by its name in the file, with ONNX's eps, momentum and biased running variance.
layer = numbabn.onnx.layers(model(["y"], momentum=0.9))["bn1"]
print(layer)
layer.train()(x)
_, running_mean, running_var = results["numbabn"]
np.testing.assert_allclose(layer.running_mean, running_mean, rtol=1e-5)
np.testing.assert_allclose(layer.running_var, running_var, rtol=1e-5)
print("a step of training in the layer moves its running statistics as the model does")
