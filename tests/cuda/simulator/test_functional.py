"""The public functions on CUDA arrays against the oracle: the real kernels, simulated."""

import os

import cases
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problem import (
    CONSTANTS,
    Problem,
    arrays,
    check_any_array,
    check_broadcast,
    check_constant,
    check_correction,
    check_empty,
    check_every_sixteen_bit_number,
    check_float32_statistics,
    check_gradient_offsets,
    check_in_place,
    check_inference,
    check_not_finite,
    check_offset,
    check_out_of_any_strides,
    check_outlier,
    check_relu_lets_nan_through,
    check_scale,
    check_sixteen_bits_beside_float32,
    check_statistics,
    check_strides,
    check_training,
)
from problem import (
    SIMULATED as ON,
)

import numbabn
import numbabn.cuda
from numbabn.backends import borrow
from numbabn.cuda import formats, schedule, simulation, simulator, sweep
from numbabn.layout import arrange

DTYPES = cases.TOLERANCES | cases.NARROW
# In the place of shapes that take a simulator too long: fewer channels, and in the large ones, too,
# fewer places, which small blocks still cut into as many kinds of pieces and groups.
SMALLER = {
    "NC N=2": ((2, 100), 1),
    "NC narrow": ((200, 3), -1),
    "NC several pieces": ((131, 19), 1),
    "NC wide": ((53, 72), 1),
    "NCHW short, large": ((33, 2, 7, 7), 1),
    "CN": ((3, 301), 0),
    "NCHW short": ((11, 3, 7, 7), 1),
    "NCHW fused": ((2, 2, 23, 23), 1),
    "NCHW fused, large": ((2, 1, 31, 37), 1),
    "NCHW tiles": ((2, 1, 56, 64), 1),
    "NCHW N=1": ((1, 2, 23, 29), 1),
    "NHWC": ((3, 2, 7, 33), -1),
    "NHWC large": ((3, 7, 5, 17), -1),
}
# Of no interest but to accesses of several numbers.
FURTHER = {
    "NC aligned": ((17, 16), 1),
    "NCHW short, aligned": ((50, 2, 8, 8), 1),
    "NCL aligned": ((3, 2, 24), 1),
    "NCHW tiny": ((2, 19, 3, 4), 1),
    "NCHW aligned, several turns": ((12, 2, 24, 24), 1),
    "NCHW of one channel": ((3, 1, 41, 41), 1),
    "NC aligned, several turns": ((400, 40), 1),
    "NCHW bundled": ((3, 16, 7, 7), 1),
    "NCHW bundled, several pieces": ((13, 16, 7, 7), 1),
    "NCHW bundled, swept": ((40, 8, 5, 5), 1),
}
SHAPES = cases.SHAPES | SMALLER | FURTHER
TRAINING = {
    f"{shape}, {option}, {name}": (*SHAPES[shape], *options, *tolerance)
    for name, tolerance in DTYPES.items()
    for shape in SHAPES
    for option, options in (("plain", (False, None)), ("residual, relu", (True, "relu")))
}

shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize(("dtype", "ulp"), DTYPES.values(), ids=DTYPES)


@pytest.mark.parametrize(
    ("shape", "axis", "with_residual", "activation", "dtype", "ulp"),
    TRAINING.values(),
    ids=TRAINING,
)
def test_training(shape, axis, with_residual, activation, dtype, ulp):
    options = {"with_residual": with_residual, "activation": activation}
    check_training(Problem(shape, axis, dtype, ulp, **options, on=ON))


@shapes
@dtypes
def test_inference(shape, axis, dtype, ulp):
    options = {"with_residual": True, "activation": "relu"}
    check_inference(Problem(shape, axis, dtype, ulp, **options, on=ON))


@shapes
@dtypes
def test_statistics(shape, axis, dtype, ulp):
    check_statistics(shape, axis, dtype, ON)


