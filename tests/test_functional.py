"""The public functions against the oracle: every view, axis, dtype, stride and option."""

import tracemalloc

import cases
import numpy as np
import pytest
from hypothesis import given, settings
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

import numbabn
from numbabn import reference
from numbabn.cpu import schedule

OPTIONS = {
    "plain": (False, None),
    "residual": (True, None),
    "relu": (False, "relu"),
    "residual, relu": (True, "relu"),
}
# Each combination is a kernel to compile: every one in float32 on small shapes, otherwise plain
# and with everything.
TRAINING = {
    f"{shape}, {option}, {name}": (*cases.SHAPES[shape], *OPTIONS[option], *tolerance)
    for name, tolerance in cases.TOLERANCES.items()
    for shape in cases.SHAPES
    for option in OPTIONS
    if option in ("plain", "residual, relu") or (name == "float32" and shape not in cases.LARGE)
}


@pytest.mark.parametrize(
    ("shape", "axis", "with_residual", "activation", "dtype", "ulp"),
    TRAINING.values(),
    ids=TRAINING,
)
def test_training(shape, axis, with_residual, activation, dtype, ulp):
    check_training(
        Problem(shape, axis, dtype, ulp, with_residual=with_residual, activation=activation)
    )


@pytest.fixture(params=["real caches", "tiny caches"])
def caches(request, monkeypatch):
    """Small arrays go past tiny caches, as large ones past real ones, and through a slab."""
    if request.param == "tiny caches":
        monkeypatch.setattr(schedule, "cache_bytes", {2: 1 << 6, 3: 1 << 16}.get)
    schedule.forget()
    yield
    schedule.forget()


@pytest.mark.parametrize("name", [name for name in cases.SHAPES if name not in cases.LARGE])
@cases.narrow_dtypes
def test_sixteen_bits(caches, name, dtype, ulp):
    check_training(Problem(*cases.SHAPES[name], dtype, ulp, with_residual=True, activation="relu"))


@pytest.mark.parametrize("name", cases.LARGE)
def test_sixteen_bits_on_threads(name):
    check_training(Problem(*cases.SHAPES[name], *cases.NARROW["float16"]))


# float16 does not hold dweight of so many values.
@pytest.mark.parametrize("dtype", [*cases.TOLERANCES, "bfloat16"])
def test_several_pieces_of_narrow_rows(dtype):
    tolerance = (cases.TOLERANCES | cases.NARROW)[dtype]
    p = Problem((140003, 2), 1, *tolerance, with_residual=True, activation="relu")
    check_training(p)
    check_inference(p)
    check_statistics((140003, 2), 1, tolerance.dtype)


# A piece and some rows more, which may be fewer numbers than a line has.
@pytest.mark.parametrize("more", [1, 2, 5])
@pytest.mark.parametrize("C", [2, 3, 5, 9, 13])
def test_narrow_rows_are_written_where_they_belong(C, more):
    for rows in (1024 + more, 2048 + more):
        x = cases.normal((rows, C), np.float32)
        wanted = reference.forward(x, activation="relu")[0]
        for start in range(16, 32):
            memory = np.full(x.size + 64, 7, np.float32)
            out = memory[start : start + x.size].reshape(x.shape)
            beside = np.delete(memory, np.s_[start : start + x.size])
            numbabn.batch_norm_forward(x, activation="relu", out=out)
            np.testing.assert_allclose(out, wanted, rtol=0, atol=4e-6)
            mean = reference.statistics(x)[1]
            numbabn.batch_norm_inference(x, mean.astype("f4"), np.ones(C, "f4"), out=out)
            numbabn.batch_norm_backward(x, x, None, mean, np.ones(C), out=out)
            np.testing.assert_array_equal(np.delete(memory, np.s_[start : start + x.size]), beside)


@pytest.mark.parametrize("rows", [131073, 262145, 262146, 262148])
def test_narrow_rows_in_place_on_threads(rows):
    x = cases.normal((rows, 3), np.float32)
    wanted = numbabn.batch_norm(x, training=True, activation="relu")
    for start in (0, 4, 7):
        memory = np.empty(x.size + 16, np.float32)
        here = memory[start : start + x.size].reshape(x.shape)
        here[...] = x
        numbabn.batch_norm(here, training=True, activation="relu", out=here)
        np.testing.assert_array_equal(here, wanted)


