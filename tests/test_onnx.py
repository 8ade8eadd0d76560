"""ONNX against its own reference evaluator, ONNX Runtime, PyTorch's exporter, and the oracle."""

import io
import warnings
from pathlib import Path

import cases
import ml_dtypes
import numpy as np
import pytest

from numbabn import BatchNorm, reference

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, inliner, numpy_helper, version_converter  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import numbabn.onnx as bn  # noqa: E402

C = 5
NAMES = ("scale", "B", "mean", "var")
FLOAT = TensorProto.FLOAT
DTYPES = [*cases.NARROW.values(), *cases.TOLERANCES.values()]
dtypes = pytest.mark.parametrize(("dtype", "ulp"), DTYPES, ids=[*cases.NARROW, *cases.TOLERANCES])
U = 2.0**-24  # float32 rounds by at most this


def parameters(channels=C, dtype=np.float32, seed=1):
    """Scale, shift, mean and variance."""
    scale, shift, mean, var = (cases.normal(channels, seed=seed + i) for i in range(4))
    return [a.astype(dtype) for a in (scale, shift, mean, np.abs(var) + 0.5)]


def constants(arrays, names=NAMES):
    return [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]


def value(name, dtype=np.float32, shape=None):
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape
    )


def model_of(nodes, inputs, outputs, initializers=(), *, opset=15, ir_version=10, **options):
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(initializers), **options)
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)


def one_norm(arrays, x, *, opset=15, outputs=("Y",), **attributes):
    """A model of one batch norm, whose parameters are inputs."""
    node = helper.make_node("BatchNormalization", ["X", *NAMES], outputs, **attributes)
    inputs = [value(n, a.dtype, a.shape) for n, a in zip(["X", *NAMES], [x, *arrays], strict=True)]
    kinds = dict(zip(["Y", "M", "V"], [x, *arrays[2:]], strict=True))
    return model_of([node], inputs, [value(n, kinds[n].dtype) for n in outputs if n], opset=opset)


def evaluate(model, feeds, ops=(bn.BatchNormalization,)):
    return ReferenceEvaluator(model, new_ops=list(ops)).run(None, feeds)


def fed(x, arrays):
    return dict(zip(["X", *NAMES], [x, *arrays], strict=True))


def session(model, level="ORT_DISABLE_ALL"):
    options = runtime.SessionOptions()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    content = model if isinstance(model, str) else model.SerializeToString()
    return runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run(model, feeds, level="ORT_DISABLE_ALL"):
    return session(model, level).run(None, feeds)


def shipped_cases():
    """Those that the onnx package has for its own backends."""
    from onnx.backend.test.case import node
    from onnx.backend.test.case.node import batch_normalization  # noqa: F401

    return [case for case in node._NodeTestCases if case.name.startswith("test_batchnorm")]


DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


def shipped_models():
    return sorted((DATA / "pytorch-converted").glob("test_BatchNorm*"))


