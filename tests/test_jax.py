"""Inside JAX's programs, against the float64 oracle and against JAX's own derivatives."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import cases
import ml_dtypes
import numpy as np
import pytest

import numbabn
from numbabn import reference

pytest.importorskip("jax")

import jax
import jax.export
import jax.numpy as jnp

from numbabn.jax import batch_norm

SHAPES = {
    "NC": ((33, 19), 1),
    "NCL": ((9, 5, 130), 1),
    "NCHW": ((4, 17, 23, 24), 1),
    "NHWC": ((3, 5, 7, 33), -1),
    "NCDHW": ((2, 4, 3, 5, 7), 1),
    "CNHW": ((3, 5, 7, 11), 0),
    "parallel": ((8, 16, 40, 41), 1),
}
DTYPES = {**cases.NARROW, **cases.TOLERANCES}
SETTINGS = {"eps": 1e-3, "momentum": 0.3, "correction": 0}

FUSED = {
    "plain": (None, False),
    "relu": ("relu", False),
    "residual": (None, True),
    "residual and relu": ("relu", True),
}
fused = pytest.mark.parametrize(("activation", "with_residual"), FUSED.values(), ids=FUSED)


def _cases():
    """Not the whole product, because XLA compiles each anew: all shapes, and all dtypes fused."""
    for name, shape in SHAPES.items():
        yield pytest.param(*shape, *DTYPES["float32"], "relu", True, id=name)
    for (dtype, tolerance), (fusion, options) in product(DTYPES.items(), FUSED.items()):
        yield pytest.param(*SHAPES["NCHW"], *tolerance, *options, id=f"{dtype} {fusion}")


every_case = pytest.mark.parametrize(
    ("shape", "axis", "dtype", "ulp", "activation", "with_residual"), list(_cases())
)


@pytest.fixture(params=[False, True], ids=["32 bits", "64 bits"])
def x64(request):
    jax.config.update("jax_enable_x64", request.param)
    yield request.param
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def wide():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def arrays(shape, axis, dtype, parameters=None, seed=0):
    """Give x, running mean, running variance, weight, bias, residual and dy."""
    C = shape[axis]
    parameters = parameters or dtype
    values = [cases.normal(shape, seed=seed, offset=3)]
    values += [np.abs(cases.normal(C, seed=seed + i)) + 0.5 for i in range(1, 5)]
    values += [cases.normal(shape, seed=seed + i) for i in (5, 6)]
    kinds = [dtype, *[parameters] * 4, dtype, dtype]
    return [jnp.asarray(value.astype(kind)) for value, kind in zip(values, kinds, strict=True)]


def close(got, expected, error, scale=1.0):
    expected = np.asarray(expected, np.float64)
    bound = error * max(scale, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=bound)


def plain(
    x, running_mean, running_var, weight, bias, training, momentum, eps, *,
    axis, residual=None, activation=None, correction=1,
):  # fmt: skip
    """The formulas, for JAX to differentiate."""
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    spread = partial(jnp.expand_dims, axis=axes)
    mean, var = running_mean, running_var
    if training:
        mean = x.mean(axes)
        var = jnp.square(x - spread(mean)).mean(axes)
    z = (x - spread(mean)) / jnp.sqrt(spread(var) + eps) * spread(weight) + spread(bias)
    z = z if residual is None else z + residual
    return jnp.where(z > 0, z, 0) if activation else z


class TestAgainstTheOracle:
    @every_case
    def test_training(self, wide, shape, axis, dtype, ulp, activation, with_residual):
        x, mean, var, weight, bias, residual, _ = arrays(shape, axis, dtype)
        residual = residual if with_residual else None
        fusion = {"axis": axis, "residual": residual, "activation": activation}
        options = {"axis": axis, "activation": activation, **SETTINGS}
        run = jax.jit(partial(batch_norm, training=True, **options))
        y, new_mean, new_var = run(x, mean, var, weight, bias, residual=residual)
        assert (y.dtype, y.shape) == (x.dtype, shape)
        assert new_mean.dtype == new_var.dtype == mean.dtype
        expected, *_ = reference.forward(x, weight, bias, eps=SETTINGS["eps"], **fusion)
        close(y, expected, 16 * ulp)
        moments = reference.statistics(x, axis=axis)
        expected = reference.running_update(mean, var, *moments, 0.3, correction=0)
        close(new_mean, expected[0], 4 * ulp)
        close(new_var, expected[1], 4 * ulp)
        assert batch_norm(x, training=True, axis=axis).running_mean is None

    @every_case
    def test_inference(self, wide, shape, axis, dtype, ulp, activation, with_residual):
        x, mean, var, weight, bias, residual, _ = arrays(shape, axis, dtype)
        residual = residual if with_residual else None
        fusion = {"axis": axis, "residual": residual, "activation": activation}
        run = jax.jit(partial(batch_norm, axis=axis, activation=activation))
        y, same_mean, same_var = run(x, mean, var, weight, bias, residual=residual)
        close(y, reference.inference(x, mean, var, weight, bias, **fusion), 16 * ulp)
        np.testing.assert_array_equal(same_mean, mean)
        np.testing.assert_array_equal(same_var, var)

    @every_case
    def test_gradients(self, wide, shape, axis, dtype, ulp, activation, with_residual):
        """The oracle is given what came out as y, whose rounding decides about the mask."""
        x, mean, var, weight, bias, residual, dy = arrays(shape, axis, dtype)
        given = [x, weight, bias, *([residual] if with_residual else [])]

        def y_of(training, x, weight, bias, residual=None):
            return batch_norm(
                x, mean, var, weight, bias, training, eps=1e-3,
                axis=axis, residual=residual, activation=activation,
            ).y  # fmt: skip

        for training in (True, False):
            y, pull = jax.vjp(jax.jit(partial(y_of, training)), *given)
            got = jax.jit(pull)(dy)
            statistics = (mean, 1 / np.sqrt(np.asarray(var, np.float64) + 1e-3))
            if training:
                _, *statistics = reference.forward(x, eps=1e-3, axis=axis)
            expected = reference.backward(
                dy, x, weight, *statistics, axis=axis, training=training,
                mask=reference.relu_mask(y) if activation else None,
            )  # fmt: skip
            terms = np.sqrt(x.size / x.shape[axis])
            for one, by, other in zip(got, given, expected, strict=False):
                assert (one.dtype, one.shape) == (by.dtype, by.shape)
                close(one, other, 32 * ulp, scale=terms if one.ndim == 1 else 1)


class TestAgainstJAX:
    """Whose derivatives of the plain formulas these are."""

    @fused
    @pytest.mark.parametrize("training", [True, False])
    def test_every_gradient(self, wide, activation, with_residual, training):
        shape, axis = SHAPES["NHWC"]
        x, mean, var, weight, bias, residual, dy = arrays(shape, axis, np.float64)

        def loss(function, given):
            out = function(
                training=training, momentum=0.1, eps=1e-3, axis=axis, activation=activation, **given
            )
            return jnp.vdot(out.y if isinstance(out, tuple) else out, dy)

        given = {"x": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        if with_residual:
            given["residual"] = residual
        got = jax.jit(jax.grad(partial(loss, batch_norm)))(given)
        expected = jax.grad(partial(loss, plain))(given)
        assert got.keys() == expected.keys()
        for name in got:
            close(got[name], expected[name], 1e-11, scale=10)
        if not training:
            assert np.abs(got["running_var"]).max() > 1e-3

    def test_no_gradient_through_new_running_statistics(self, x64):
        x, mean, var, *_ = arrays((9, 4), 1, np.float32)

        def loss(x, mean, var):
            _, mean, var = batch_norm(x, mean, var, training=True)
            return (mean + var).sum()

        for gradient in jax.grad(loss, (0, 1, 2))(x, mean, var):
            assert not gradient.any()

    @fused
    def test_mixed_parameters(self, x64, activation, with_residual):
        """Float32 beside 16-bit data, and a bias of another dtype than the weight."""
        x, mean, var, weight, bias, residual, dy = arrays(
            (8, 5, 6), 1, ml_dtypes.bfloat16, np.float32
        )
        bias = bias.astype(ml_dtypes.bfloat16)

        def loss(given, training):
            y, *_ = batch_norm(**given, training=training, activation=activation)
            return jnp.vdot(y.astype(np.float32), dy.astype(np.float32))

        given = {"x": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        if with_residual:
            given["residual"] = residual
        for training in (True, False):
            gradients = jax.grad(loss)(given, training)
            for name, array in given.items():
                assert (gradients[name].dtype, gradients[name].shape) == (array.dtype, array.shape)

    def test_large_gradients_beside_16_bits(self):
        """Of each parameter in its own dtype, whatever that of the weight."""
        x = jnp.asarray(cases.normal((400, 2, 300), np.float16))
        bias = jnp.zeros(2)
        for dtype in (np.float16, np.float32):
            weight = jnp.ones(2, dtype)
            run = lambda bias, mean, w=weight: batch_norm(x, mean, bias + 1, w, bias).y  # noqa: E731
            _, pull = jax.vjp(run, bias, bias)
            dbias, dmean = pull(jnp.ones_like(x))
            assert dbias.dtype == dmean.dtype == np.float32
            np.testing.assert_allclose(dmean, -120000, rtol=1e-4)
            run = lambda bias, w=weight: batch_norm(x, weight=w, bias=bias, training=True).y  # noqa: E731
            np.testing.assert_array_equal(jax.vjp(run, bias)[1](jnp.ones_like(x))[0], [120000] * 2)

    @pytest.mark.parametrize("training", [True, False])
    def test_without_weight_and_bias(self, x64, training):
        x, mean, var, weight, bias, _, dy = arrays((9, 4, 6), 1, np.float32)
        ones, zeros = jnp.ones_like(weight), jnp.zeros_like(bias)
        for parameters in [(None, None), (ones, None), (None, zeros)]:
            got = jax.vjp(lambda x, p=parameters: batch_norm(x, mean, var, *p, training).y, x)
            expected = jax.vjp(lambda x: batch_norm(x, mean, var, ones, zeros, training).y, x)
            np.testing.assert_array_equal(got[0], expected[0])
            np.testing.assert_array_equal(got[1](dy)[0], expected[1](dy)[0])


class TestNumbers:
    def test_the_mean_is_kept_in_float64(self):
        """Float32 cannot hold an offset of 1e6, and JAX has no float64 here."""
        x = cases.normal((64, 3, 40), np.float32, offset=1e6)
        dy = cases.normal(x.shape, np.float32, seed=1)
        y, pull = jax.vjp(jax.jit(lambda x: batch_norm(x, training=True).y), jnp.asarray(x))
        expected, mean, invstd = reference.forward(x)
        close(y, expected, 1e-6)
        close(pull(jnp.asarray(dy))[0], reference.backward(dy, x, None, mean, invstd)[0], 1e-6)

    @fused
    def test_the_same_bits_as_on_numpy_arrays(self, activation, with_residual):
        x, _, _, weight, bias, residual, dy = arrays((8, 16, 40, 41), 1, np.float32)
        residual = residual if with_residual else None
        fusion = {"residual": residual, "activation": activation}

        def y_of(x, weight, bias, residual):
            return batch_norm(
                x, None, None, weight, bias, True, residual=residual, activation=activation
            ).y

        y, pull = jax.vjp(y_of, x, weight, bias, residual)
        fusion["residual"] = None if residual is None else np.asarray(residual)
        x, weight, bias, dy = map(np.asarray, (x, weight, bias, dy))
        result = numbabn.batch_norm_forward(x, weight, bias, **fusion)
        np.testing.assert_array_equal(y, result.y)
        expected = numbabn.batch_norm_backward(
            dy, x, weight, result.mean, result.invstd, mask=result.mask, with_residual=with_residual
        )
        for got, other in zip(pull(jnp.asarray(dy)), expected, strict=True):
            np.testing.assert_array_equal(got, other) if other is not None else None

    @pytest.mark.parametrize("training", [True, False])
    def test_not_a_number_stays_in_its_channel(self, training):
        x = jnp.asarray(cases.normal((9, 3, 5), np.float32)).at[2, 1, 3].set(np.nan)
        mean, var = jnp.zeros(3), jnp.ones(3)
        y, pull = jax.vjp(
            lambda x: batch_norm(x, mean, var, training=training, activation="relu").y, x
        )
        (dx,) = pull(jnp.ones_like(x))
        for array in (y, dx):
            assert np.isfinite(array[:, [0, 2]]).all()
        assert np.isnan(y[2, 1, 3])

    def test_a_variance_of_nothing(self):
        """Is no warning, and NaN or infinity in its channel alone."""
        x, mean, var = jnp.ones((4, 2)), jnp.zeros(2), jnp.array([0.0, 4.0])
        y, pull = jax.vjp(lambda x: batch_norm(x, mean, var, eps=0.0).y, x)
        (dx,) = pull(jnp.ones_like(x))
        for array in (y, dx):
            assert not np.isfinite(array[:, 0]).any()
            np.testing.assert_array_equal(array[:, 1], [0.5] * 4)

    def test_nothing_in_a_batch(self, x64):
        x, mean, var = jnp.zeros((0, 3, 4)), jnp.ones(3), jnp.ones(3)
        weight = jnp.ones(3)
        run = jax.jit(partial(batch_norm, training=True, activation="relu"))
        (y, *running), pull = jax.vjp(run, x, mean, var, weight)
        assert y.shape == (0, 3, 4)
        np.testing.assert_array_equal(running, [mean, var])
        dx, _, _, dweight = pull(numbabn.jax.Normalized(y, mean, var))
        assert dx.shape == (0, 3, 4)
        assert not dweight.any()


class TestTransformations:
    @fused
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("mapped", ["x", "parameters", "both"])
    def test_vmap(self, training, mapped, activation, with_residual):
        """Each element of the new axis is a batch of its own, and so are its gradients."""
        seven = [arrays((6, 4, 5), 1, np.float32, seed=10 * i) for i in range(3)]
        given = [jnp.stack(each) for each in zip(*seven, strict=True)]
        axes = [0 if mapped in (kind, "both") else None for kind in ("x", "parameters")]
        each = [axes[0], *[axes[1]] * 4, axes[0], 0]
        given = [a if axis == 0 else a[0] for a, axis in zip(given, each, strict=True)]

        def value_and_gradients(x, mean, var, weight, bias, residual, dy):
            def run(x, weight, bias, residual):
                return batch_norm(
                    x, mean, var, weight, bias, training,
                    residual=residual if with_residual else None, activation=activation,
                )  # fmt: skip

            out, pull = jax.vjp(run, x, weight, bias, residual)
            return out, pull(out._replace(y=dy))

        got = jax.jit(jax.vmap(value_and_gradients, each))(*given)
        for i in range(3):
            one = [a[i] if axis == 0 else a for a, axis in zip(given, each, strict=True)]
            expected = value_and_gradients(*one)
            for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(a[i], b)

    def test_vmap_twice_and_along_another_axis(self):
        x = jnp.asarray(cases.normal((7, 2, 4, 3), np.float32))
        run = lambda x: batch_norm(x, training=True).y  # noqa: E731
        got = jax.vmap(jax.vmap(run, 2, 2), 1, 1)(x)  # over axes 1 and 3
        for i, j in np.ndindex(2, 3):
            np.testing.assert_array_equal(got[:, i, :, j], run(x[:, i, :, j]))

    def test_scan_and_checkpoint(self):
        x = jnp.asarray(cases.normal((4, 8, 3, 10), np.float32))
        weight, mean, var = jnp.full(3, 0.5), jnp.zeros(3), jnp.ones(3)

        def layer(running, x):
            y, *running = batch_norm(x, *running, weight, training=True)
            return tuple(running), y

        running, ys = jax.jit(lambda x: jax.lax.scan(layer, (mean, var), x))(x)
        for i in range(4):
            y, mean, var = batch_norm(x[i], mean, var, weight, training=True)
            np.testing.assert_array_equal(ys[i], y)
        np.testing.assert_array_equal(running, (mean, var))

        def loss(run, x):
            return (run(run(x)) ** 3).sum()

        run = lambda x: batch_norm(x, training=True, activation="relu").y  # noqa: E731
        got = jax.jit(jax.grad(partial(loss, jax.checkpoint(run))))(x[0])
        np.testing.assert_allclose(got, jax.grad(partial(loss, run))(x[0]), atol=1e-5)

    def test_arguments_are_never_written(self):
        x, mean, var, weight, bias, residual, _ = arrays((32, 16, 20, 20), 1, np.float32)
        before = [np.array(a) for a in (x, mean, var, weight, bias, residual)]
        jax.jit(partial(batch_norm, training=True))(x, mean, var, weight, bias, residual=residual)
        for array, copy in zip((x, mean, var, weight, bias, residual), before, strict=True):
            np.testing.assert_array_equal(array, copy)

    def test_results_are_kept(self):
        """Memory that JAX holds is not given to a later call, however many there are."""
        run = jax.jit(partial(batch_norm, training=True, activation="relu"))
        x = jnp.asarray(cases.normal((16, 8, 64, 65), np.float32))
        weight = [jnp.full(8, i + 1.0) for i in range(20)]
        kept = [run(x, weight=w).y for w in weight]
        for w, y in zip(weight, kept, strict=True):
            np.testing.assert_array_equal(y, numbabn.batch_norm(
                np.asarray(x), weight=np.asarray(w), training=True, activation="relu"
            ))  # fmt: skip

    def test_large_arrays(self):
        """Larger than the caches, in a program whose other work runs in XLA's threads."""
        x = jnp.asarray(cases.normal((32, 64, 56, 56), np.float32))
        weight = jnp.ones(64)

        @jax.jit
        @jax.grad
        def gradient(weight, x):
            y = jnp.tanh(x * 1.5)
            for _ in range(3):
                y = jnp.tanh(batch_norm(y, weight=weight, training=True, activation="relu").y)
            return (y**2).mean()

        first = gradient(weight, x)
        assert np.isfinite(first).all()
        assert np.abs(first).max() > 0
        for _ in range(2):
            np.testing.assert_array_equal(gradient(weight, x), first)

    def test_from_many_threads(self):
        run = jax.jit(jax.grad(lambda x: (batch_norm(x, training=True).y ** 3).sum()))
        x = [jnp.asarray(cases.normal((16, 8, 33, 34), np.float32, seed=i)) for i in range(8)]
        expected = [np.asarray(run(each)) for each in x]
        with ThreadPoolExecutor(8) as pool:
            for got, other in zip(pool.map(run, x * 4), expected * 4, strict=True):
                np.testing.assert_array_equal(got, other)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from numbabn.jax import batch_norm

