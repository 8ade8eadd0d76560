"""The layer against the oracle, and against PyTorch's where that is installed."""

import copy
import pickle
import warnings
from functools import partial

import cases
import numpy as np
import pytest

from numbabn import BatchNorm, reference

LAYOUTS = {"NC": ((8, 5), 1), "NCHW": ((4, 5, 3, 2), 1), "NHWC": ((4, 3, 2, 5), -1)}
C = 5

layouts = pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)


def random_layer(dtype=np.float64, **options):
    """Give a layer no two of whose numbers are alike."""
    layer = BatchNorm(C, dtype=dtype, **options)
    for i, array in enumerate(arrays_of(layer).values()):
        array[...] = np.abs(cases.normal(C, seed=i)) + 0.5
    return layer


def arrays_of(layer):
    names = ("weight", "bias", "running_mean", "running_var")
    return {n: getattr(layer, n) for n in names if getattr(layer, n) is not None}


def snapshot(layer):
    """Everything that a failing call must leave as it was, bit for bit."""
    state = {name: (id(a), a.tobytes()) for name, a in arrays_of(layer).items()}
    others = ("num_batches_tracked", "training", "grad_weight", "grad_bias", "_pass")
    return state, [getattr(layer, name) for name in others]


def unchanged(layer, before):
    state, others = snapshot(layer)
    assert state == before[0]
    assert all(a is b for a, b in zip(others, before[1], strict=True))


def batch(shape, dtype=np.float64, seed=0):
    """Give x and dy."""
    return cases.normal(shape, dtype, seed=seed, offset=seed), cases.normal(
        shape, dtype, seed=seed + 100
    )


def close(got, expected, *, dtype, error, what=""):
    """Compare by error, relative to the largest value if that is above 1."""
    assert np.asarray(got).dtype == dtype
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(got, expected, rtol=0, atol=error * scale, err_msg=what)