class TestOperator:
    @pytest.mark.parametrize("case", shipped_cases(), ids=lambda case: case.name)
    def test_cases_of_the_onnx_package(self, case):
        if not any(node.op_type == "BatchNormalization" for node in case.model.graph.node):
            assert "expanded" in case.name  # into other operators, none of them ours
            return
        names = [i.name for i in case.model.graph.input]
        for inputs, outputs in case.data_sets:
            got = evaluate(case.model, dict(zip(names, inputs, strict=True)))
            for array, expected in zip(got, outputs, strict=True):
                assert array.dtype == expected.dtype
                np.testing.assert_allclose(array, expected, rtol=case.rtol, atol=1e-6)

    @pytest.mark.parametrize("folder", shipped_models(), ids=lambda folder: folder.name)
    def test_models_of_the_onnx_package(self, folder):
        """Once exported from PyTorch at opset 6, brought to 15 by onnx's own converter."""
        old = onnx.load(folder / "model.onnx")
        model = version_converter.convert_version(old, 15)
        data = folder / "test_data_set_0"
        x, expected = (
            numpy_helper.to_array(onnx.load_tensor(data / f"{name}_0.pb"))
            for name in ("input", "output")
        )
        (y,) = evaluate(model, {old.graph.input[0].name: x})
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        (layer,) = bn.layers(model).values()
        np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="model: expected opset 7 or later"):
            bn.layers(old)

    @pytest.mark.parametrize("shape", [(7, C), (6, C, 4), (3, C, 9, 7), (2, C, 3, 4, 5), (0, C, 3)])
    @pytest.mark.parametrize("training", [0, 1])
    @dtypes
    def test_against_the_oracle(self, dtype, ulp, training, shape):
        x, arrays = cases.normal(shape, dtype), parameters(dtype=dtype)
        before = [a.copy() for a in arrays]
        outputs = ["Y", "M", "V"][: 1 + 2 * training]
        options = {"epsilon": 1e-3, "momentum": 0.75, "training_mode": training}
        got = evaluate(one_norm(arrays, x, outputs=outputs, **options), fed(x, arrays))
        scale, shift, mean, var = arrays
        eps = float(np.float32(1e-3))
        if training:
            y, *_ = reference.forward(x, scale, shift, eps=eps)
            stats = reference.statistics(x)
            running = reference.running_update(mean, var, *stats, momentum=0.25, correction=0)
        else:
            y, running = reference.inference(x, mean, var, scale, shift, eps=eps), ()
        for array, expected in zip(got, (y, *running), strict=True):
            assert array.dtype == dtype
            assert array.shape == expected.shape
            bound = 8 * ulp * max(1, np.abs(expected).max(initial=0))
            np.testing.assert_allclose(array.astype(np.float64), expected, rtol=0, atol=bound)
        for array, kept in zip(arrays, before, strict=True):
            np.testing.assert_array_equal(array, kept)

    @pytest.mark.parametrize(
        "kinds",
        [
            (np.float16, np.float32, np.float32),
            (ml_dtypes.bfloat16, np.float32, np.float32),
            (np.float16, np.float16, np.float32),
            (ml_dtypes.bfloat16, np.float16, np.float64),
            (np.float32, np.float16, ml_dtypes.bfloat16),
            (np.float32, np.float32, np.float64),
            (np.float64, np.float32, np.float16),
        ],
        ids=lambda kinds: "-".join(np.dtype(k).name for k in kinds),
    )
    @pytest.mark.parametrize("training", [0, 1])
    def test_dtypes_of_x_scale_and_mean_may_differ(self, kinds, training):
        x = cases.normal((4, C, 6), kinds[0])
        scale, shift, mean, var = parameters()
        arrays = [scale.astype(kinds[1]), shift.astype(kinds[1])]
        arrays += [mean.astype(kinds[2]), var.astype(kinds[2])]
        outputs = ["Y", "M", "V"][: 1 + 2 * training]
        model = one_norm(arrays, x, outputs=outputs, training_mode=training)
        got = evaluate(model, fed(x, arrays))
        assert [a.dtype for a in got] == [kinds[0], kinds[2], kinds[2]][: len(got)]
        scale, shift, mean, var = arrays
        if training:
            expected = [reference.forward(x, scale, shift)[0]]
            stats = reference.statistics(x)
            expected += reference.running_update(mean, var, *stats, correction=0)
        else:
            expected = [reference.inference(x, mean, var, scale, shift)]
        for array, exact in zip(got, expected, strict=True):
            # Rounded once to its own dtype; within, to float32 where nothing is wider.
            ulp = max(float(ml_dtypes.finfo(array.dtype).eps), 2**-23)
            bound = 2 * ulp * max(1, np.abs(exact).max())
            np.testing.assert_allclose(array.astype(np.float64), exact, rtol=0, atol=bound)

    def test_a_float64_mean_keeps_its_digits_beside_float32(self):
        arrays = [a.astype(np.float64 if i > 1 else np.float32) for i, a in enumerate(parameters())]
        x = cases.normal((4, C), np.float32, offset=1e6)
        arrays[2] += 1e6
        (y,) = evaluate(one_norm(arrays, x), fed(x, arrays))
        scale, shift, mean, var = arrays
        np.testing.assert_allclose(y, reference.inference(x, mean, var, scale, shift), atol=1e-6)

    @pytest.mark.parametrize("opset", [9, 14, 15])
    def test_inference_as_onnx_runtime(self, opset):
        x, arrays = cases.normal((8, 64, 28, 28), np.float32), parameters(64)
        model = one_norm(arrays, x, opset=opset, epsilon=1e-3)
        (y,), (expected,) = evaluate(model, fed(x, arrays)), run(model, fed(x, arrays))
        np.testing.assert_allclose(y, expected, rtol=0, atol=16 * U * np.abs(expected).max())

    @pytest.mark.parametrize("training", [0, 1])
    @pytest.mark.parametrize("opset", [14, 15])
    def test_as_onnx_reference(self, opset, training):
        x, arrays = cases.normal((8, 64, 28, 28), np.float32), parameters(64)
        outputs = ["Y", "M", "V"][: 1 + 2 * training]
        model = one_norm(arrays, x, opset=opset, outputs=outputs, training_mode=training)
        feeds = fed(x, arrays)
        for array, expected in zip(evaluate(model, feeds), evaluate(model, feeds, ()), strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_allclose(array, expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize("outputs", [["Y"], ["Y", "", "V"], ["Y", "M"]], ids=str)
    def test_outputs_may_be_missing(self, outputs):
        x, arrays = cases.normal((4, C), np.float32), parameters()
        whole = one_norm(arrays, x, outputs=["Y", "M", "V"], training_mode=1)
        expected = dict(zip(["Y", "M", "V"], evaluate(whole, fed(x, arrays)), strict=True))
        model = one_norm(arrays, x, outputs=outputs, training_mode=1)
        got = evaluate(model, fed(x, arrays))
        for name, array in zip(filter(None, outputs), got, strict=True):
            np.testing.assert_array_equal(array, expected[name])

    def test_one_dimension_is_one_channel(self):
        x, arrays = cases.normal(9, np.float32), parameters(1)
        for training in (0, 1):
            got = evaluate(one_norm(arrays, x, training_mode=training), fed(x, arrays))[0]
            column = evaluate(
                one_norm(arrays, x[:, None], training_mode=training), fed(x[:, None], arrays)
            )[0]
            np.testing.assert_array_equal(got, column[:, 0])

    @pytest.mark.parametrize("shape", [(1, C), (1, C, 1, 1)])
    def test_training_on_one_value_per_channel_gives_the_shift(self, shape):
        """As the definition has it; numbabn's own functions refuse it."""
        x, arrays = cases.normal(shape, np.float32), parameters()
        model = one_norm(arrays, x, outputs=["Y", "M", "V"], training_mode=1)
        y, mean, var = evaluate(model, fed(x, arrays))
        np.testing.assert_array_equal(y, arrays[1].reshape(shape))
        np.testing.assert_allclose(mean, 0.9 * arrays[2] + 0.1 * x.reshape(C), rtol=4e-7, atol=1e-8)
        np.testing.assert_allclose(var, 0.9 * arrays[3], rtol=4e-7)

    def test_in_a_function_whose_attributes_are_its_callers(self):
        node = helper.make_node("BatchNormalization", ["X", *NAMES], ["Y"])
        for name in ("epsilon", "momentum"):
            attribute = onnx.AttributeProto(name=name, type=onnx.AttributeProto.FLOAT)
            attribute.ref_attr_name = name
            node.attribute.append(attribute)
        opsets = [helper.make_opsetid("", 15), helper.make_opsetid("own", 1)]
        function = helper.make_function(
            "own", "Norm", ["X", *NAMES], ["Y"], [node], opsets[:1], ["epsilon", "momentum"]
        )
        x, arrays = cases.normal((4, C), np.float32), parameters()
        call = helper.make_node(
            "Norm", ["X", *NAMES], ["Y"], domain="own", epsilon=1.0, momentum=0.5
        )
        inputs = [value(n) for n in ("X", *NAMES)]
        graph = helper.make_graph([call], "graph", inputs, [value("Y")])
        model = helper.make_model(graph, opset_imports=opsets, functions=[function])
        scale, shift, mean, var = arrays
        np.testing.assert_allclose(
            evaluate(model, fed(x, arrays))[0],
            reference.inference(x, mean, var, scale, shift, eps=1.0),
            rtol=0,
            atol=1e-6,
        )

    @pytest.mark.parametrize(
        ("opset", "outputs", "attributes", "message"),
        [
            (9, ["Y", "M", "V"], {}, r"outputs: expected .*, got \['Y', 'M', 'V'\] in opset 9"),
            (15, ["Y", "M", "V"], {}, "outputs: expected training_mode=1 of opset 14 or later"),
            (7, ["Y"], {"spatial": 0}, "spatial: expected 1, got 0"),
        ],
    )
    def test_errors(self, opset, outputs, attributes, message):
        x, arrays = cases.normal((4, C), np.float32), parameters()
        model = one_norm(arrays, x, opset=opset, outputs=outputs, **attributes)
        with pytest.raises(ValueError, match=message):
            evaluate(model, fed(x, arrays))


def chain(*nodes, x, initializers, opset=15, ir_version=10, outputs=("Y",), **options):
    """A model from X on, its initializers a mapping."""
    tensors = constants(initializers.values(), initializers)
    inputs = [value("X", x.dtype, x.shape)]
    if ir_version < 4:
        inputs += [value(n, a.dtype, a.shape) for n, a in initializers.items()]
    made = [value(n, x.dtype, [None] * x.ndim) for n in outputs]
    return model_of(nodes, inputs, made, tensors, opset=opset, ir_version=ir_version, **options)


def norm_node(x="X", y="Y", names=NAMES, **attributes):
    return helper.make_node("BatchNormalization", [x, *names], [y], **attributes)


def named(arrays, prefix=""):
    return dict(zip([prefix + n for n in NAMES], arrays, strict=True))


class TestLayers:
    def test_ready_to_infer_and_to_train_on(self, tmp_path):
        x, arrays = cases.normal((8, 16, 14, 14), np.float32), parameters(16)
        node = norm_node(name="norm", epsilon=1e-3, momentum=0.8)
        model = chain(node, x=x, initializers=named(arrays))
        onnx.save(model, tmp_path / "model.onnx")
        for source in (model, tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
            (layer,) = bn.layers(source).values()
            assert list(bn.layers(source)) == ["norm"]
            assert (layer.eps, layer.momentum, layer.correction) == (1e-3, 0.2, 0)
            assert (layer.num_features, layer.dtype, layer.training) == (16, np.float32, False)
            (expected,) = run(model, {"X": x})
            np.testing.assert_allclose(
                layer(x), expected, rtol=0, atol=16 * U * abs(expected).max()
            )
        training = one_norm(arrays, x, outputs=["Y", "M", "V"], training_mode=1, momentum=0.8)
        _, mean, var = evaluate(training, fed(x, arrays))
        layer.train()(x)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)

    def test_defaults(self):
        x = cases.normal((4, C), np.float32)
        (layer,) = bn.layers(chain(norm_node(), x=x, initializers=named(parameters()))).values()
        assert (layer.eps, layer.momentum, layer.correction) == (1e-5, 0.1, 0)

    def test_names(self):
        """The node's; its output's where the node has none or shares it."""
        x = cases.normal((4, C), np.float32)
        nodes = [norm_node("X", "a"), norm_node("a", "b", name="n"), norm_node("b", "Y", name="n")]
        model = chain(*nodes, x=x, initializers=named(parameters()))
        assert list(bn.layers(model)) == ["a", "n", "Y"]
        onnx.checker.check_model(model)

    @pytest.mark.parametrize(
        "kinds", [(np.float16, np.float32), (ml_dtypes.bfloat16,) * 2], ids=str
    )
    def test_the_widest_dtype(self, kinds):
        scale, shift, mean, var = parameters()
        arrays = [a.astype(kinds[0]) for a in (scale, shift)]
        arrays += [a.astype(kinds[1]) for a in (mean, var)]
        x = cases.normal((4, C), kinds[0])
        (layer,) = bn.layers(chain(norm_node(), x=x, initializers=named(arrays))).values()
        assert layer.dtype == kinds[1]
        assert layer(x).dtype == kinds[0]
        np.testing.assert_array_equal(layer.weight, arrays[0].astype(kinds[1]))

    def test_constants_of_every_kind(self):
        scale, shift, mean, var = parameters()
        x = cases.normal((4, C), np.float32)
        nodes = [
            helper.make_node("Constant", [], ["scale"], value_floats=scale.tolist()),
            helper.make_node("Constant", [], ["B"], value=numpy_helper.from_array(shift)),
            helper.make_node("Identity", ["kept"], ["mean"]),
            norm_node(),
        ]
        model = chain(*nodes, x=x, initializers={"kept": mean, "var": var})
        (layer,) = bn.layers(model).values()
        state = layer.state_dict()
        for array, name in zip((scale, shift, mean, var), BatchNorm(C).state_dict(), strict=False):
            np.testing.assert_array_equal(state[name], array)

    def test_errors(self):
        x, arrays = cases.normal((4, C), np.float32), parameters()
        with pytest.raises(ValueError, match=r"expected scale of 'Y' to be an init.*, got 'scale'"):
            bn.layers(one_norm(arrays, x))
        overridable = chain(norm_node(), x=x, initializers=named(arrays))
        overridable.graph.input.append(value("mean", np.float32, [C]))
        with pytest.raises(ValueError, match=r"expected input_mean of 'Y' to be .*, got 'mean'"):
            bn.layers(overridable)
        old = chain(norm_node(), x=x, initializers=named(arrays), opset=6)
        with pytest.raises(ValueError, match=r"model: expected opset 7 or later.*, got 6"):
            bn.layers(old)
        with pytest.raises(TypeError, match="model: expected a ModelProto or a path, got int"):
            bn.layers(3)
        spatial = chain(norm_node(spatial=0), x=x, initializers=named(arrays), opset=7)
        with pytest.raises(ValueError, match="model: expected spatial=1 in 'Y', got 0"):
            bn.layers(spatial)


def without_groups(model, node):
    """Put zeros where groups have no weights; the reference evaluator gets groups wrong."""
    group = next((a for a in node.attribute if a.name == "group"), None)
    if group is None:
        return
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight = numpy_helper.to_array(tensor)
    dense = np.zeros((len(weight), group.i, *weight.shape[1:]))
    size = len(weight) // group.i
    for g in range(group.i):
        dense[g * size : (g + 1) * size, g] = weight[g * size : (g + 1) * size]
    dense = dense.reshape(len(weight), -1, *weight.shape[2:])
    tensor.CopyFrom(numpy_helper.from_array(dense, tensor.name))
    group.i = 1


def exact(model, feeds, absolute=False):
    """Run a float32 model in float64, with absolute values of all weights if asked."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    tensors = [*wide.graph.initializer]
    for node in wide.graph.node:
        tensors += [a.t for a in node.attribute if a.type == onnx.AttributeProto.TENSOR]
    for tensor in tensors:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            array = array.astype(np.float64)
            array = np.abs(array) if absolute else array
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for node in wide.graph.node:
        if node.op_type == "ConvTranspose":
            without_groups(wide, node)
    for put in (*wide.graph.input, *wide.graph.output):
        put.type.tensor_type.elem_type = TensorProto.DOUBLE
    wide_feeds = {n: (np.abs(a) if absolute else a).astype(np.float64) for n, a in feeds.items()}
    return ReferenceEvaluator(wide).run(None, wide_feeds)


def checked_fold(model, folded=("norm",), kept=()):
    """Fold, and hold the result to what must be so of any."""
    before = model.SerializeToString()
    result = bn.fold(model)
    assert model.SerializeToString() == before
    assert (result.folded, list(result.kept)) == (list(folded), list(kept))
    onnx.checker.check_model(result.model, full_check=True)
    left = [n.op_type for n in result.model.graph.node].count("BatchNormalization")
    assert left == len(kept)
    assert list(result.model.graph.output) == list(model.graph.output)
    inferred = [onnx.shape_inference.infer_shapes(m).graph for m in (model, result.model)]
    shapes = [{v.name: v.type for v in (*g.value_info, *g.output)} for g in inferred]
    for name, kind in shapes[1].items():
        assert shapes[0][name] == kind
    return result


def within_rounding(model, folded, x, products):
    """Compare both in float32, folded, and as it was in float64.

    A sum of K products is within K + 2 roundings of sum(abs(w) * abs(x)), one more is that of the
    folded weights, one that of the bias: no more can be asked of a folded layer.
    """
    (expected,) = exact(model, {"X": x})
    (magnitude,) = exact(folded, {"X": x}, absolute=True)
    (got,) = run(folded, {"X": x})
    assert got.shape == expected.shape
    assert np.all(np.abs(got - expected) <= (products + 4) * U * magnitude)
    assert np.all(magnitude < 1e3)  # so that this is a bound


def choice(then, otherwise, *, x, initializers):
    """A model that is one of two graphs."""
    node = helper.make_node("If", ["if"], ["Y"], then_branch=then, else_branch=otherwise)
    model = chain(node, x=x, initializers=initializers)
    model.graph.input.append(value("if", np.bool_, []))
    return model


def either_way_alike(folded, model, x):
    for chosen in (True, False):
        feeds = {"X": x, "if": np.array(chosen)}
        (got,), (expected,) = run(folded, feeds), run(model, feeds)
        np.testing.assert_allclose(got, expected, rtol=0, atol=64 * U * abs(expected).max())


def loop(*nodes, carried, initializers, outputs=("Y",)):
    """A model that runs nodes twice; what they call "next" is a value of the second run."""
    going = helper.make_node("Identity", ["going"], ["on"])
    inputs = [value("run", np.int64, []), value("going", np.bool_, []), value(carried)]
    made = [value("on", np.bool_, []), value("next"), *map(value, outputs)]
    body = helper.make_graph([*nodes, going], "body", inputs, made)
    node = helper.make_node("Loop", ["count", "true", carried], ["last", "Z"], body=body)
    initializers = initializers | {"count": np.array(2), "true": np.array(True)}
    tensors = constants(initializers.values(), initializers)
    ends = [value("X", shape=[2, 4, 8, 8])], [value("Z", shape=[None] * 5)]
    return model_of([node], *ends, tensors)


BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])


class TestFold:
    @BIAS
    @pytest.mark.parametrize(
        ("kernel", "attributes"),
        [
            ((6, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
            ((6, 4, 3, 3), {"strides": [2, 1], "dilations": [1, 2]}),
            ((6, 4, 3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
            ((6, 2, 3, 3), {"group": 2}),
            ((8, 1, 3, 3), {"group": 4, "pads": [1, 0, 0, 1]}),
            ((6, 4, 5), {}),
            ((6, 4, 2, 3, 2), {}),
        ],
        ids=["pads", "strides", "auto_pad", "group", "depthwise", "1-D", "3-D"],
    )
    def test_conv(self, kernel, attributes, bias):
        x = cases.normal((2, 4, *[9] * (len(kernel) - 2)), np.float32)
        weights = {"W": cases.normal(kernel, np.float32, seed=7)}
        if bias:
            weights["b"] = cases.normal(kernel[0], np.float32, seed=8)
        node = helper.make_node("Conv", ["X", *weights], ["h"], **attributes)
        norm = norm_node("h", name="norm", epsilon=1e-3)
        model = chain(node, norm, x=x, initializers=weights | named(parameters(kernel[0])))
        folded = checked_fold(model).model
        (conv,) = folded.graph.node
        assert list(conv.attribute) == list(node.attribute)
        assert len(folded.graph.initializer) == 2
        within_rounding(model, folded, x, int(np.prod(kernel[1:])))

    @BIAS
    @pytest.mark.parametrize(
        ("kernel", "attributes"),
        [
            ((4, 6, 3, 3), {}),
            ((4, 3, 3, 2), {"group": 2, "strides": [2, 2], "output_padding": [1, 0]}),
            ((4, 2, 3, 3), {"group": 4, "pads": [1, 1, 0, 0]}),
            ((4, 3, 5), {"group": 2}),
        ],
        ids=["one group", "two groups", "depthwise", "1-D"],
    )
    def test_conv_transpose(self, kernel, attributes, bias):
        channels = kernel[1] * attributes.get("group", 1)
        x = cases.normal((2, 4, *[6] * (len(kernel) - 2)), np.float32)
        weights = {"W": cases.normal(kernel, np.float32, seed=7)}
        if bias:
            weights["b"] = cases.normal(channels, np.float32, seed=8)
        node = helper.make_node("ConvTranspose", ["X", *weights], ["h"], **attributes)
        norm = norm_node("h", name="norm")
        model = chain(node, norm, x=x, initializers=weights | named(parameters(channels)))
        folded = checked_fold(model).model
        within_rounding(model, folded, x, int(4 * np.prod(kernel[2:])))

    @pytest.mark.parametrize("turned", [0, 1])
    @pytest.mark.parametrize("factors", [{}, {"alpha": 0.5, "beta": 3.0}, {"beta": 0.0}], ids=str)
    @pytest.mark.parametrize("shape", [None, (), (1,), (6,), (1, 6), (3, 1), (3, 6)], ids=str)
    def test_gemm(self, shape, factors, turned):
        x = cases.normal((3, 4), np.float32)
        weight = cases.normal((4, 6), np.float32, seed=7)
        weights = {"W": np.ascontiguousarray(weight.T) if turned else weight}
        if shape is not None:
            weights["b"] = np.asarray(cases.normal(shape, np.float32, seed=8))
        node = helper.make_node("Gemm", ["X", *weights], ["h"], transB=turned, **factors)
        model = chain(
            node, norm_node("h", name="norm"), x=x, initializers=weights | named(parameters(6))
        )
        within_rounding(model, checked_fold(model).model, x, 4 + 2)

    def test_gemm_whose_shift_is_a_number(self):
        x = cases.normal((3, 4), np.float32)
        weights = {"W": cases.normal((4, C), np.float32, seed=7)}
        shift = helper.make_node("Constant", [], ["b"], value_float=0.5)
        node = helper.make_node("Gemm", ["X", "W", "b"], ["h"], beta=3.0)
        norm = norm_node("h", name="norm")
        model = chain(shift, node, norm, x=x, initializers=weights | named(parameters()))
        within_rounding(model, checked_fold(model).model, x, 4 + 2)

    def test_gemm_of_a_transposed_input(self):
        x = cases.normal((4, 3), np.float32)
        weights = {"W": cases.normal((4, C), np.float32, seed=7)}
        node = helper.make_node("Gemm", ["X", "W"], ["h"], transA=1)
        norm = norm_node("h", name="norm")
        model = chain(node, norm, x=x, initializers=weights | named(parameters()))
        within_rounding(model, checked_fold(model).model, x, 4)

    @pytest.mark.parametrize("kind", [np.float16, np.float64])
    def test_dtypes(self, kind):
        """Computed in float64, rounded once to the layer's own, float32 statistics or not."""
        x = cases.normal((2, 4, 5, 5), kind)
        weight = cases.normal((C, 4, 3, 3), kind, seed=7)
        scale, shift, mean, var = parameters()
        arrays = [scale.astype(kind), shift.astype(kind), mean, var]
        conv = helper.make_node("Conv", ["X", "W"], ["h"])
        model = chain(
            conv, norm_node("h", name="norm"), x=x, initializers={"W": weight} | named(arrays)
        )
        w, b = map(numpy_helper.to_array, checked_fold(model).model.graph.initializer)
        expected = reference.fold(weight, None, mean, var, *arrays[:2])
        for got, wanted in zip((w, b), expected, strict=True):
            assert got.dtype == kind
            ulp = 2.0**-10 if kind is np.float16 else cases.TOLERANCES["float64"].ulp
            np.testing.assert_allclose(
                got, wanted, rtol=ulp, atol=1e-7 if kind is np.float16 else 0
            )

    def test_shared_weights_stay_for_those_who_use_them(self):
        """Two layers with one kernel and one set of statistics; one of them has no batch norm."""
        x = cases.normal((2, C, 8, 8), np.float32)
        weight = cases.normal((C, C, 3, 3), np.float32, seed=7)
        nodes = [
            helper.make_node("Conv", ["X", "W"], ["a"]),
            norm_node("a", "A", name="norm"),
            helper.make_node("Conv", ["X", "W"], ["b"], dilations=[1, 1]),
            norm_node("b", "B1", name="other", epsilon=0.5),
            helper.make_node("Conv", ["X", "W"], ["Z"]),
        ]
        model = chain(
            *nodes, x=x, outputs=["A", "B1", "Z"], initializers={"W": weight} | named(parameters())
        )
        folded = checked_fold(model, ["norm", "other"]).model
        left = {t.name: numpy_helper.to_array(t) for t in folded.graph.initializer}
        assert len(left) == 5
        np.testing.assert_array_equal(left["W"], weight)
        for got, expected in zip(run(folded, {"X": x}), exact(model, {"X": x}), strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=64 * U * abs(expected).max())

    def test_constants_and_what_is_left_of_them(self):
        x = cases.normal((2, 4, 8, 8), np.float32)
        weight = cases.normal((C, 4, 3, 3), np.float32, seed=7)
        scale, shift, mean, var = parameters()
        nodes = [
            helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(weight)),
            helper.make_node("Constant", [], ["var"], value_floats=var.tolist()),
            helper.make_node("Identity", ["scale"], ["B"]),
            helper.make_node("Conv", ["X", "W"], ["h"]),
            norm_node("h", name="norm"),
        ]
        del shift
        model = chain(*nodes, x=x, initializers={"scale": scale, "mean": mean})
        folded = checked_fold(model).model
        assert [n.op_type for n in folded.graph.node] == ["Conv"]
        assert [t.name for t in folded.graph.initializer] == ["Y.weight", "Y.bias"]
        within_rounding(model, folded, x, 36)

    def test_two_in_a_row(self):
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((C, 4, 3, 3), np.float32, seed=7)}
        nodes = [
            helper.make_node("Conv", ["X", "W"], ["h"]),
            norm_node("h", "g", name="norm"),
            norm_node("g", "Y", names=["2" + n for n in NAMES], name="second"),
        ]
        initializers = weights | named(parameters()) | named(parameters(seed=9), "2")
        model = chain(*nodes, x=x, initializers=initializers)
        folded = checked_fold(model, ["norm", "second"]).model
        assert len(folded.graph.initializer) == 2
        within_rounding(model, folded, x, 36 + 3)  # the first one's rounding of weights, too

    def test_names_that_are_taken(self):
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"Y.weight": cases.normal((C, 4, 3, 3), np.float32, seed=7)}
        conv = helper.make_node("Conv", ["X", "Y.weight"], ["h"])
        model = chain(
            conv, norm_node("h", name="norm"), x=x, initializers=weights | named(parameters())
        )
        folded = checked_fold(model).model
        assert [t.name for t in folded.graph.initializer] == ["Y.weight1", "Y.bias"]
        within_rounding(model, folded, x, 36)

    def test_before_initializers_could_do_without_an_input(self):
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((C, 4, 3, 3), np.float32, seed=7)}
        model = chain(
            helper.make_node("Conv", ["X", "W"], ["h"]),
            norm_node("h", name="norm"),
            x=x, initializers=weights | named(parameters()), opset=8, ir_version=3,
        )  # fmt: skip
        folded = checked_fold(model).model
        assert [i.name for i in folded.graph.input] == ["X", "Y.weight", "Y.bias"]
        model.opset_import[0].version = 15  # the reference evaluator has no inference before
        within_rounding(model, folded, x, 36)

    def test_in_a_branch(self):
        """Of an If whose weights are outside it, beside a branch whose names are the same."""
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((C, 4, 3, 3), np.float32, seed=7)} | named(parameters())
        branches = []
        for node in (norm_node("h", "o", name="norm"), helper.make_node("Relu", ["h"], ["o"])):
            conv = helper.make_node("Conv", ["X", "W"], ["h"])
            branches.append(helper.make_graph([conv, node], "branch", [], [value("o")]))
        model = choice(*branches, x=x, initializers=weights)
        assert list(bn.layers(model)) == ["norm"]
        result = bn.fold(model)
        assert (result.folded, result.kept) == (["norm"], {})
        onnx.checker.check_model(result.model)
        assert {t.name for t in result.model.graph.initializer} == {"W", "o.weight", "o.bias"}
        either_way_alike(result.model, model, x)

    @pytest.mark.parametrize("kinds", [("Conv", "Conv"), ("Conv", "Relu"), ("Relu", "Conv")])
    @pytest.mark.parametrize("own", [True, False], ids=["own weights", "weights around"])
    def test_branches_whose_names_are_the_same(self, kinds, own):
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((4, 4, 3, 3), np.float32, seed=7)}
        branches, arrays = [], []
        for i, kind in enumerate(kinds):
            arrays.append(parameters(4, seed=10 * i * own))
            before = helper.make_node(kind, ["X", "W"] if kind == "Conv" else ["X"], ["h"])
            made = [before, norm_node("h", "o")], "branch", [], [value("o")]
            branches.append(helper.make_graph(*made, constants(arrays[i], NAMES) if own else []))
        outside = weights if own else weights | named(arrays[0])
        model = choice(*branches, x=x, initializers=outside)
        onnx.checker.check_model(model, full_check=True)
        found = bn.layers(model)
        assert list(found) == ["o", "o1"]
        assert {a.weight.tobytes() for a in found.values()} == {a[0].tobytes() for a in arrays}
        result = bn.fold(model)
        assert len(result.folded) == kinds.count("Conv")
        assert sorted([*result.folded, *result.kept]) == ["o", "o1"]
        onnx.checker.check_model(result.model, full_check=True)
        either_way_alike(result.model, model, x)

    @pytest.mark.parametrize("name", ["W", "mean"])
    def test_a_value_of_a_loop_hides_a_constant_of_its_name(self, name):
        weights = {"W": cases.normal((C, 4, 3, 3), np.float32, seed=7)} | named(parameters())
        conv = helper.make_node("Conv", ["X", "W"], ["h"])
        twice = helper.make_node("Add", [name, name], ["next"])
        model = loop(conv, norm_node("h", name="norm"), twice, carried=name, initializers=weights)
        onnx.checker.check_model(model)
        result = bn.fold(model)
        assert result.model == model
        assert result.kept["norm"].endswith("not constant")
        if name == "mean":
            with pytest.raises(ValueError, match=r"expected input_mean of 'norm'.*, got 'mean'"):
                bn.layers(model)

    def test_what_goes_by_a_name_that_is_gone_or_moves(self):
        """A value of a loop as a mean that was folded; what a branch made as the norm's output."""
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((C, 4, 3, 3), np.float32, seed=7)} | named(parameters())
        inner = helper.make_node("Abs", ["X"], ["Y"])
        branch = helper.make_graph([inner], "branch", [], [value("Y")])
        body = [helper.make_node("Identity", ["W"], ["next"])]
        body.append(helper.make_node("Add", ["Y", "Y"], ["o"]))
        model = loop(*body, carried="mean", initializers=weights, outputs=["o"])
        before = [
            helper.make_node("Conv", ["X", "W"], ["h"]),
            helper.make_node("If", ["true"], ["b"], then_branch=branch, else_branch=branch),
            norm_node("h", name="norm"),
        ]
        after = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*before, *after])
        onnx.checker.check_model(model)
        result = bn.fold(model)
        assert result.folded == ["norm"]
        onnx.checker.check_model(result.model)
        (got,), (expected,) = run(result.model, {"X": x}), run(model, {"X": x})
        np.testing.assert_allclose(got, expected, rtol=0, atol=64 * U * abs(expected).max())

    def kept(self, *nodes, reason, outputs=("Y",), extra=(), opset=15, change=None):
        """Fold a model of which nothing can be folded."""
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((C, 4, 3, 3), np.float32, seed=7)} | named(parameters())
        weights |= change or {}
        model = chain(*nodes, x=x, initializers=weights, outputs=outputs, opset=opset)
        model.graph.input.extend(extra)
        result = bn.fold(model)
        assert (result.folded, result.kept) == ([], {"norm": reason})
        assert result.model == model

    def test_what_is_kept(self):
        conv = helper.make_node("Conv", ["X", "W"], ["h"])
        norm = norm_node("h", name="norm")
        where = "of Conv in front of it"
        relu = [conv, helper.make_node("Relu", ["h"], ["r"]), norm_node("r", name="norm")]
        self.kept(*relu, reason="Relu is in front of it")
        twice = [conv, norm, helper.make_node("Relu", ["h"], ["Z"])]
        self.kept(*twice, reason=f"the output {where} goes elsewhere, too", outputs=("Y", "Z"))
        self.kept(conv, norm, reason=f"the output {where} is one of the graph", outputs=("Y", "h"))
        kernel = [value("W", np.float32, [C, 4, 3, 3])]  # an initializer that callers may override
        self.kept(conv, norm, reason=f"the weights {where} are not constant", extra=kernel)
        mean = [value("mean", np.float32, [C])]
        self.kept(conv, norm, reason="its parameters are not constant", extra=mean)
        self.kept(
            norm_node("X", name="norm"), reason="nothing in its graph is in front of it",
            change=named(parameters(4)),
        )  # fmt: skip
        training = norm_node("h", name="norm", training_mode=1)
        self.kept(conv, training, reason="it is in training mode")
        old = helper.make_node("BatchNormalization", ["h", *NAMES], ["Y", "M", "V"], name="norm")
        self.kept(conv, old, reason="it is in training mode", opset=9)
        spatial = norm_node("h", name="norm", spatial=0)
        self.kept(conv, spatial, reason="it has spatial=0", opset=8)
        self.kept(
            conv, norm_node("h", name="norm", epsilon=0.0), change={"var": np.zeros(C, np.float32)},
            reason="the folded weights are not finite in float32",
        )  # fmt: skip

    @pytest.mark.parametrize("within", [False, True], ids=["function", "branch of a function"])
    def test_functions(self, within):
        x, arrays = cases.normal((4, C), np.float32), parameters()
        opsets = [helper.make_opsetid("", 15), helper.make_opsetid("own", 1)]
        node = norm_node()
        if within:
            branch = helper.make_graph([norm_node(y="o")], "branch", [], [value("o")])
            node = helper.make_node("If", ["if"], ["Y"], then_branch=branch, else_branch=branch)
        inputs = ["X", *NAMES, "if"]
        function = helper.make_function("own", "Norm", inputs, ["Y"], [node], opsets)
        call = helper.make_node("Norm", inputs, ["Y"], domain="own")
        model = chain(call, x=x, initializers=named(arrays) | {"if": np.array(True)})
        model.opset_import.append(opsets[1])
        model.functions.append(function)
        with pytest.raises(ValueError, match=r"no batch norm in functions, .*, got one in 'Norm'"):
            bn.fold(model)
        assert len(bn.layers(inliner.inline_local_functions(model))) == 1 + within


