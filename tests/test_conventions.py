"""Weights and settings across libraries: names, both ways, and training that goes on as there."""

import cases
import numpy as np
import pytest

from numbabn import BatchNorm, reference
from numbabn.conventions import (
    CONVENTIONS,
    settings_from,
    settings_to,
    state_dict_from,
    state_dict_to,
)

C = 5
libraries = pytest.mark.parametrize("library", CONVENTIONS)


def layer_of_odds(**options):
    """Give a layer no two of whose numbers are alike."""
    layer = BatchNorm(C, dtype=np.float64, **options)
    for i, name in enumerate(("weight", "bias", "running_mean", "running_var")):
        getattr(layer, name)[...] = np.abs(cases.normal(C, seed=i)) + 0.5
    layer.num_batches_tracked = 7
    return layer


# As each library hands its weights out.
KEPT = {
    "pytorch": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "keras": ["gamma", "beta", "moving_mean", "moving_variance"],
    "tensorflow": ["gamma", "beta", "moving_mean", "moving_variance"],
    "flax": ["params", "batch_stats"],
    "onnx": ["scale", "B", "input_mean", "input_var"],
}


class TestStateDict:
    @libraries
    def test_there_and_back(self, library):
        layer = layer_of_odds()
        theirs = state_dict_to(library, layer.state_dict())
        assert list(theirs) == KEPT[library]
        other = BatchNorm(C, dtype=np.float64)
        other.load_state_dict(state_dict_from(library, theirs))
        for name in ("weight", "bias", "running_mean", "running_var"):
            np.testing.assert_array_equal(getattr(other, name), getattr(layer, name))
        assert other.num_batches_tracked == (7 if library == "pytorch" else 0)

    def test_flax_keeps_two_collections(self):
        layer = layer_of_odds()
        variables = state_dict_to("flax", layer.state_dict())
        assert {k: list(v) for k, v in variables.items()} == {
            "params": ["scale", "bias"],
            "batch_stats": ["mean", "var"],
        }
        np.testing.assert_array_equal(variables["params"]["scale"], layer.weight)
        np.testing.assert_array_equal(variables["batch_stats"]["var"], layer.running_var)

    @pytest.mark.parametrize(
        ("library", "pattern"),
        [
            ("keras", "{}"),
            ("tensorflow", "batch_normalization_1/{}:0"),
            ("flax", "BatchNorm_0/{}"),
            ("flax", "net.BatchNorm_0.{}"),
            ("pytorch", "layer1.0.bn1.{}"),
            ("onnx", "{}"),
        ],
    )
    def test_names_may_have_paths(self, library, pattern):
        names = [path.rpartition("/")[2] for path in CONVENTIONS[library].names.values()]
        values = [np.arange(C) + i / 2 for i in range(4)]
        weights = {pattern.format(n): a for n, a in zip(names, values, strict=False)}
        state = state_dict_from(library, weights)
        assert list(state) == ["weight", "bias", "running_mean", "running_var"]
        for array, value in zip(state.values(), values, strict=True):
            np.testing.assert_array_equal(array, value)
            assert not np.shares_memory(array, value)

    def test_flax_keeps_layers_within_its_collections(self):
        variables = state_dict_to("flax", layer_of_odds().state_dict())
        network = {group: {"BatchNorm_0": arrays} for group, arrays in variables.items()}
        state = state_dict_from("flax", network)
        for name, array in state_dict_from("flax", variables).items():
            np.testing.assert_array_equal(state[name], array)

    @libraries
    def test_paths_on_the_way_back(self, library):
        state = layer_of_odds().state_dict()
        expected = state_dict_to(library, state)
        there = state_dict_to(library, {f"layer1.bn1.{name}": a for name, a in state.items()})
        assert repr(there) == repr(expected)
        with pytest.raises(ValueError, match=r"state: expected one layer's names, got \['bn1.weig"):
            state_dict_to(library, {"bn1.weight": np.ones(C), "bn2.bias": np.ones(C)})

    @pytest.mark.parametrize("library", ["keras", "flax", "onnx"])
    def test_scale_or_shift_alone(self, library):
        names = {own: path.rpartition("/")[2] for own, path in CONVENTIONS[library].names.items()}
        running = {names["running_mean"]: np.ones(C), names["running_var"]: np.ones(C)}
        given = np.full(C, 3, np.float32)
        scaled = state_dict_from(library, {names["weight"]: given} | running)
        np.testing.assert_array_equal(scaled["weight"], given)
        np.testing.assert_array_equal(scaled["bias"], np.zeros(C))
        shifted = state_dict_from(library, {names["bias"]: given} | running)
        np.testing.assert_array_equal(shifted["weight"], np.ones(C))
        assert shifted["weight"].dtype == np.float32
        neither = state_dict_from(library, running)
        BatchNorm(C, affine=False).load_state_dict(neither)
        untracked = state_dict_from(library, {names["weight"]: given})
        BatchNorm(C, track_running_stats=False).load_state_dict(untracked)

    def test_torch_tensors(self):
        torch = pytest.importorskip("torch")
        module = torch.nn.BatchNorm1d(C)
        module(torch.randn(8, C))
        layer = BatchNorm(C)
        parameters = {name: array.bfloat16() for name, array in module.named_parameters()}
        layer.load_state_dict(state_dict_from("pytorch", module.state_dict() | parameters))
        assert layer.num_batches_tracked == 1
        np.testing.assert_array_equal(layer.running_mean, module.running_mean.numpy())
        back = state_dict_to("pytorch", layer.state_dict())
        module.load_state_dict({name: torch.as_tensor(a) for name, a in back.items()})

    @pytest.mark.parametrize(
        ("library", "weights", "error", "message"),
        [
            ([], {}, TypeError, "library: expected a string, got list"),
            ("caffe", {}, ValueError, r"library: expected one of \['pytorch', .*, got 'caffe'"),
            ("keras", [], TypeError, "weights: expected a mapping, got list"),
            ("keras", {"weight": np.ones(C)}, ValueError, "weights: expected .*'gamma'.*'weight'"),
            (
                "keras",
                {"a/gamma": np.ones(C), "b/gamma": np.ones(C)},
                ValueError,
                "weights: expected each of .* once, got 'b/gamma'",
            ),
            (
                "pytorch",
                {"0.weight": np.ones(C), "0.bias": np.ones(C), "1.running_mean": np.ones(C)},
                ValueError,
                r"weights: expected one layer's names, got \['0.weight', '1.running_mean'\]",
            ),
            (
                "flax",
                {"params": {"a": {"scale": np.ones(C)}}, "batch_stats": {"b": {"var": np.ones(C)}}},
                ValueError,
                "weights: expected one layer's names, got .*'params/a/scale', 'batch_stats/b/var'",
            ),
            (
                "flax",
                {"batch_stats": {"mean": np.ones(C)}},
                ValueError,
                "weights: expected both running statistics or none",
            ),
            (
                "onnx",
                {"scale": np.ones(C), "B": np.ones(C + 1)},
                ValueError,
                r"B: expected shape \(5,\), got \(6,\)",
            ),
            ("keras", {"a/beta": np.ma.ones(C)}, TypeError, "a/beta: .*, got MaskedArray, whose"),
            ("onnx", {"scale": np.ones((1, C))}, ValueError, "scale: expected shape"),
            ("onnx", {"B": np.ones(C, int)}, TypeError, "B: expected .*float64, got int64"),
        ],
    )
    def test_errors(self, library, weights, error, message):
        with pytest.raises(error, match=message):
            state_dict_from(library, weights)

    def test_errors_of_the_way_back(self):
        with pytest.raises(ValueError, match=r"state: expected each of .* once, got 'gamma'"):
            state_dict_to("flax", {"gamma": np.ones(C)})
        with pytest.raises(TypeError, match="state: expected a mapping, got list"):
            state_dict_to("flax", [])