@cases.narrow_dtypes
@pytest.mark.parametrize("scale", [1.0, 1.00390625, 0.7, 3e-5, 1e4])
def test_every_sixteen_bit_number_is_read_and_rounded_right(dtype, ulp, scale):
    check_every_sixteen_bit_number(dtype, scale)


@cases.narrow_dtypes
@pytest.mark.parametrize("shape", [(9, 5, 13), (2, 17, 23, 23), (50, 7)])
def test_sixteen_bits_beside_float32_parameters(shape, dtype, ulp):
    check_sixteen_bits_beside_float32(shape, dtype, ulp)


@cases.shapes
@cases.dtypes
def test_inference(shape, axis, dtype, ulp):
    check_inference(Problem(shape, axis, dtype, ulp))


@cases.shapes
@cases.dtypes
def test_statistics(shape, axis, dtype, ulp):
    check_statistics(shape, axis, dtype)


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 4, 5, 3), 1), ((9, 4, 5, 3), 1), ((6, 5, 3, 4), 3)]
)
def test_batch_norm_is_forward_or_inference(shape, axis):
    p = Problem(shape, axis, np.float32, 2**-23, with_residual=True, activation="relu")
    ported = numbabn.batch_norm(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, False, 0.1, 1e-5, **p.keywords
    )
    inference = numbabn.batch_norm_inference(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, **p.keywords
    )
    np.testing.assert_array_equal(ported, inference)

    mean, var = p.running_mean.copy(), p.running_var.copy()
    ported = numbabn.batch_norm(
        p.x, p.running_mean, p.running_var, p.weight, p.bias, True, 0.2, 1e-3, **p.keywords
    )
    forward = numbabn.batch_norm_forward(
        p.x, p.weight, p.bias, mean, var, momentum=0.2, eps=1e-3, **p.keywords
    )
    np.testing.assert_array_equal(ported, forward.y)
    np.testing.assert_array_equal(p.running_mean, mean)
    np.testing.assert_array_equal(p.running_var, var)


def test_without_affine_and_running():
    x = cases.normal((6, 4, 5), np.float64)
    expected, _, _ = reference.forward(x)
    np.testing.assert_allclose(numbabn.batch_norm(x, training=True), expected, atol=1e-14)


@pytest.mark.parametrize("correction", [0, 1, 0.5])
def test_correction_is_the_running_variances_alone(correction):
    check_correction(correction)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
@cases.memory
@cases.dtypes
def test_any_strides(caches, lay, axis, dtype, ulp):
    p = Problem((9, 17, 5, 6), axis, dtype, ulp, with_residual=True, activation="relu")
    check_strides(p, lay)


@cases.memory
def test_operands_may_lie_in_different_ways(lay):
    p = Problem((9, 4, 5, 6), 1, np.float64, 2**-48, with_residual=True, activation="relu")
    check_out_of_any_strides(p, lay)


def test_results_lie_as_the_input_does():
    x = np.asfortranarray(cases.normal((9, 4, 5, 6), np.float32))
    result = numbabn.batch_norm_forward(x)
    assert result.y.strides == x.strides
    assert numbabn.batch_norm_backward(x, x, None, *result[1:3]).dx.strides == x.strides


def test_broadcast_input():
    check_broadcast(Problem((9, 4, 5, 6), 1, np.float64, 2**-48))