class TestFiles:
    def model(self):
        x = cases.normal((2, 4, 8, 8), np.float32)
        weights = {"W": cases.normal((16, 4, 3, 3), np.float32, seed=7)}
        conv = helper.make_node("Conv", ["X", "W"], ["h"])
        return x, chain(
            conv, norm_node("h", name="norm"), x=x, initializers=weights | named(parameters(16))
        )

    @pytest.mark.parametrize("outside", [False, True], ids=["one file", "external data"])
    @pytest.mark.parametrize("in_place", [False, True], ids=["elsewhere", "in place"])
    def test_from_file_to_file(self, tmp_path, outside, in_place):
        x, model = self.model()
        (expected,) = run(bn.fold(model).model, {"X": x})
        source, target = tmp_path / "a.onnx", tmp_path / ("a.onnx" if in_place else "b.onnx")
        onnx.save(model, source, save_as_external_data=outside, location=f"{tmp_path.name}.data")
        for _ in range(2):  # the second time there are files already
            result = bn.fold_file(source, target)
            assert result.folded + list(result.kept) == (["norm"] if not in_place or _ == 0 else [])
            onnx.checker.check_model(target, full_check=True)
            np.testing.assert_array_equal(run(str(target), {"X": x})[0], expected)
            assert (tmp_path / f"{target.name}.data").exists() == outside
        assert not [f for f in tmp_path.iterdir() if f.is_dir()]

    def test_models_too_large_for_one_file(self, tmp_path, monkeypatch):
        """As if 1 KB were too large for one."""
        x, model = self.model()
        monkeypatch.setattr("numbabn.onnx.files._ONE_FILE", 1000)
        onnx.save(model, tmp_path / "a.onnx")
        bn.fold_file(tmp_path / "a.onnx", tmp_path / "b.onnx")
        assert (tmp_path / "b.onnx.data").stat().st_size >= 16 * 4 * 9 * 4
        np.testing.assert_array_equal(
            run(str(tmp_path / "b.onnx"), {"X": x})[0], run(bn.fold(model).model, {"X": x})[0]
        )

    @pytest.mark.parametrize("replaced", [False, True], ids=["new", "over a model"])
    @pytest.mark.parametrize("whose", ["source", "another's", "nobody's"])
    def test_data_of_other_models_stays(self, tmp_path, whose, replaced):
        """Even where it goes by the name of the target's."""
        x, model = self.model()
        (expected,) = run(bn.fold(model).model, {"X": x})
        source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
        other = source if whose == "source" else tmp_path / "c.onnx"
        for path in {source, other}:
            data = "b.onnx.data" if path == other else "a.data"
            onnx.save(self.model()[1], path, save_as_external_data=True, location=data)
        if whose == "nobody's":
            other.unlink()
        if replaced:
            onnx.save(self.model()[1], target)
        there = (tmp_path / "b.onnx.data").read_bytes()
        for _ in range(2):
            bn.fold_file(source, target)
            assert (tmp_path / "b.onnx.data").read_bytes() == there
            assert len(list(tmp_path.glob("b.onnx.data*"))) == 2
            np.testing.assert_array_equal(run(str(target), {"X": x})[0], expected)

    @pytest.mark.parametrize("outside", [False, True], ids=["one file", "external data"])
    def test_through_a_link_and_with_its_mode(self, tmp_path, outside):
        x, model = self.model()
        (expected,) = run(bn.fold(model).model, {"X": x})
        (tmp_path / "real").mkdir()
        real, link = tmp_path / "real" / "model.onnx", tmp_path / "link.onnx"
        onnx.save(model, link, save_as_external_data=outside, location="link.onnx.data")
        link.rename(real)
        link.symlink_to(real)
        real.chmod(0o640)
        assert bn.fold_file(link, link).folded == ["norm"]
        assert link.is_symlink()
        assert real.stat().st_mode & 0o777 == 0o640
        assert {f.name for f in tmp_path.iterdir()} == {"real", "link.onnx"} | (
            {"link.onnx.data"} if outside else set()
        )
        assert not bn.layers(link)
        np.testing.assert_array_equal(run(str(link), {"X": x})[0], expected)

    def test_constants_outside_stay_outside(self, tmp_path):
        x, model = self.model()
        weight = numpy_helper.from_array(cases.normal((16, 16, 3, 3), np.float32), "kept")
        model.graph.output[0].name = "Z"
        model.graph.node.append(helper.make_node("Constant", [], ["kept"], value=weight))
        model.graph.node.append(helper.make_node("Conv", ["Y", "kept"], ["Z"]))
        source, target = tmp_path / "a.onnx", tmp_path / "b.onnx"
        (expected,) = run(bn.fold(model).model, {"X": x})
        onnx.save(
            model, source, save_as_external_data=True, location="a.data", convert_attribute=True
        )
        assert bn.fold_file(source, target).folded == ["norm"]
        assert target.stat().st_size < 16 * 16 * 9 * 4 <= (tmp_path / "b.onnx.data").stat().st_size
        np.testing.assert_array_equal(run(str(target), {"X": x})[0], expected)

    def test_paths_are_paths(self, tmp_path):
        with pytest.raises(TypeError, match="source: expected a path, got ModelProto"):
            bn.fold_file(self.model()[1], tmp_path / "b.onnx")
        with pytest.raises(TypeError, match="target: expected a path, got int"):
            bn.fold_file(tmp_path / "a.onnx", 1)

    def test_external_data_that_is_not_loaded(self, tmp_path):
        _, model = self.model()
        onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data")
        model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
        with pytest.raises(ValueError, match="expected external data loaded, got none for 'W'"):
            bn.fold(model)

    def test_a_failure_leaves_what_is_there(self, tmp_path):
        (tmp_path / "a.onnx").write_bytes(b"no model")
        (tmp_path / "b.onnx").write_text("something else")
        with pytest.raises(Exception, match="parsing message"):
            bn.fold_file(tmp_path / "a.onnx", tmp_path / "b.onnx")
        assert (tmp_path / "b.onnx").read_text() == "something else"
        assert len(list(tmp_path.iterdir())) == 2