def described(array, axis, arrays=1):
    (x,) = borrow(None, x=ON.put(array))
    layout = arrange(numbabn.cuda, axis, [x], [x])
    return numbabn.cuda._Call(layout, layout.views, None, arrays)


@pytest.mark.parametrize("arrays_held", [1, 2], ids=["forward", "backward"])
@dtypes
def test_the_shapes_cross_every_border(dtype, ulp, arrays_held):
    found = {"planes": [], "rows": [], "short": []}
    for shape, axis in SHAPES.values():
        call = described(np.zeros(shape, dtype), axis, arrays_held)
        found[call.view].append((call.width, call.shape))
    lanes = formats.FORMATS[np.dtype(dtype).name].lanes
    short = [s for _, s in found.pop("short")]
    assert any(s.pieces == 1 for s in short)
    assert any(s.pieces > 1 and schedule.is_held(s, simulation.RUNNING) for s in short)
    assert any(s.N % s.planes for s in short)
    assert any(s.rounds > 4 for s in short)
    assert any(s.below > 1 and formats.THREADS % s.side for s in short)
    for view, shapes in found.items():
        assert {1, lanes} <= {width for width, _ in shapes}
        for width in (1, lanes):
            own = [s for w, s in shapes if w == width]
            assert any(s.pieces == 1 for s in own)
            assert any(s.pieces > 1 and schedule.is_held(s, simulation.RUNNING) for s in own)
            assert any(s.rounds > 4 for s in own)  # more than one step of a loop
            assert any(s.S % s.places or s.N % s.planes for s in own if s.pieces > 1)
            if view == "planes":
                assert any(s.per_plane > 1 for s in own)
                assert any(1 < s.planes < s.N for s in own)
            else:
                assert any(s.C % (width << s.across) for s in own if s.groups > 1)
        every = [s for _, s in shapes]
        assert any(not schedule.is_held(s, simulation.RUNNING) for s in every)
        if view == "planes":
            assert {1 << s.crew for s in every} == {formats.WARP, formats.THREADS}
            assert any(s.C * (1 << s.crew) % formats.THREADS for s in every)


@cases.memory
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_any_strides(lay, axis):
    options = {"with_residual": True, "activation": "relu", "on": ON}
    check_strides(Problem((3, 5, 4, 6), axis, np.float32, 2**-23, **options), lay)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64"])
@cases.memory
def test_operands_may_lie_in_different_ways(lay, name):
    options = {"with_residual": True, "activation": "relu", "on": ON}
    check_out_of_any_strides(Problem((5, 4, 5, 8), 1, *DTYPES[name], **options), lay)


def test_broadcast_input():
    check_broadcast(Problem((5, 4, 5, 6), 1, np.float64, 2**-48, on=ON))


@dtypes
@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 2, 5, 3), 1), ((2, 2, 23, 23), 1), ((60, 7), 1), ((60, 24), 1)]
)
def test_in_place(shape, axis, dtype, ulp):
    options = {"with_residual": True, "activation": "relu", "on": ON}
    check_in_place(Problem(shape, axis, dtype, ulp, **options))


@shapes
@pytest.mark.parametrize("offset", [0, 1e3, 1e6])
def test_float32_is_exact_at_any_offset(shape, axis, offset):
    check_offset(shape, axis, offset, ON)


@shapes
@pytest.mark.parametrize(("x_offset", "dy_offset"), [(1e6, 0), (0, 1e4), (1e4, 1e2)])
def test_float32_gradients_are_exact_at_any_offset(shape, axis, x_offset, dy_offset):
    check_gradient_offsets(shape, axis, x_offset, dy_offset, ON)


@shapes
@pytest.mark.parametrize("constant", [*CONSTANTS, 1e20])
def test_a_constant_channel_gives_exactly_bias(shape, axis, constant):
    check_constant(shape, axis, np.float32, constant, ON)