rng = np.random.default_rng(0)
x = rng.standard_normal((8, 4, 30, 30), dtype=np.float32)
weight, mean = jnp.arange(4.0), jnp.zeros(4)

def numbabn(training, x, weight, mean):
    return batch_norm(x, mean, mean + 2, weight, training=training)

def formulas(training, x, weight, mean):
    var = mean + 2
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    mean, var, weight = (jnp.expand_dims(a, (1, 2)) for a in (mean, var, weight))
    return (x - mean) / jnp.sqrt(var + 1e-5) * weight,

def same_gradients(got, expected, *arrays):
    for training in (True, False):
        got_of, expected_of = (
            jax.jit(jax.grad(lambda *a: (f(training)(*a) ** 3).mean(), (0, 1, 2)))(*arrays)
            for f in (got, expected)
        )
        for a, b, by in zip(got_of, expected_of, arrays, strict=True):
            assert jax.typeof(a).sharding.spec == jax.typeof(by).sharding.spec
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

mesh = jax.make_mesh((2,), ("n",), axis_types=(AxisType.{axes},))
sharded = jax.device_put(x, NamedSharding(mesh, P("n")))
"""
needs_types = pytest.mark.skipif(
    not hasattr(jax.sharding, "ManualAxisType"), reason="types of JAX before 0.10 tell less"
)


def with_two_devices(code, axes="Auto"):
    subprocess.run(
        [sys.executable, "-W", "error", "-c", DEVICES.replace("{axes}", axes) + code],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        check=True, timeout=120,
    )  # fmt: skip


class TestTwoDevices:
    """Statistics are of the whole batch where JAX sees one array, of each shard in a shard_map."""

    def test_values(self):
        with_two_devices("""