@pytest.mark.parametrize("shape", [(4, 5, 33), (4, 50, 33), (3, 7, 513), (4, 5, 11), (4, 5, 16)])
@pytest.mark.parametrize("axis", [1, 2])
def test_operands_broadcast_over_the_batch(caches, shape, axis):
    x, dy, residual = (cases.normal(shape, np.float32, seed=seed) for seed in range(3))
    C = shape[axis]
    mean, var = np.zeros(C, np.float32), np.ones(C, np.float32)
    for name in ("x", "dy", "residual"):
        whole = {"x": x, "dy": dy, "residual": residual}
        narrow = np.broadcast_to(whole[name][:1], shape)
        results = []
        for operands in (whole | {name: narrow}, whole | {name: narrow.copy()}):
            x_, dy_, residual_ = operands.values()
            y, *_ = numbabn.batch_norm_forward(x_, residual=residual_, axis=axis)
            z = numbabn.batch_norm_inference(x_, mean, var, residual=residual_, axis=axis)
            dx, *_ = numbabn.batch_norm_backward(
                dy_, x_, None, mean.astype(np.float64), np.ones(C), axis=axis
            )
            results.append((y, z, dx))
        for broadcast, copied in zip(*results, strict=True):
            np.testing.assert_array_equal(broadcast, copied)


def test_read_only_input():
    x = cases.normal((9, 4, 5), np.float32)
    expected = numbabn.batch_norm(x, training=True)
    x.flags.writeable = False
    np.testing.assert_array_equal(numbabn.batch_norm(x, training=True), expected)
    assert not x.flags.writeable


@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a[::2],
        lambda a: a[:, ::2],
        lambda a: a[:, ::-1],
        lambda a: a[:, :, :, ::2],
        lambda a: a[:, :, 8:],
        lambda a: a.transpose(0, 3, 1, 2),
        lambda a: a.transpose(0, 3, 1, 2)[:, ::2],
        lambda a: a.transpose(0, 3, 1, 2)[:, :, :, 8:],
        lambda a: a.transpose(3, 2, 0, 1),
    ],
)
def test_views_are_never_copied(view):
    x, dy, y = (view(np.ones((32, 32, 32, 32), np.float32)) for _ in range(3))

    def steps():
        result = numbabn.batch_norm_forward(x, out=y)
        numbabn.batch_norm_backward(dy, x, None, result.mean, result.invstd, out=dy)

    steps()
    tracemalloc.start()
    steps()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < x.nbytes / 8


@cases.dtypes
@pytest.mark.parametrize("shape", [(6, 4, 5, 3), (9, 4, 5, 3), (6, 17, 23, 23), (50, 7)])
def test_in_place(shape, dtype, ulp):
    check_in_place(Problem(shape, 1, dtype, ulp, with_residual=True))


@cases.shapes
@pytest.mark.parametrize("offset", [0, 1e2, 1e4, 1e6])
def test_float32_is_exact_at_any_offset(shape, axis, offset):
    check_offset(shape, axis, offset)


@cases.shapes
@pytest.mark.parametrize(("x_offset", "dy_offset"), [(1e2, 0), (1e6, 0), (0, 1e4), (1e4, 1e2)])
def test_float32_gradients_are_exact_at_any_offset(shape, axis, x_offset, dy_offset):
    check_gradient_offsets(shape, axis, x_offset, dy_offset)


def test_only_what_has_no_view_is_copied():
    x = np.ones((32, 32, 32, 32), np.float32)
    out = np.zeros((32, 32, 34, 34), np.float32)[:, :, 1:-1, 1:-1]
    numbabn.batch_norm(x, training=True, out=out)
    tracemalloc.start()
    numbabn.batch_norm(x, training=True, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.2 * x.nbytes


@cases.shapes
@cases.dtypes
@pytest.mark.parametrize("constant", CONSTANTS)
def test_a_constant_channel_gives_exactly_bias(shape, axis, dtype, ulp, constant):
    check_constant(shape, axis, dtype, constant)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30])
def test_squares_neither_overflow_nor_underflow(scale, dtype):
    check_scale((64, 3, 40, 40), scale, dtype)


def test_an_outlier_in_front_spoils_nothing():
    check_outlier((4, 2, 80, 80), np.float64, 1e6)


def test_sums_that_are_exact_in_any_order_come_out_exact():
    # As benchdnn fills x: pairs around the mean.
    pairs = np.random.default_rng(0).integers(-8, 9, (16, 5, 8, 4)).astype(np.float32)
    x = np.stack([4 + pairs, 4 - pairs], axis=-1).reshape(16, 5, 8, 8)
    stats = numbabn.batch_stats(x)
    np.testing.assert_array_equal(stats.mean, 4)
    np.testing.assert_array_equal(stats.m2, ((x - 4.0) ** 2).sum((0, 2, 3)))