class TestAgainstTheOracle:
    @layouts
    @cases.dtypes
    def test_training_then_eval(self, shape, axis, dtype, ulp):
        agree = partial(close, dtype=dtype, error=32 * ulp)
        layer = BatchNorm(C, eps=1e-3, momentum=0.3, axis=axis, dtype=dtype)
        for step in range(4):
            x, dy = batch(shape, dtype, seed=step)
            running = layer.running_mean.copy(), layer.running_var.copy()
            y, mean, invstd = reference.forward(x, layer.weight, layer.bias, eps=1e-3, axis=axis)
            agree(layer(x), y)
            moments = reference.statistics(x, axis=axis)
            running = reference.running_update(*running, *moments, momentum=0.3)
            agree(layer.running_mean, running[0])
            agree(layer.running_var, running[1])
            expected = reference.backward(dy, x, layer.weight, mean, invstd, axis=axis)
            agree(layer.backward(dy), expected[0])
            agree(layer.grad_weight, expected[1])
            agree(layer.grad_bias, expected[2])
            layer.weight -= dtype(0.1) * layer.grad_weight
            layer.bias -= dtype(0.1) * layer.grad_bias
        assert layer.num_batches_tracked == 4

        layer.eval()
        before = layer.state_dict()
        x, dy = batch(shape, dtype, seed=9)
        given = (layer.running_mean, layer.running_var)
        y = reference.inference(x, *given, layer.weight, layer.bias, eps=1e-3, axis=axis)
        agree(layer(x), y)
        invstd = 1 / np.sqrt(layer.running_var.astype(np.float64) + 1e-3)
        expected = reference.backward(
            dy, x, layer.weight, layer.running_mean, invstd, axis=axis, training=False
        )
        agree(layer.backward(dy), expected[0])
        agree(layer.grad_weight, expected[1])
        agree(layer.grad_bias, expected[2])
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(array, before[name])

    def test_forward_is_call(self):
        x, _ = batch((8, C))
        a, b = random_layer(), random_layer()
        np.testing.assert_array_equal(a(x), b.forward(x))
        np.testing.assert_array_equal(a.running_var, b.running_var)

    def test_backward_belongs_to_the_last_forward(self):
        """Whatever the mode is, and the running statistics are, by then."""
        layer = random_layer()
        (x, dy), (other, _) = batch((8, C)), batch((8, C), seed=1)
        for mode in (True, False):
            layer.train(mode)(x)
            expected = layer.backward(dy)
            layer.train(mode)(x)
            layer.train(not mode)
            layer.running_mean += 1
            layer.running_var += 1
            np.testing.assert_array_equal(layer.backward(dy), expected)
        layer.train()(other)
        assert not np.allclose(layer.backward(dy), expected)

    def test_cumulative_average(self):
        """Of all batches alike, whatever their size; empty ones have no share."""
        layer = BatchNorm(C, momentum=None, dtype=np.float64)
        given = [cases.normal((n, C), seed=n, offset=n) for n in (4, 0, 9, 2, 0, 31)]
        for x in given:
            layer(x)
        seen = [x for x in given if x.size]
        assert layer.num_batches_tracked == len(seen)
        np.testing.assert_allclose(
            layer.running_mean, np.mean([x.mean(axis=0) for x in seen], axis=0), rtol=1e-13
        )
        np.testing.assert_allclose(
            layer.running_var, np.mean([x.var(axis=0, ddof=1) for x in seen], axis=0), rtol=1e-13
        )

    @pytest.mark.parametrize("correction", [0, 0.5, 1])
    def test_correction_of_the_running_variance(self, correction):
        layer = BatchNorm(C, dtype=np.float64, correction=correction)
        x, _ = batch((8, C))
        layer(x)
        expected = reference.running_update(
            np.zeros(C), np.ones(C), *reference.statistics(x), correction=correction
        )
        np.testing.assert_allclose(layer.running_mean, expected[0], rtol=1e-13)
        np.testing.assert_allclose(layer.running_var, expected[1], rtol=1e-13)

    @pytest.mark.parametrize("training", [True, False])
    def test_without_weight_and_bias(self, training):
        layer, ones = (BatchNorm(C, affine=a, dtype=np.float64).train(training) for a in (0, 1))
        x, dy = batch((8, C))
        np.testing.assert_array_equal(layer(x), ones(x))
        np.testing.assert_array_equal(layer.backward(dy), ones.backward(dy))
        assert layer.weight is layer.bias is layer.grad_weight is layer.grad_bias is None
        assert list(layer.state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]

    @pytest.mark.parametrize("training", [True, False])
    def test_without_running_statistics(self, training):
        layer, tracking = (random_layer(track_running_stats=track) for track in (False, True))
        x, dy = batch((8, C))
        np.testing.assert_array_equal(layer.train(training)(x), tracking(x))
        np.testing.assert_array_equal(layer.backward(dy), tracking.backward(dy))
        assert layer.running_mean is layer.running_var is None
        assert layer.num_batches_tracked == 0
        assert list(layer.state_dict()) == ["weight", "bias"]

    def test_an_empty_batch(self):
        layer = random_layer()
        before = layer.state_dict()
        x = np.empty((0, C))
        assert layer(x).shape == layer.backward(x).shape == (0, C)
        np.testing.assert_array_equal([layer.grad_weight, layer.grad_bias], np.zeros((2, C)))
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(array, before[name])


class TestMode:
    def test_train_and_eval_return_the_layer(self):
        layer = BatchNorm(C)
        assert layer.training is True
        for switch, training in [
            (layer.eval, False),
            (layer.train, True),
            (lambda: layer.train(False), False),
            (lambda: layer.train(True), True),
        ]:
            assert switch() is layer
            assert layer.training is training

    def test_starts_as_pytorch_does(self):
        layer = BatchNorm(C)
        start = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
        for name, array in arrays_of(layer).items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, [start.pop(name)] * C)
        assert not start
        assert (layer.eps, layer.momentum, layer.num_batches_tracked) == (1e-5, 0.1, 0)
        assert layer.grad_weight is layer.grad_bias is None

    def test_repr(self):
        layer = BatchNorm(3, 1e-3, None, False, axis=-1, dtype=np.float64)
        assert repr(layer) == (
            "BatchNorm(3, eps=0.001, momentum=None, affine=False, track_running_stats=True, "
            "axis=-1, dtype=float64, correction=1)"
        )


