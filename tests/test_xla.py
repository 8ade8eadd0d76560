"""Python functions as targets of XLA: what they are given and give, and how a program ends."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from numbabn import xla

seen = []


@pytest.fixture
def wide():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def scale(settings, given, outputs):
    """Give the first array, scaled, and the others' sums."""
    seen.append((settings, [array.shape for array in given]))
    if settings.get("fail"):
        raise RuntimeError(settings["fail"])
    outputs[0][...] = given[0] * np.asarray(settings["by"], given[0].dtype)
    for array, output in zip(given[1:], outputs[1:], strict=True):
        output[...] = array.sum(dtype=np.float64)


xla.register("numbabn_test_scale", scale)


def call(x, *others, **settings):
    outputs = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
    outputs += [jax.ShapeDtypeStruct((), np.float32) for _ in others]
    return xla.call("numbabn_test_scale", tuple(outputs), settings, x, *others)


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint32, np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0, 4), (2, 3, 4)])
def test_arrays_and_settings(wide, dtype, shape):
    x = jnp.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    y, total = jax.jit(lambda x: call(x, jnp.ones((5, 2)), by=2, text="näher", real=1e-5))(x)
    assert (y.dtype, y.shape) == (dtype, shape)
    np.testing.assert_array_equal(y, np.asarray(x) * np.asarray(2, dtype))
    assert total == 10
    assert seen[-1] == ({"by": 2, "text": "näher", "real": 1e-5}, [shape, (5, 2)])


def test_another_major_version_is_refused(monkeypatch):
    monkeypatch.setattr(xla, "MAJOR", 7)
    xla._version.cache_clear()
    with pytest.raises(ImportError, match=r"jaxlib: expected version 7 of XLA's FFI, got 0\.\d"):
        xla.register("numbabn_test_never", scale)
    monkeypatch.undo()
    assert xla._version()[0] == 0


def test_no_copies():
    """Arrays lie where JAX has them."""
    places = []

    def look(settings, given, outputs):
        places.append((given[0].ctypes.data, outputs[0].ctypes.data))
        outputs[0][...] = 7

    xla.register("numbabn_test_look", look)
    x = jnp.zeros((64, 1024))
    output = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
    (y,) = jax.jit(lambda x: xla.call("numbabn_test_look", output, {}, x))(x)
    y.block_until_ready()
    assert places == [(x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer())]
    assert (y == 7).all()
    assert not x.any()


def test_mapped_axes_are_in_front():
    x, other = jnp.ones((4, 2, 3)), jnp.ones(5)
    y, _ = jax.vmap(lambda x: call(x, other, by=3), in_axes=1, out_axes=(1, 0))(x)
    assert seen[-1][1] == [(2, 4, 3), (1, 5)]
    np.testing.assert_array_equal(y, 3 * x)


@pytest.mark.parametrize("wrap", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_what_goes_wrong_is_told(wrap):
    """By an error whose type is JAX's choice."""
    run = wrap(lambda x: call(x, fail="no kernels, näher besehen")[0])
    with pytest.raises(
        (jax.errors.JaxRuntimeError, ValueError), match="RuntimeError: no kernels, näher besehen"
    ):
        run(jnp.ones(3)).block_until_ready()
    np.testing.assert_array_equal(call(jnp.ones(3), by=2)[0], [2, 2, 2])


PROGRAM = """
import atexit, time
import jax, jax.numpy as jnp, numpy as np

{before}
from numbabn import xla

def run(settings, given, outputs):
    time.sleep(0.02)
    outputs[0][...] = given[0]

xla.register("slow", run)
x = jnp.ones((512, 512))
slow = jax.jit(lambda x: xla.call("slow", (x,), {{}}, jnp.tanh(x) + jnp.cosh(x))[0] + 1)
{between}
for _ in range(5):
    y = slow(x)
{after}
"""


USE = "atexit.register(lambda: np.testing.assert_allclose({y}, np.tanh(1) + np.cosh(1) + 1))"


def finish(before="", between="", after=""):
    code = PROGRAM.format(before=before, between=between, after=after)
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize(
    "program",
    [
        {},
        {"after": "del y"},
        {"before": USE.format(y="y")},
        {"between": USE.format(y="slow(x)")},
        {"after": "x.delete()"},
    ],
    ids=["kept", "dropped", "used by an exit handler", "begun by one", "with deleted arrays"],
)
def test_a_program_may_end_while_it_computes(program):
    done = finish(**program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_call_too_late_is_refused():
    done = finish(before=USE.format(y="slow(x)"))
    assert "numbabn: expected calls before the interpreter ends" in done.stderr