@cases.shapes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_stay_in_their_channel(shape, axis, bad):
    check_not_finite(shape, axis, bad)


def test_relu_lets_nan_through():
    check_relu_lets_nan_through()


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((3, 2, 4), 1), ((9, 2, 3), 1), ((5, 3), 1)])
def test_gradients_against_finite_differences(shape, axis, with_mask):
    p = Problem(
        shape,
        axis,
        np.float64,
        2**-48,
        with_residual=True,
        activation="relu" if with_mask else None,
    )

    def loss(**changed):
        operands = {"x": p.x, "weight": p.weight, "bias": p.bias, "residual": p.residual} | changed
        y = numbabn.batch_norm_forward(**operands, axis=axis, activation=p.activation).y
        return (y * p.dy).sum()

    result = numbabn.batch_norm_forward(p.x, p.weight, p.bias, **p.keywords)
    gradients = numbabn.batch_norm_backward(
        p.dy, p.x, p.weight, *result[1:3], axis=axis, mask=result.mask, with_residual=True
    )
    step = 1e-6
    for name, gradient in gradients._asdict().items():
        operand = getattr(p, name.removeprefix("d"))
        numeric = np.empty_like(operand)
        for i in np.ndindex(operand.shape):
            nudge = np.zeros_like(operand)
            nudge[i] = step
            name_of = name.removeprefix("d")
            up, down = loss(**{name_of: operand + nudge}), loss(**{name_of: operand - nudge})
            numeric[i] = (up - down) / (2 * step)
        np.testing.assert_allclose(gradient, numeric, atol=2e-8, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (5, 3, 0)])
def test_empty_batch(shape, dtype):
    check_empty(shape, dtype)
    running_mean, running_var = np.full(3, 2, dtype), np.full(3, 5, dtype)
    stats = numbabn.batch_stats(np.empty(shape, dtype))
    numbabn.update_running_stats(running_mean, running_var, stats)
    np.testing.assert_array_equal(running_mean, 2)
    np.testing.assert_array_equal(running_var, 5)


def test_in_place_through_an_axis_of_one_place():
    memory = cases.normal((4, 3), np.float64)
    x, out = memory[:, :, None], memory.reshape(4, 3, 1)
    expected = numbabn.batch_norm(x.copy(), training=True)
    np.testing.assert_array_equal(numbabn.batch_norm(x, training=True, out=out), expected)


def test_statistics_that_start_empty_update_nothing():
    running_mean, running_var = np.full(3, 2.0), np.full(3, 5.0)
    numbabn.update_running_stats(running_mean, running_var, numbabn.BatchStats())
    assert running_mean.tolist() == [2, 2, 2]
    assert running_var.tolist() == [5, 5, 5]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("of", ["x", "residual"])
def test_running_statistics_within_an_input_are_refused(name, of):
    operands = {"x": cases.normal((4, 3)), "residual": cases.normal((4, 3), seed=1)}
    before = {key: value.copy() for key, value in operands.items()}
    with pytest.raises(ValueError, match=f"{name}: expected memory of its own.*{of}"):
        numbabn.batch_norm_forward(**operands, **{name: operands[of][0]})
    for key, value in operands.items():
        np.testing.assert_array_equal(value, before[key])


def test_memmaps_in_plain_arrays_out(tmp_path):
    memory = np.memmap(tmp_path / "x", np.float32, "w+", shape=(9, 4, 5))
    memory[...] = cases.normal((9, 4, 5))
    result = numbabn.batch_norm_forward(memory)
    gradients = numbabn.batch_norm_backward(memory, memory, None, *result[1:3], with_residual=True)
    for array in (result.y, gradients.dx, gradients.dresidual):
        assert type(array) is np.ndarray
    np.testing.assert_array_equal(result.y, numbabn.batch_norm(np.array(memory), training=True))


def test_saved_statistics_may_be_float32():
    check_float32_statistics(Problem((9, 4, 5), 1, np.float32, 2**-23))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(arrays(), st.integers(0, 2**31))
def test_any_shape_axis_order_and_step(array, seed):
    check_any_array(array, seed)
