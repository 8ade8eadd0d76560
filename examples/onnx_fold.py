"""Fold the batch norm of an ONNX model into its convolutions, from file to file.

A residual network of ResNet-18's shapes is built, saved, folded and run in ONNX Runtime before and
after. Its weights are drawn at random: the arithmetic does not mind. Needs
``pip install ".[onnx]" onnxruntime``.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

import numbabn.onnx

rng = np.random.default_rng(0)
nodes, initializers = [], []


def constant(name, array):
    """Make an initializer."""
    initializers.append(numpy_helper.from_array(array.astype(np.float32), name))
    return name


def conv_norm(x, name, channels_in, channels, size, stride=1, relu=True):
    """Put a convolution without bias, batch norm, and a ReLU if asked behind x."""
    kernel = rng.standard_normal((channels, channels_in, size, size))
    kernel *= np.sqrt(2 / (channels_in * size * size))
    weight = constant(f"{name}.weight", kernel)
    statistics = [
        constant(f"{name}.scale", rng.uniform(0.5, 1.5, channels)),
        constant(f"{name}.shift", rng.normal(0, 0.1, channels)),
        constant(f"{name}.mean", rng.normal(0, 0.5, channels)),
        constant(f"{name}.var", rng.uniform(0.5, 2, channels)),
    ]
    pads, strides = [size // 2] * 4, [stride, stride]
    made = [f"{name}.conv", f"{name}.norm", f"{name}.relu"]
    nodes.append(helper.make_node("Conv", [x, weight], made[:1], pads=pads, strides=strides))
    nodes.append(
        helper.make_node("BatchNormalization", [made[0], *statistics], [made[1]], name=made[1])
    )
    if relu:
        nodes.append(helper.make_node("Relu", [made[1]], [made[2]]))
    return made[2] if relu else made[1]


x = conv_norm("image", "stem", 3, 64, 7, stride=2)
nodes.append(
    helper.make_node("MaxPool", [x], ["pool"], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
)
x, channels_in = "pool", 64
for stage, channels in enumerate((64, 128, 256, 512)):
    for block in range(2):
        name, stride = f"{stage}.{block}", 2 if stage and not block else 1
        y = conv_norm(x, f"{name}.a", channels_in, channels, 3, stride)
        y = conv_norm(y, f"{name}.b", channels, channels, 3, relu=False)
        if channels_in != channels:
            x = conv_norm(x, f"{name}.shortcut", channels_in, channels, 1, stride, relu=False)
        nodes.append(helper.make_node("Add", [x, y], [f"{name}.sum"]))
        nodes.append(helper.make_node("Relu", [f"{name}.sum"], [f"{name}.out"]))
        x, channels_in = f"{name}.out", channels
nodes.append(helper.make_node("GlobalAveragePool", [x], ["mean"]))
nodes.append(helper.make_node("Flatten", ["mean"], ["features"]))
head = constant("head", rng.standard_normal((512, 1000)) / 16)
nodes.append(helper.make_node("Gemm", ["features", head], ["logits"]))

image = helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, 224, 224])
logits = helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 1000])
graph = helper.make_graph(nodes, "resnet18", [image], [logits], initializers)
opsets = [helper.make_opsetid("", 15)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=8)


def session(path, level):
    """Load a model as ONNX Runtime optimizes it at a level."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


levels = onnxruntime.GraphOptimizationLevel
with tempfile.TemporaryDirectory() as folder:
    source, target = Path(folder) / "resnet18.onnx", Path(folder) / "folded.onnx"
    onnx.save(model, source)
    result = numbabn.onnx.fold_file(source, target)
    onnx.checker.check_model(target, full_check=True)
    print(f"folded {len(result.folded)} batch norms, kept {len(result.kept)}")
    assert len(result.folded) == 20
    assert not result.kept
    sessions = {
        "original": session(source, levels.ORT_DISABLE_ALL),
        "folded": session(target, levels.ORT_DISABLE_ALL),
        "original, optimized by ONNX Runtime": session(source, levels.ORT_ENABLE_ALL),
        "folded, optimized by ONNX Runtime": session(target, levels.ORT_ENABLE_ALL),
    }

batch = {"image": rng.standard_normal((1, 3, 224, 224), dtype=np.float32)}
results = {name: s.run(None, batch)[0] for name, s in sessions.items()}
expected = results.pop("original")
ulp = np.spacing(np.abs(expected).max())
for name, y in results.items():
    # Rounding anew in each of 20 layers, about an ULP each, which add up as a random walk does.
    difference = np.abs(y - expected).max() / ulp
    assert difference <= 16
    print(f"{name}: differs from the original by {difference:.1f} ULP of the largest logit")

seconds = {name: [] for name in sessions}
for _ in range(7):
    for name, s in sessions.items():  # in turn, so that all meet the same weather
        start = time.perf_counter()
        s.run(None, batch)
        seconds[name].append(time.perf_counter() - start)
medians = {name: np.median(times) for name, times in seconds.items()}
for name, median in medians.items():
    print(f"{name}: {1e3 * median:.1f} ms an image")