run = lambda x: batch_norm(x, training=True).y
np.testing.assert_array_equal(jax.jit(run)(sharded), run(x))
local = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P("n"), out_specs=P("n")))
expected = np.concatenate([run(x[:4]), run(x[4:])])
for _ in range(20): np.testing.assert_array_equal(local(sharded), expected)
""")

    @needs_types
    def test_shard_map(self):
        """What differs between shards is told, so that gradients are summed over them once."""
        with_two_devices("""
specs = dict(mesh=mesh, in_specs=(P("n"), P(), P()), out_specs=P("n"))
mapped = lambda f, training: jax.shard_map(lambda *a: f(training, *a)[0], **specs)
same_gradients(partial(mapped, numbabn), partial(mapped, formulas), sharded, weight, mean)

def inside(f, training):
    gradient = jax.grad(lambda weight, x, mean: (f(training, x, weight, mean)[0] ** 3).sum())
    step = lambda x, weight, mean: gradient(weight, x, mean)
    return jax.jit(jax.shard_map(step, **specs | {"out_specs": P()}))(sharded, weight, mean)

for training in (True, False):
    got, expected = (inside(f, training) for f in (numbabn, formulas))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-2)

try:
    jax.shard_map(
        lambda *a: numbabn(True, *a).running_mean, **specs | {"out_specs": P()}
    )(sharded, weight, mean)