@pytest.mark.parametrize("constant", [0.0, -3.75, 2.0**-14, 2.0**15])
@pytest.mark.parametrize("shape", [(3, 4, 7), (2, 3, 24, 25), (131, 8)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_a_constant_channel_in_other_formats(shape, dtype, constant):
    check_constant(shape, 1, dtype, constant, ON)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30, 5e37])
@pytest.mark.parametrize("shape", [(9, 2, 12, 12), (131, 5)])
def test_squares_neither_overflow_nor_underflow(shape, scale, dtype):
    tolerance = {"atol": 2**-6} if dtype == ml_dtypes.bfloat16 else {}
    check_scale(shape, scale, dtype, ON, **tolerance)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((17, 24), 1), ((19, 5, 5, 40), -1), ((2, 19, 3, 4), 1), ((13, 16, 7, 7), 1)],
)
def test_what_lies_beyond_the_last_channel_is_not_summed_again(monkeypatch, shape, axis):
    monkeypatch.setattr(simulation, "RUNNING", 1000)
    loaded = []
    load = simulator.load
    monkeypatch.setattr(
        sweep, "load", lambda x, index, policy: (loaded.append(x.width), load(x, index, policy))[1]
    )
    x = cases.normal(shape, np.float16)
    ON.call(numbabn.batch_norm_forward, x, axis=axis)
    assert sum(loaded) == x.size


def test_channels_of_any_scale_beside_each_other():
    # One group of rows sums each of its columns as often as that one wants.
    scales = np.array([1e-30, 1.0, 1e30, 1e-25, 1e25], np.float32)
    x = cases.normal((131, 5), np.float32) * scales
    y = ON.call(numbabn.batch_norm, x, training=True, eps=0.0)
    np.testing.assert_allclose(y, numbabn.reference.forward(x, eps=0.0)[0], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("dtype", "outlier"), [(np.float64, 1e6), (np.float32, 1e4)])
@pytest.mark.parametrize("shape", [(3, 2, 20, 20), (200, 3)])
def test_an_outlier_in_front_spoils_nothing(shape, dtype, outlier):
    check_outlier(shape, dtype, outlier, ON)


@shapes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_channel(shape, axis, bad):
    check_not_finite(shape, axis, bad, on=ON)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(2, 2, 23, 23), (131, 8)])
def test_nan_and_infinity_in_front(shape, bad):
    x = cases.normal(shape, np.float32)
    x[0].reshape(shape[1], -1)[0, 0] = bad
    result = ON.call(numbabn.batch_norm_forward, x)
    expected, mean, _ = numbabn.reference.forward(x)
    np.testing.assert_allclose(result.y, expected, atol=4e-6)
    np.testing.assert_allclose(result.mean, mean, rtol=1e-13, atol=1e-7)


def test_relu_lets_nan_through():
    check_relu_lets_nan_through(ON)


@cases.narrow_dtypes
@pytest.mark.parametrize("scale", [1.0, 1.00390625, 0.7, 3e-5, 1e4])
def test_sixteen_bit_numbers_are_read_and_rounded_right(dtype, ulp, scale):
    check_every_sixteen_bit_number(dtype, scale, every=29, on=ON)


@cases.narrow_dtypes
@pytest.mark.parametrize("shape", [(9, 5, 13), (2, 3, 23, 23), (50, 7)])
def test_sixteen_bits_beside_float32_parameters(shape, dtype, ulp):
    check_sixteen_bits_beside_float32(shape, dtype, ulp, ON)


@pytest.mark.parametrize("correction", [0, 1, 0.5])
def test_correction_is_the_running_variances_alone(correction):
    check_correction(correction, ON)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (5, 3, 0)])
def test_empty_batch(shape, dtype):
    check_empty(shape, dtype, ON)


def test_saved_statistics_may_be_float32():
    check_float32_statistics(Problem((9, 4, 5), 1, np.float32, 2**-23, on=ON))