class TestSettings:
    @libraries
    def test_defaults_are_the_librarys(self, library):
        layer = BatchNorm(C, **settings_from(library))
        momentum, eps = {
            "pytorch": (0.1, 1e-5),
            "keras": (0.01, 1e-3),
            "tensorflow": (0.01, 1e-3),
            "flax": (0.01, 1e-5),
            "onnx": (0.1, 1e-5),
        }[library]
        assert (layer.momentum, layer.eps) == (momentum, eps)
        assert layer.correction == (library in ("pytorch", "tensorflow"))
        assert layer.axis == (1 if library in ("pytorch", "onnx") else -1)

    @libraries
    @pytest.mark.parametrize("momentum", [0.1, 0.9, 0.99, 0.997, 1e-3, 0.0, 1.0])
    def test_there_and_back(self, library, momentum):
        theirs = {"momentum": momentum, CONVENTIONS[library].epsilon: 2e-5}
        ours = settings_from(library, theirs)
        assert ours["momentum"] == (momentum if library == "pytorch" else round(1 - momentum, 9))
        assert settings_to(library, {k: ours[k] for k in ("momentum", "eps")}) == theirs

    def test_pytorch_has_a_cumulative_average(self):
        assert settings_from("pytorch", {"momentum": None})["momentum"] is None
        assert settings_to("pytorch", {"momentum": None}) == {"momentum": None}
        for library in ("keras", "flax", "onnx"):
            with pytest.raises(TypeError, match="momentum: expected a real number, got NoneType"):
                settings_to(library, {"momentum": None})

    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"eps": 1e-3}, ValueError, r"settings: expected some of .*'epsilon'\], got \['eps'\]"),
            ({"momentum": "0.9"}, TypeError, "momentum: expected a real number, got str"),
            ({"epsilon": -1}, ValueError, "eps: expected 0 or more, got -1"),
            (0.9, TypeError, "settings: expected a mapping, got float"),
        ],
    )
    def test_errors(self, settings, error, message):
        with pytest.raises(error, match=message):
            settings_from("keras", settings)