def shipped_network(name):
    """A network that the onnx package has, its weights drawn at random."""
    model = onnx.load(DATA / "light" / f"light_{name}.onnx")
    graph = model.graph
    shapes = {t.name: tuple(numpy_helper.to_array(t)) for t in graph.initializer}
    rng = np.random.default_rng(0)
    variances = {n.input[4] for n in graph.node if n.op_type == "BatchNormalization"}
    tensors = list(graph.initializer)  # small ones are there
    for node in [n for n in graph.node if n.op_type == "ConstantOfShape"]:
        shape = shapes[node.input[0]]
        array = rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:]) / 2))
        if node.output[0] in variances:
            array = np.abs(array) + 0.5
        tensors.append(numpy_helper.from_array(array.astype(np.float32), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    constants = [t for t in tensors if t.name in used]
    data = [i for i in graph.input if i.name not in {t.name for t in tensors}]
    del graph.initializer[:], graph.input[:]
    graph.initializer.extend(constants)
    graph.input.extend(data)
    model.ir_version = 8
    return model


class TestNetworks:
    def test_resnet50(self):
        model = shipped_network("resnet50")
        del model.graph.node[-1]  # the softmax, which hides differences
        model.graph.output[0].name = model.graph.node[-1].output[0]
        result = checked_fold(model, [n.name for n in norms(model)])
        x = cases.normal((1, 3, 224, 224), np.float32)
        feeds = {model.graph.input[0].name: x}
        (got,), (expected,) = run(result.model, feeds), run(model, feeds)
        # Rounding anew in each of 53 layers: a random walk of about sqrt(53) steps of an ULP. 3
        # to 4 were seen, as many as where ONNX Runtime folds by itself.
        ulp = np.spacing(np.abs(expected).max())
        assert 0 < np.abs(got - expected).max() <= 16 * ulp

    def test_densenet121_keeps_its_preactivations(self):
        result = bn.fold(shipped_network("densenet121"))
        assert len(result.folded) + len(result.kept) == 121
        assert len(result.folded) == 59  # one before each Concat, and the first
        assert set(result.kept.values()) <= {
            "Concat is in front of it",
            "MaxPool is in front of it",
            "AveragePool is in front of it",
        }


def norms(model):
    return [n for n in model.graph.node if n.op_type == "BatchNormalization"]


@pytest.fixture(scope="module")
def exported():
    """A residual network of PyTorch's, and what its exporter makes of it, batch norm kept."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, C, out, stride):
            super().__init__()
            self.conv1 = nn.Conv2d(C, out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(out, eps=1e-3, momentum=0.2)
            self.conv2 = nn.Conv2d(out, out, 3, 1, 1, groups=4, bias=False)
            self.bn2 = nn.BatchNorm2d(out)
            self.shortcut = nn.Sequential(nn.Conv2d(C, out, 1, stride), nn.BatchNorm2d(out))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            return torch.relu(y + self.shortcut(x))

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3), nn.BatchNorm2d(64), nn.ReLU(),
        *[Block(64 if i == 0 else 128, 128, 2 - i % 2) for i in range(4)],
        nn.ConvTranspose2d(128, 64, 2, 2, groups=2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip
    x = torch.randn(8, 3, 128, 128)
    with torch.no_grad():
        for _ in range(3):
            net(x)  # running statistics move
    net.eval()
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of this exporter itself
        keep = {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
        torch.onnx.export(net, x, file, dynamo=False, **keep)
    with torch.no_grad():
        expected = net.double()(x.double()).numpy()
    return net.float(), x.numpy(), expected, onnx.load_from_string(file.getvalue())


class TestPyTorchsExporter:
    def test_layers_are_its_modules(self, exported):
        net, _, _, model = exported
        modules = [m for m in net.modules() if "BatchNorm" in type(m).__name__]
        found = list(bn.layers(model).values())
        assert len(found) == len(modules) == 15
        theirs = {
            m.weight.detach().numpy().tobytes() + m.running_var.numpy().tobytes() for m in modules
        }
        assert theirs == {a.weight.tobytes() + a.running_var.tobytes() for a in found}
        assert sorted((m.eps, m.momentum) for m in modules) == sorted(
            (a.eps, a.momentum) for a in found
        )

    def test_folded_it_is_as_exact_as_before(self, exported):
        """By PyTorch in float64."""
        _, x, expected, model = exported
        result = bn.fold(model)
        assert (len(result.folded), result.kept) == (15, {})
        onnx.checker.check_model(result.model, full_check=True)
        assert not norms(result.model)
        feeds = {model.graph.input[0].name: x}
        ulp = np.spacing(np.float32(np.abs(expected).max()))
        before, after = (
            np.abs(run(m, feeds)[0] - expected).max() / ulp for m in (model, result.model)
        )
        assert before <= 16
        assert after <= 16