def test_per_channel_arrays_of_any_strides():
    p = Problem((9, 4, 5), 1, np.float32, 2**-23, on=ON)
    expected = ON.call(numbabn.batch_norm_forward, p.x, p.weight, p.bias)
    p.weight, p.bias = np.repeat(p.weight, 2)[::2], np.repeat(p.bias[::-1], 3)[::-3]
    check_training(p)
    got = ON.call(numbabn.batch_norm_forward, p.x, p.weight, p.bias)
    np.testing.assert_array_equal(got.y, expected.y)


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(arrays(most_axes=4, most=5), st.integers(0, 2**31))
def test_any_shape_axis_order_and_step(array, seed):
    check_any_array(array, seed, ON)


def everything(shape, axis, dtype, ulp):
    """Give the bytes of every result of a forward and a backward pass, in place of close ones."""
    p = Problem(shape, axis, dtype, ulp, with_residual=True, activation="relu")
    result = ON.call(numbabn.batch_norm_forward, p.x, p.weight, p.bias, **p.keywords)
    gradients = ON.call(
        numbabn.batch_norm_backward, p.dy, p.x, p.weight, result.mean, result.invstd,
        axis=axis, mask=result.mask, with_residual=True,
    )  # fmt: skip
    y = ON.call(numbabn.batch_norm_inference, p.x, p.running_mean, p.running_var, axis=axis)
    stats = numbabn.batch_stats(ON.put(p.x), axis=axis)
    arrays = (*result, *gradients, y, ON.get(stats.mean), ON.get(stats.m2))
    return [array.tobytes() for array in arrays]


class TestSameBits:
    @dtypes
    @pytest.mark.parametrize(
        ("shape", "axis"),
        [((2, 2, 23, 23), 1), ((53, 19), 1), ((131, 24), 1), ((5, 7, 9), 1), ((7, 1, 29, 29), 1)],
    )
    def test_whatever_the_blocks_and_their_order(self, monkeypatch, shape, axis, dtype, ulp):
        expected = everything(shape, axis, dtype, ulp)
        assert everything(shape, axis, dtype, ulp) == expected
        for running, most, order in (
            (1000, 1000, lambda blocks: np.random.default_rng(0).permutation(blocks)),
            (5, 3, lambda blocks: reversed(range(blocks))),
            (0, 1, range),
        ):
            monkeypatch.setattr(simulation, "RUNNING", running)
            monkeypatch.setattr(simulation, "MOST_BLOCKS", max(most, running))
            monkeypatch.setattr(simulator, "order", order)
            assert everything(shape, axis, dtype, ulp) == expected

    @dtypes
    @pytest.mark.parametrize(
        ("shape", "axis"),
        [
            ((2, 3, 12, 25), 1),
            ((5, 37), 1),
            ((9, 5, 13), 1),
            ((17, 16), 1),
            ((131, 24), 1),
            ((40, 8, 5, 5), 1),
            ((7, 1, 29, 29), 1),
        ],
    )
    def test_held_and_swept_twice(self, monkeypatch, shape, axis, dtype, ulp):
        launched = set()
        launch = simulation.launch

        def noting(place, kernel, view, *args, **options):
            launched.add(f"{kernel} {view}" if view == "channels" else kernel)
            launch(place, kernel, view, *args, **options)

        monkeypatch.setattr(simulation, "launch", noting)
        monkeypatch.setattr(simulation, "RUNNING", 1000)
        expected = everything(shape, axis, dtype, ulp)
        assert {"forward", "backward", "normalize", "statistics"} <= launched
        assert launched <= {
            "forward", "backward", "normalize", "statistics", "statistics channels"
        }  # fmt: skip
        monkeypatch.setattr(simulation, "RUNNING", 0)
        assert everything(shape, axis, dtype, ulp) == expected
        assert {"products", "gradient"} < launched