class TestStateDict:
    def test_names_order_dtypes(self):
        state = random_layer(np.float32).state_dict()
        names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        assert list(state) == names
        assert [a.dtype for a in state.values()] == [np.float32] * 4 + [np.int64]
        assert [a.shape for a in state.values()] == [(C,)] * 4 + [()]

    def test_copies(self):
        layer = random_layer()
        before = snapshot(layer)
        for array in layer.state_dict().values():
            array[...] = 77
        unchanged(layer, before)
        state = random_layer().state_dict()
        layer.load_state_dict(state)
        before = snapshot(layer)
        for array in state.values():
            array[...] = 77
        unchanged(layer, before)

    @pytest.mark.parametrize("track", [True, False])
    @pytest.mark.parametrize("affine", [True, False])
    @pytest.mark.parametrize("momentum", [0.1, None])
    def test_round_trip_through_npz(self, tmp_path, momentum, affine, track):
        options = {"momentum": momentum, "affine": affine, "track_running_stats": track}
        layer = random_layer(**options)
        layer(batch((8, C))[0])
        np.savez(tmp_path / "layer.npz", **layer.state_dict())
        other = BatchNorm(C, dtype=np.float64, **options)
        with np.load(tmp_path / "layer.npz") as state:
            other.load_state_dict(state)
        # They go on alike: training, then eval.
        for each in (layer, other):
            each(batch((8, C), seed=1)[0])
        x, _ = batch((8, C), seed=2)
        np.testing.assert_array_equal(layer.eval()(x), other.eval()(x))
        assert layer.num_batches_tracked == other.num_batches_tracked == (2 if track else 0)

    def test_values_are_cast_in_place(self):
        layer, wide = random_layer(np.float32), random_layer()
        wide.weight[0] = 1e300  # beyond float32, without a warning
        arrays = arrays_of(layer)
        layer.load_state_dict(wide.state_dict())
        for name, array in arrays_of(layer).items():
            assert array is arrays[name]
            with np.errstate(over="ignore"):
                np.testing.assert_array_equal(array, getattr(wide, name).astype(np.float32))

    def test_own_arrays_under_other_names(self):
        layer, before = random_layer(), random_layer()
        layer.load_state_dict(layer.state_dict() | {"weight": layer.bias, "bias": layer.weight})
        np.testing.assert_array_equal(layer.weight, before.bias)
        np.testing.assert_array_equal(layer.bias, before.weight)

    def test_number_of_batches_may_be_missing(self):
        layer = random_layer()
        layer(batch((8, C))[0])
        state = random_layer().state_dict()
        del state["num_batches_tracked"]
        layer.load_state_dict(state)
        np.testing.assert_array_equal(layer.running_mean, state["running_mean"])
        assert layer.num_batches_tracked == 1

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"weight": None}, ValueError, r"state: expected \[.*'weight'\], got \['bias', "),
            ({"running_var": None}, ValueError, "state: expected .*'running_var'.*, got "),
            ({"gamma": np.ones(C)}, ValueError, "state: expected .*, got .*'gamma'"),
            ({"bias": np.ones(C + 1)}, ValueError, r"bias: expected shape \(5,\), got \(6,\)"),
            (
                {"running_var": np.ones((1, C))},
                ValueError,
                r"running_var: expected shape \(5,\), got \(1, 5\)",
            ),
            (
                {"running_var": np.ones(C, int)},
                TypeError,
                "running_var: expected float16, bfloat16, float32 or float64, got int64",
            ),
            (
                {"bias": np.ma.ones(C)},
                TypeError,
                "bias: expected an array on .*, got MaskedArray, ",
            ),
            (
                {"num_batches_tracked": np.float64(3)},
                TypeError,
                "num_batches_tracked: expected an integer, got float64",
            ),
            (
                {"num_batches_tracked": np.array([3])},
                ValueError,
                r"num_batches_tracked: expected one number, 0 or more, got \[3\]",
            ),
            (
                {"num_batches_tracked": -1},
                ValueError,
                "num_batches_tracked: expected one number, 0 or more, got -1",
            ),
        ],
    )
    def test_errors_leave_the_layer(self, change, error, message):
        layer = random_layer()
        before = snapshot(layer)
        state = {name: array + 1 for name, array in layer.state_dict().items()} | change
        state = {name: array for name, array in state.items() if array is not None}
        with pytest.raises(error, match=message):
            layer.load_state_dict(state)
        unchanged(layer, before)

    def test_no_mapping(self):
        with pytest.raises(TypeError, match="state: expected a mapping, got list"):
            BatchNorm(C).load_state_dict([np.ones(C)])

    @pytest.mark.parametrize(
        ("options", "extra"),
        [
            ({"affine": False}, "weight"),
            ({"track_running_stats": False}, "running_mean"),
            ({"track_running_stats": False}, "num_batches_tracked"),
        ],
    )
    def test_what_the_layer_lacks_is_refused(self, options, extra):
        layer = random_layer(**options)
        state = layer.state_dict() | {extra: random_layer().state_dict()[extra]}
        with pytest.raises(ValueError, match=f"state: expected .*, got .*'{extra}'"):
            layer.load_state_dict(state)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"num_features": 0}, ValueError, "num_features: expected 1 or more, got 0"),
            ({"num_features": -2}, ValueError, "num_features: expected 1 or more, got -2"),
            ({"num_features": 3.0}, TypeError, "num_features: expected an integer, got float"),
            ({"num_features": "3"}, TypeError, "num_features: expected an integer, got str"),
            ({"eps": -1e-5}, ValueError, "eps: expected 0 or more, got -1e-05"),
            ({"eps": np.nan}, ValueError, "eps: expected a finite number, got nan"),
            ({"eps": None}, TypeError, "eps: expected a real number, got NoneType"),
            ({"momentum": np.inf}, ValueError, "momentum: expected a finite number, got inf"),
            ({"momentum": "no"}, TypeError, "momentum: expected a real number, got str"),
            ({"momentum": True}, TypeError, "momentum: expected a real number, got bool"),
            ({"correction": "1"}, TypeError, "correction: expected a real number, got str"),
            ({"affine": "no"}, TypeError, "affine: expected True or False, got 'no'"),
            ({"track_running_stats": None}, TypeError, "track_running_stats: expected True or"),
            (
                {"dtype": np.int64},
                TypeError,
                "dtype: expected float16, bfloat16, float32 or float64, got int64",
            ),
            ({"dtype": ">f4"}, TypeError, r"dtype: expected .*float32 or .* \(byte-swapped\)"),
        ],
    )
    def test_constructor(self, arguments, error, message):
        with pytest.raises(error, match=f"^{message}"):
            BatchNorm(**{"num_features": C} | arguments)

    def test_mode(self):
        layer = BatchNorm(C)
        with pytest.raises(TypeError, match="mode: expected True or False, got 'eval'"):
            layer.train("eval")
        assert layer.training is True

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("x", "error", "message"),
        [
            (
                np.ones((8, C + 1)),
                ValueError,
                r"x: expected 5 channels along axis 1, got shape \(8, 6\)",
            ),
            (np.ones((8, C), np.float32), TypeError, "x: expected float64, got float32"),
            (
                np.ones((8, C), int),
                TypeError,
                "x: expected float16, bfloat16, float32 or float64, got int64",
            ),
            (np.ones(C), ValueError, "x: expected 2 or more dimensions"),
            ([[1.0] * C] * 8, TypeError, "x: expected an array on the CPU or a CUDA device"),
        ],
    )
    def test_a_failing_forward_leaves_the_layer(self, x, error, message, training):
        layer = random_layer().train(training)
        good, dy = batch((8, C))
        layer(good)
        dx = layer.backward(dy)
        before = snapshot(layer)
        with pytest.raises(error, match=message):
            layer(x)
        unchanged(layer, before)
        np.testing.assert_array_equal(layer.backward(dy), dx)

    @pytest.mark.parametrize("training", [True, False])
    def test_a_copy_is_without_the_last_batch(self, training):
        layer = random_layer().train(training)
        x, dy = batch((8, C))
        layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            with pytest.raises(RuntimeError, match="expected a forward pass before it, got none"):
                twin.backward(dy)
            np.testing.assert_array_equal(twin(x), layer(x))
            np.testing.assert_array_equal(twin.backward(dy), layer.backward(dy))

    def test_one_value_per_channel(self):
        x = np.ones((1, C))
        layer = random_layer()
        before = snapshot(layer)
        with pytest.raises(ValueError, match="x: expected more than one value per channel"):
            layer(x)
        unchanged(layer, before)
        assert layer.eval()(x).shape == x.shape
        with pytest.raises(ValueError, match="x: expected more than one value per channel"):
            random_layer(track_running_stats=False).eval()(x)

    def test_a_failing_backward_leaves_the_layer(self):
        layer = random_layer()
        x, dy = batch((8, C))
        layer(x)
        layer.backward(dy)
        before = snapshot(layer)
        with pytest.raises(
            ValueError, match=r"dy: expected the shape of x, \(8, 5\), got \(7, 5\)"
        ):
            layer.backward(dy[1:])
        with pytest.raises(TypeError, match="dy: expected float64, got float32"):
            layer.backward(dy.astype(np.float32))
        unchanged(layer, before)

    def test_backward_before_forward(self):
        for layer in (BatchNorm(C), BatchNorm(C).eval()):
            with pytest.raises(RuntimeError, match="backward: expected a forward pass before it"):
                layer.backward(np.ones((8, C), np.float32))