@libraries
def test_training_goes_on_as_there(library):
    """By each library's own formula for its running statistics, written out."""
    convention = CONVENTIONS[library]
    layer = layer_of_odds(**settings_from(library))
    mean, var = layer.running_mean.copy(), layer.running_var.copy()
    shape = (6, C, 3) if convention.axis == 1 else (6, 3, C)
    for step in range(3):
        x = cases.normal(shape, seed=20 + step, offset=step)
        layer(x)
        count, batch_mean, m2 = reference.statistics(x, axis=convention.axis)
        batch_var = m2 / (count - convention.correction)
        m = convention.momentum
        old, new = (m, 1 - m) if convention.momentum_of == "old" else (1 - m, m)
        mean, var = old * mean + new * batch_mean, old * var + new * batch_var
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-13)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-13)


class TestAgainstTheLibrary:
    """A step of training and one of inference in the library itself, where it is installed."""

    x = cases.normal((6, 4, 4, C), np.float32, offset=0.5)

    def agrees(self, library, weights, y, running, **settings):
        """Compare y in inference, and running statistics after a step of training."""
        layer = BatchNorm(C, **settings_from(library, settings))
        layer.load_state_dict(state_dict_from(library, weights))
        np.testing.assert_allclose(layer.eval()(self.x), y, rtol=1e-5, atol=1e-5)
        layer.train()(self.x)
        mean, var = running
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-5)

    def test_flax(self):
        nn = pytest.importorskip("flax.linen")
        module = nn.BatchNorm(momentum=0.9)
        variables = state_dict_to("flax", layer_of_odds().state_dict())
        variables = {
            group: {name: a.astype(np.float32) for name, a in arrays.items()}
            for group, arrays in variables.items()
        }
        y = module.apply(variables, self.x, use_running_average=True)
        _, changed = module.apply(
            variables, self.x, use_running_average=False, mutable=["batch_stats"]
        )
        running = [changed["batch_stats"][name] for name in ("mean", "var")]
        self.agrees("flax", variables, y, running, momentum=0.9)

    def test_keras(self):
        keras = pytest.importorskip("keras")
        module = keras.layers.BatchNormalization(momentum=0.9)
        module.build(self.x.shape)
        module.set_weights(list(state_dict_to("keras", layer_of_odds().state_dict()).values()))
        weights = {variable.path: np.asarray(variable) for variable in module.weights}
        y = np.asarray(module(self.x, training=False))
        module(self.x, training=True)
        running = [np.asarray(v) for v in (module.moving_mean, module.moving_variance)]
        self.agrees("keras", weights, y, running, momentum=0.9)