class TestStatistics:
    def test_update_needs_arithmetic_and_else_writes_nothing(self):
        stats = numbabn.batch_stats(ON.put(cases.normal((4, 3))))
        running = [np.full(3, 2.0), np.full(3, 5.0)]
        with pytest.raises(TypeError, match="expected an array of a library with arithmetic"):
            numbabn.update_running_stats(*map(ON.put, running), stats)
        np.testing.assert_array_equal(running, [[2] * 3, [5] * 3])

    def test_merged_on_the_host(self):
        x = cases.normal((70, 3))
        parts = [numbabn.batch_stats(ON.put(part)) for part in (x[:31], x[31:])]
        a, b = (
            numbabn.BatchStats(part.count, ON.get(part.mean), ON.get(part.m2)) for part in parts
        )
        count, mean, m2 = numbabn.reference.statistics(x)
        merged = a + b
        assert merged.count == count
        np.testing.assert_allclose(merged.mean, mean, atol=1e-14)
        np.testing.assert_allclose(merged.m2, m2, rtol=1e-13)


WRONG = {
    "running_var": np.ones(4, np.float32),
    "weight": np.ones(3, np.float64),
    "residual": np.ones((6, 3, 4), np.float32),
    "out": np.ones((6, 3, 5), np.float64),
    "momentum": "0.1",
    "eps": -1.0,
    "activation": "gelu",
}


class TestErrors:
    @pytest.mark.parametrize("name", WRONG)
    def test_leave_everything_untouched(self, name):
        names = ("running_mean", "running_var", "weight", "bias")
        given = {key: np.full(3, 2, np.float32) for key in names}
        given |= {key: np.full((6, 3, 5), 3, np.float32) for key in ("residual", "out")}
        given |= {name: WRONG[name]}
        with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
            ON.call(numbabn.batch_norm_forward, cases.normal((6, 3, 5), np.float32), **given)
        for key, array in given.items():
            if key != name:
                assert (array == (3 if key in ("residual", "out") else 2)).all(), key

    def test_read_only(self):
        for name in ("running_mean", "out"):
            array = np.zeros((4, 3) if name == "out" else 3)
            array.flags.writeable = False
            with pytest.raises(ValueError, match=f"^{name}: expected"):
                ON.call(numbabn.batch_norm_forward, np.ones((4, 3)), **{name: array})


class TestLayer:
    @pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}], ids=str)
    def test_as_on_the_host(self, options):
        device, host = (numbabn.BatchNorm(5, dtype=np.float64, **options) for _ in range(2))
        for seed in range(3):
            x, dy = (cases.normal((4, 5, 6), seed=s, offset=s) for s in (seed, seed + 10))
            for function in ("forward", "backward"):
                operand = x if function == "forward" else dy
                got = ON.call(getattr(device, function), operand)
                np.testing.assert_allclose(got, getattr(host, function)(operand), atol=1e-12)
            if device.weight is not None:
                got = ON.get(device.grad_weight)
                np.testing.assert_allclose(got, host.grad_weight, rtol=1e-12)
        for name, value in host.state_dict().items():
            np.testing.assert_allclose(device.state_dict()[name], value, rtol=1e-12, err_msg=name)
        got = ON.call(device.eval(), x)
        np.testing.assert_allclose(got, host.eval()(x), atol=1e-12)


# Not with small blocks alone.


@pytest.mark.real_blocks
@dtypes
@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 2, 34, 34), 1), ((1, 1, 128, 144), 1), ((67, 36), 1)]
)
def test_blocks_as_on_a_gpu(shape, axis, dtype, ulp):
    options = {"with_residual": True, "activation": "relu", "on": ON}
    check_training(Problem(shape, axis, dtype, ulp, **options))


@pytest.mark.real_blocks
def test_blocks_are_of_the_size_that_was_asked_for():
    expected = (64, 8, 16) if os.environ.get("NUMBABN_TEST_BLOCKS") != "real" else (256, 32, 24)
    assert expected == (formats.THREADS, formats.WARP, schedule.DEPTH)
    assert formats.THREADS == formats.WARP * formats.LANES