@pytest.fixture(scope="module")
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what importing it says is not ours to mend
        return pytest.importorskip("torch")


class TestAgainstPyTorch:
    STEPS = 20

    @pytest.mark.parametrize(
        ("kind", "shape"),
        [
            ("BatchNorm1d", (8, C)),
            ("BatchNorm1d", (6, C, 7)),
            ("BatchNorm2d", (4, C, 3, 4)),
            ("BatchNorm3d", (3, C, 2, 3, 4)),
        ],
        ids=["NC", "NCL", "NCHW", "NCDHW"],
    )
    @pytest.mark.parametrize("momentum", [0.1, None])
    @pytest.mark.parametrize(("dtype", "error"), [(np.float32, 1e-5), (np.float64, 1e-13)])
    def test_agree(self, torch, kind, shape, momentum, dtype, error):
        """Outputs, gradients and state stay alike; midway each goes on from the other's state."""

        def ours_from(theirs):
            layer = BatchNorm(C, momentum=momentum, dtype=dtype)
            layer.load_state_dict(theirs.state_dict())
            return layer

        def theirs_from(ours):
            layer = new(C, momentum=momentum, dtype=getattr(torch, np.dtype(dtype).name))
            layer.load_state_dict({name: torch.tensor(a) for name, a in ours.state_dict().items()})
            return layer

        def agree(what, got, expected):
            expected = expected.detach().numpy()
            close(got, expected, dtype=expected.dtype, error=error, what=what)

        def compare(x, dy):
            leaf = torch.tensor(x, requires_grad=True)
            y = theirs(leaf)
            agree("y", ours(x), y)
            y.backward(torch.tensor(dy))
            agree("dx", ours.backward(dy), leaf.grad)
            agree("dweight", ours.grad_weight, theirs.weight.grad)
            agree("dbias", ours.grad_bias, theirs.bias.grad)
            state = theirs.state_dict()
            assert list(ours.state_dict()) == list(state)
            for name, array in ours.state_dict().items():
                agree(name, array, state[name])

        new = getattr(torch.nn, kind)
        ours = random_layer(dtype, momentum=momentum)
        theirs = theirs_from(ours)
        ours = ours_from(theirs)
        for step in range(self.STEPS):
            if step == self.STEPS // 2:
                ours, theirs = ours_from(theirs), theirs_from(ours)
            compare(*batch(shape, dtype, seed=step))
            for name in ("weight", "bias"):
                parameter = getattr(theirs, name)
                with torch.no_grad():
                    parameter -= 0.01 * parameter.grad
                parameter.grad = None
                array = getattr(ours, name)
                array -= dtype(0.01) * getattr(ours, f"grad_{name}")
        assert ours.num_batches_tracked == self.STEPS
        ours.eval()
        theirs.eval()
        compare(*batch(shape, dtype, seed=self.STEPS))