except ValueError as error:
    assert "replication" in str(error)
else:
    raise AssertionError("means of shards passed as one")
""")

    @needs_types
    def test_explicit_axes(self):
        """Results and gradients are sharded as the arrays that they belong to."""
        with_two_devices(
            """
jax.set_mesh(mesh)
y_of = lambda f, training: lambda *a: f(training, *a)[0]
halves = jax.device_put((weight, mean), NamedSharding(mesh, P("n")))
for arrays in ((sharded, weight, mean), (jnp.asarray(x), *halves)):
    same_gradients(partial(y_of, numbabn), partial(y_of, formulas), *arrays)
    y, new_mean, _ = numbabn(True, *arrays)
    for result, array in ((y, arrays[0]), (new_mean, arrays[2])):
        assert jax.typeof(result).sharding.spec == jax.typeof(array).sharding.spec
""",
            "Explicit",
        )


def test_export(tmp_path):
    """To a process that traces no call, and ends while it computes."""

    def network(x):
        for _ in range(5):
            x = batch_norm(jnp.tanh(x) + jnp.cosh(x), training=True).y + 1
        return x

    x = cases.normal((32, 64, 56, 56), np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", jax.jit(network)(x))
    checks = [jax.export.DisabledSafetyCheck.custom_call("numbabn_forward")]
    exported = jax.export.export(jax.jit(network), disabled_checks=checks)(x)
    (tmp_path / "program").write_bytes(exported.serialize())
    code = (
        "import pathlib, jax, jax.export, numpy as np, numbabn.jax\n"
        "program = jax.export.deserialize(pathlib.Path('program').read_bytes())\n"
        "run = jax.jit(program.call)\n"
        "np.testing.assert_array_equal(run(np.load('x.npy')), np.load('y.npy'))\n"
        "y = np.load('y.npy')\n"
        "for _ in range(4): y = run(y)\n"
        "del y\n"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path, check=True, timeout=60,
    )  # fmt: skip


class TestErrors:
    """While a program is traced, and as on NumPy arrays."""

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"x": [[1.0]]}, TypeError, "x: expected a JAX array, got list"),
            ({"x": None}, TypeError, "x: expected a JAX array, got NoneType"),
            ({"x": np.ones((4, 3), int)}, TypeError, "x: expected float16, bfloat16, .* got int"),
            ({"x": np.ones(3, np.float32)}, ValueError, "x: expected 2 or more dimensions"),
            ({"weight": np.ones(4, np.float32)}, ValueError, r"weight: expected shape \(3,\)"),
            (
                {"weight": np.ones(3, np.float16)},
                TypeError,
                "weight: expected float32, got float16",
            ),
            ({"bias": 1.0}, TypeError, "bias: expected a JAX array, got float"),
            ({"training": 2}, TypeError, "training: expected True or False, got 2"),
            ({"training": False}, ValueError, "running_mean: expected an array of shape"),
            ({"x": np.ones((1, 3), np.float32)}, ValueError, "x: expected more than one value"),
            ({"axis": 2}, ValueError, "axis: expected -2 to 1"),
            ({"eps": -1.0}, ValueError, "eps: expected 0 or more, got -1.0"),
            ({"momentum": "a"}, TypeError, "momentum: expected a real number, got str"),
            ({"activation": "gelu"}, ValueError, "activation: expected None or 'relu'"),
            ({"residual": np.ones((3, 4), np.float32)}, ValueError, "residual: expected the shape"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_message(self, options, error, message):
        given = {"x": np.ones((4, 3), np.float32), "training": True, **options}
        with pytest.raises(error, match=message):
            batch_norm(**given)

    def test_settings_are_static(self):
        x = jnp.ones((4, 3))
        with pytest.raises(TypeError, match=r"momentum: expected a real number, got .*Tracer"):
            jax.jit(lambda m: batch_norm(x, training=True, momentum=m).y)(0.1)

    def test_no_second_derivative(self):
        loss = lambda x: (batch_norm(x, training=True).y ** 3).sum()  # noqa: E731
        with pytest.raises(ValueError, match="cannot be differentiated"):
            jax.grad(lambda x: jax.grad(loss)(x).sum())(jnp.ones((4, 3)))
