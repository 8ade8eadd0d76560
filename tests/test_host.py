"""Arrays on the host other than plain NumPy arrays: other libraries', and subclasses."""

import os
import subprocess
import sys
import tracemalloc
import warnings

import cases
import ml_dtypes
import numpy as np
import pytest
from problem import Host, Problem, check_inference, check_statistics, check_training

import numbabn
from numbabn import cpu, host, reference
from numbabn.libraries import float64_in_jax
from numbabn.results import SMALLEST

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = cases.TOLERANCES | cases.NARROW
# Before, NumPy takes all that comes by DLPack for read-only.
WRITTEN_BY_DLPACK = np.lib.NumpyVersion(np.__version__) >= "2.1.0"
LARGE = (16, 32, 16, 16)  # in the pool
SHAPES = {"planes": ((3, 5, 13), 1), "rows": ((3, 5, 7, 33), -1)}


class NumPyArrays(Host):
    """NumPy itself, to compare with."""

    kind = np.ndarray


class Torch(Host):
    """PyTorch, with every dtype, but no step backwards."""

    dtypes = tuple(DTYPES)
    is_written = True

    def __init__(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what importing it says is not ours to mend
            self.torch = pytest.importorskip("torch")
        self.kind = self.torch.Tensor

    def put(self, array):
        if array is None:
            return None
        if array.dtype == BFLOAT16:
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def get(self, array):
        if array.dtype == self.torch.bfloat16:
            return array.view(self.torch.int16).numpy().view(BFLOAT16)
        return array.numpy()

    def address(self, array):
        return array.data_ptr()


class Strict(Host):
    """The array API standard, and nothing else."""

    dtypes = ("float32", "float64")
    is_written = WRITTEN_BY_DLPACK

    def __init__(self):
        self.namespace = pytest.importorskip("array_api_strict")
        self.kind = type(self.namespace.zeros(1))

    def put(self, array):
        return array if array is None else self.namespace.asarray(array)

    def get(self, array):
        return np.from_dlpack(array)

    def address(self, array):
        return self.get(array).ctypes.data


class JAX(Host):
    """JAX, whose arrays are never written."""

    dtypes = tuple(DTYPES)
    is_written = False

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.kind = self.jax.Array

    def put(self, array):
        if array is None:
            return None
        with float64_in_jax():
            return self.jax.numpy.asarray(array)

    def get(self, array):
        return np.asarray(array)

    def address(self, array):
        return array.unsafe_buffer_pointer()


class Exporter:
    """An array of no library with a namespace: it has DLPack alone."""

    def __init__(self, array):
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class DLPackAlone(Host):
    """Results come back as NumPy's arrays."""

    dtypes = ("float16", "float32", "float64")
    is_written = WRITTEN_BY_DLPACK
    kind = np.ndarray

    def put(self, array):
        return array if array is None else Exporter(array)

    def get(self, array):
        return array.array if isinstance(array, Exporter) else array

    def address(self, array):
        return self.get(array).ctypes.data


LIBRARIES = {each.__name__: each for each in (Torch, Strict, JAX, DLPackAlone)}


@pytest.fixture(params=LIBRARIES.values(), ids=LIBRARIES)
def on(request):
    return request.param()


@pytest.fixture
def jax():
    return JAX()


@pytest.fixture
def torch():
    return Torch()


def each_dtype(on):
    return [(np.dtype(DTYPES[name].dtype).type, DTYPES[name].ulp) for name in on.dtypes]


def operands(shape=(6, 4, 5), dtype=np.float32):
    p = Problem(shape, 1, dtype, 2**-23, with_residual=True, activation="relu")
    names = ("x", "dy", "residual", "weight", "bias", "running_mean", "running_var")
    return {name: getattr(p, name) for name in names}


class TestOtherLibraries:
    @pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
    def test_against_the_oracle(self, on, shape, axis):
        for dtype, ulp in each_dtype(on):
            options = {"with_residual": True, "activation": "relu", "on": on}
            p = Problem(shape, axis, dtype, ulp, **options)
            check_inference(p)
            check_statistics(shape, axis, dtype, NumPyStatistics(on))
            if on.is_written:  # running statistics are updated in place
                check_training(p)

    def test_the_same_bits_as_numpy(self, on):
        given = operands()
        dy = given.pop("dy")
        del given["running_mean"], given["running_var"]
        result, plain = (
            where.call(numbabn.batch_norm_forward, **given, activation="relu")
            for where in (on, NumPyArrays())
        )
        saved = [given["x"], given["weight"], plain.mean, plain.invstd]
        gradients = [
            where.call(numbabn.batch_norm_backward, dy, *saved, mask=plain.mask, with_residual=True)
            for where in (on, NumPyArrays())
        ]
        for got, expected in zip((*result, *gradients[0]), (*plain, *gradients[1]), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)

    def test_results_are_the_callers_kind(self, on):
        given = on.put_all(operands())
        dy = given.pop("dy")
        running = {name: given.pop(name) for name in ("running_mean", "running_var")}
        result = numbabn.batch_norm_forward(**given, activation="relu")
        gradients = numbabn.batch_norm_backward(
            dy, given["x"], given["weight"], result.mean, result.invstd,
            mask=result.mask, with_residual=True,
        )  # fmt: skip
        y = numbabn.batch_norm_inference(**given, **running)
        z = numbabn.batch_norm(**given, **running)
        for array in (*result, *gradients, y, z):
            assert isinstance(array, on.kind)

    def test_statistics_are_numpy(self, on):
        stats = numbabn.batch_stats(on.put(operands()["x"]))
        for array in (stats.mean, stats.m2, (stats + stats).mean):
            assert type(array) is np.ndarray
            assert array.dtype == np.float64

    def test_an_empty_batch(self, on):
        x = on.put(np.empty((0, 3, 2), np.float32))
        result = numbabn.batch_norm_forward(x)
        assert tuple(result.y.shape) == (0, 3, 2)
        gradients = numbabn.batch_norm_backward(x, x, None, result.mean, result.invstd)
        np.testing.assert_array_equal(on.get(gradients.dweight), np.zeros(3))

    def test_nothing_is_copied_on_the_way_in(self, on):
        for dtype, _ in each_dtype(on):
            x = on.put(cases.normal(LARGE, dtype))
            (seen,) = host.borrow(("x",), (x,))
            assert seen.ctypes.data == on.address(x)
            assert seen.dtype == dtype

    def test_nothing_is_copied_on_the_way_out(self, on, monkeypatch):
        made = []

        def recorded(x, empty_like=cpu.empty_like):
            made.append(empty_like(x))
            return made[-1]

        monkeypatch.setattr(cpu, "empty_like", recorded)
        for dtype, _ in each_dtype(on):
            x = on.put(cases.normal(LARGE, dtype))
            assert made == []
            y = numbabn.batch_norm(x, training=True)
            assert on.address(y) == made.pop().ctypes.data

    def test_no_copy_beside_the_result(self, on):
        x = on.put(np.ones(LARGE, np.float32))
        nbytes = on.get(x).nbytes
        numbabn.batch_norm(x, training=True)
        tracemalloc.start()
        numbabn.batch_norm(x, training=True)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.2 * nbytes

    def test_a_result_keeps_its_memory(self, on):
        x = on.put(cases.normal(LARGE, np.float32))
        assert on.get(x).nbytes >= SMALLEST
        y = numbabn.batch_norm(x, training=True)
        before = on.get(y).copy()
        others = [numbabn.batch_norm(on.put(cases.normal(LARGE, np.float32, seed=s)), training=True)
                  for s in range(3)]  # fmt: skip
        del others
        np.testing.assert_array_equal(on.get(y), before)

    def test_out_and_running_statistics_are_written_in_place(self, on):
        if not on.is_written:
            pytest.skip("its arrays are read-only; test_jax_is_never_written tells what then")
        given = operands()
        del given["dy"]
        expected = numbabn.batch_norm(**(plain := {k: a.copy() for k, a in given.items()}),
                                      training=True)  # fmt: skip
        there = on.put_all(given)
        out = on.put(np.zeros_like(given["x"]))
        assert numbabn.batch_norm(**there, training=True, out=out) is out
        np.testing.assert_array_equal(on.get(out), expected)
        for name in ("running_mean", "running_var"):
            np.testing.assert_array_equal(on.get(there[name]), plain[name])

    def test_in_place(self, on):
        if not on.is_written:
            pytest.skip("its arrays are read-only; test_jax_is_never_written tells what then")
        x = on.put(operands()["x"])
        expected = on.call(numbabn.batch_norm, operands()["x"], training=True)
        assert numbabn.batch_norm(x, training=True, out=x) is x
        np.testing.assert_array_equal(on.get(x), expected)

    def test_running_statistics_alone(self, on):
        stats = numbabn.batch_stats(operands()["x"])
        given = operands()
        mean, var = given["running_mean"], given["running_var"]
        there = on.put(mean.copy()), on.put(var.copy())
        if on.is_written:
            numbabn.update_running_stats(*there, stats)
            numbabn.update_running_stats(mean, var, stats)
        else:
            with pytest.raises(ValueError, match="running_mean: expected a writeable array"):
                numbabn.update_running_stats(*there, stats)
        np.testing.assert_array_equal(on.get(there[0]), mean)
        np.testing.assert_array_equal(on.get(there[1]), var)


class NumPyStatistics(Host):
    """Data of a library, statistics of NumPy."""

    def __init__(self, on):
        self.put = on.put


class TestRefused:
    @pytest.mark.parametrize("name", ["weight", "residual", "running_var", "out"])
    def test_arrays_of_two_libraries(self, on, name):
        given = operands()
        given["out"] = given.pop("dy")
        before = {key: array.copy() for key, array in given.items()}
        there = on.put_all(given)
        if on.kind is not np.ndarray:
            mixed = there | {name: given[name]}
            with pytest.raises(TypeError, match=rf"^{name}: expected a .* as x is, got ndarray$"):
                numbabn.batch_norm(**mixed, training=True)
        mixed = given | {name: there[name]}
        with pytest.raises(TypeError, match=rf"^{name}: expected a NumPy array, got "):
            numbabn.batch_norm(**mixed, training=True)
        for key, array in before.items():
            np.testing.assert_array_equal(on.get(there[key]), array)
            np.testing.assert_array_equal(given[key], array)

    def test_no_array_beside_one(self, on):
        with pytest.raises(TypeError, match=r"^weight: expected a .* as x is, got list$"):
            numbabn.batch_norm(on.put(np.ones((4, 3))), weight=[1.0] * 3, training=True)

    def test_a_stream(self, on):
        with pytest.raises(TypeError, match="stream: expected None for arrays on the CPU, got int"):
            numbabn.batch_norm(on.put(np.ones((4, 3))), training=True, stream=7)

    def test_dtypes_and_shapes_are_checked_as_numpys(self, on):
        with pytest.raises(TypeError, match=r"x: expected float16, .* or float64, got int32"):
            numbabn.batch_norm(on.put(np.ones((4, 3), np.int32)), training=True)
        x, weight = (on.put(np.ones(shape, np.float32)) for shape in ((4, 3), 4))
        with pytest.raises(ValueError, match=r"weight: expected shape \(3,\), got \(4,\)"):
            numbabn.batch_norm(x, weight=weight, training=True)

    def test_jax_is_never_written(self, jax):
        there = jax.put_all(operands())
        out = there.pop("dy")
        before = [jax.get(array).copy() for array in (*there.values(), out)]
        with pytest.raises(ValueError, match=r"^running_mean: expected a writeable array"):
            numbabn.batch_norm(**there, training=True)
        with pytest.raises(ValueError, match=r"^out: expected a writeable array"):
            numbabn.batch_norm(**there, out=out)
        for array, expected in zip((*there.values(), out), before, strict=True):
            np.testing.assert_array_equal(jax.get(array), expected)

    def test_jax_in_pieces(self):
        pytest.importorskip("jax")
        code = (
            "import jax, numbabn\n"
            "from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
            "mesh = Mesh(jax.devices(), 'n')\n"
            "x = jax.device_put(jax.numpy.ones((4, 3)), NamedSharding(mesh, PartitionSpec('n')))\n"
            "try: numbabn.batch_norm(x, training=True)\n"
            "except TypeError as error: print(error)\n"
            "y = numbabn.batch_norm(jax.device_put(x, jax.devices()[1]), training=True)\n"
            "assert y.devices() == {jax.devices()[1]}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
        )  # fmt: skip
        assert "x: expected an array that NumPy can read where it is" in done.stdout
        assert "spread over 2 devices" in done.stdout

    def test_jax_deleted(self, jax):
        x, weight = jax.put(np.ones((4, 3), np.float32)), jax.put(np.ones(3, np.float32))
        weight.delete()
        with pytest.raises(TypeError, match=r"^weight: .*, got a ArrayImpl: .* deleted"):
            numbabn.batch_norm(x, weight=weight, training=True)
        x.delete()
        for function in (numbabn.batch_stats, numbabn.BatchNorm(3), numbabn.batch_norm_forward):
            with pytest.raises(TypeError, match=r"^x: .*, got a ArrayImpl: .* deleted"):
                function(x)

    def test_jax_within_a_traced_function(self, jax):
        with pytest.raises(TypeError, match=r"x: expected an array on .*Tracer, .* numbabn\.jax "):
            jax.jax.jit(lambda x: numbabn.batch_norm(x, training=True))(jax.put(np.ones((4, 3))))

    def test_torch_that_numpy_cannot_read(self, torch):
        lazy = torch.torch.zeros(4, 3, dtype=torch.torch.complex64).conj().imag
        for x in (lazy, torch.torch.ones(4, 3).to_sparse()):
            with pytest.raises(TypeError, match="x: expected an array that NumPy can read where"):
                numbabn.batch_norm(x, training=True)


def test_torch_records_no_gradients(torch):
    weight = torch.torch.nn.Parameter(torch.torch.ones(3))
    x = torch.torch.ones(4, 3, requires_grad=True)
    y = numbabn.batch_norm(x, weight=weight, training=True)
    assert type(y) is torch.torch.Tensor
    assert not y.requires_grad


WRITTEN = {
    "out": lambda x, mean, var, out: numbabn.batch_norm(x, mean, var, out=out),
    "in place": lambda x, mean, var, out: numbabn.batch_norm_forward(x, out=x),
    "dx": lambda x, mean, var, out: numbabn.batch_norm_backward(x, x, None, mean, var, out=out),
    "running": lambda x, mean, var, out: numbabn.batch_norm(x, mean, var, training=True),
    "alone": lambda x, mean, var, out: numbabn.update_running_stats(
        mean, var, numbabn.batch_stats(x)
    ),
}


@pytest.mark.parametrize("call", WRITTEN.values(), ids=WRITTEN)
def test_torch_is_told_what_was_written(torch, call):
    """A gradient that would be of other numbers than those that were saved is an error."""
    given = operands()
    arrays = [given[name] for name in ("x", "running_mean", "running_var", "dy")]
    tensors = [torch.put(array.copy()) for array in arrays]
    ones = [torch.torch.ones(array.shape, requires_grad=True) for array in arrays]
    products = [(one * tensor).sum() for one, tensor in zip(ones, tensors, strict=True)]
    call(*tensors)
    written = 0
    for array, tensor, product in zip(arrays, tensors, products, strict=True):
        if np.array_equal(array, tensor):
            product.backward()
        else:
            written += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()
    assert written


def test_torch_is_told_nothing_of_an_empty_batch(torch):
    mean, var = torch.torch.zeros(3), torch.torch.ones(3)
    numbabn.batch_norm(torch.torch.ones(0, 3), mean, var, training=True)
    assert (mean._version, var._version) == (0, 0)


def test_torch_in_inference_mode(torch):
    """Its tensors have no count of what is written."""
    with torch.torch.inference_mode():
        x, mean, var = torch.torch.rand(4, 3), torch.torch.zeros(3), torch.torch.ones(3)
    assert numbabn.batch_norm(x, mean, var, training=True, out=x) is x
    numbabn.update_running_stats(mean, var, numbabn.batch_stats(x))
    assert mean.all()


@pytest.mark.filterwarnings("ignore")  # of all that Dynamo cannot see through
def test_torch_compiles_around_it(torch):
    x = torch.put(operands()["x"])

    def function(x, out):
        return numbabn.batch_norm(x, training=True, out=out) + 1

    expected = function(x, None)
    compiled = torch.torch.compile(function, backend="eager")
    for out in (None, torch.torch.empty_like(x)):
        np.testing.assert_array_equal(compiled(x, out), expected)


def test_torch_of_any_strides(torch):
    p = Problem((9, 4, 5, 6), 1, np.float32, 2**-23, with_residual=True, activation="relu")
    given = {name: torch.put(getattr(p, name)) for name in ("x", "weight", "bias")}
    given["x"] = given["x"].to(memory_format=torch.torch.channels_last)
    y = numbabn.batch_norm(**given, training=True)
    assert y.stride() == given["x"].stride()
    expected, _, _ = reference.forward(p.x, p.weight, p.bias)
    np.testing.assert_allclose(y.numpy(), expected, atol=1e-5)


def test_jax_results_are_those_that_were_still_computed(jax):
    """Its functions return before they are done."""
    slow = jax.jax.jit(lambda x: jax.jax.lax.fori_loop(0, 60, lambda i, z: jax.jax.numpy.sin(z), x))
    x = cases.normal((64, 64, 16, 16), np.float32)
    y = numbabn.batch_norm(slow(jax.put(x)), training=True)
    expected, _, _ = reference.forward(jax.get(slow(jax.put(x))))
    np.testing.assert_allclose(jax.get(y), expected, atol=1e-5)


def test_jax_before_it_had_enable_x64(jax, monkeypatch):
    new = jax.jax.enable_x64
    monkeypatch.delattr(jax.jax, "enable_x64")
    monkeypatch.setattr("jax.experimental.enable_x64", lambda: new(True), raising=False)
    result = numbabn.batch_norm_forward(jax.put(operands()["x"]))
    assert result.mean.dtype == np.float64


def test_results_are_on_the_device_of_x():
    xp = pytest.importorskip("array_api_strict")
    device = xp.Device("device1")
    x = xp.asarray(operands()["x"], device=device)
    stats = numbabn.batch_stats(x)
    np.testing.assert_array_equal(stats.mean, numbabn.batch_stats(operands()["x"]).mean)
    result = numbabn.batch_norm_forward(x)
    assert {result.y.device, result.mean.device, result.invstd.device} == {device}


class TestLayer:
    def test_parameters_stay_numpy(self, on):
        ours, theirs = numbabn.BatchNorm(4), numbabn.BatchNorm(4)
        given = operands()
        x, dy = given["x"], given["dy"]
        for training in (True, False):
            ours.train(training)
            theirs.train(training)
            y, expected = theirs(on.put(x)), ours(x)
            assert isinstance(y, on.kind)
            np.testing.assert_array_equal(on.get(y), expected)
            dx = theirs.backward(on.put(dy))
            assert isinstance(dx, on.kind)
            np.testing.assert_array_equal(on.get(dx), ours.backward(dy))
            np.testing.assert_array_equal(theirs.grad_weight, ours.grad_weight)
        for name, array in ours.state_dict().items():
            assert type(theirs.state_dict()[name]) is np.ndarray
            np.testing.assert_array_equal(theirs.state_dict()[name], array)
        theirs(x)  # takes NumPy's arrays still

    @pytest.mark.parametrize("library", [Torch, Strict, JAX])
    def test_backward_takes_the_library_of_forward(self, library):
        on, layer = library(), numbabn.BatchNorm(4)
        layer(on.put(operands()["x"]))
        with pytest.raises(TypeError, match=r"^dy: expected a .* as x is, got ndarray$"):
            layer.backward(operands()["dy"])
        assert layer.grad_weight is None

    def test_an_error_leaves_it_as_it_was(self, on):
        layer = numbabn.BatchNorm(4)
        before = layer.state_dict()
        with pytest.raises(ValueError, match="x: expected 4 channels"):
            layer(on.put(np.ones((6, 3), np.float32)))
        with pytest.raises(ValueError, match="x: expected more than one value per channel"):
            layer(on.put(np.ones((1, 4), np.float32)))
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(array, before[name])

    def test_torch_parameters_are_copied_to_a_state_dict(self, torch):
        layer = numbabn.BatchNorm(3)
        layer.weight = torch.torch.full((3,), 2.0)
        np.testing.assert_array_equal(layer.state_dict()["weight"], [2, 2, 2])
        for x in (np.ones((4, 3), np.float32), torch.torch.ones(4, 3)):
            with pytest.raises(TypeError, match=r"^weight: expected a NumPy array, got Tensor"):
                layer(x)

    def test_loads_arrays_of_every_library(self, on):
        given = operands()
        names = ("weight", "bias", "running_mean", "running_var")
        layer = numbabn.BatchNorm(4, dtype=np.float64)
        for dtype, _ in each_dtype(on):
            state = {name: given[name].astype(dtype) for name in names}
            layer.load_state_dict(on.put_all(state))
            for name, array in state.items():
                np.testing.assert_array_equal(getattr(layer, name), array.astype(np.float64))


class Measured(np.ndarray):
    """As NumPy's documentation writes a subclass with an attribute."""

    def __new__(cls, array, unit=None):
        new = np.asarray(array).view(cls)
        new.unit = unit
        return new

    def __array_finalize__(self, array):
        self.unit = getattr(array, "unit", None)


class Counting(np.ndarray):
    """Has a say in what comes out of a function, and no ufuncs."""

    __array_ufunc__ = None

    def __array_wrap__(self, array, context=None, return_scalar=False):
        wrapped = super().__array_wrap__(array, context, return_scalar)
        wrapped.times = getattr(self, "times", 0) + 1
        return wrapped


class Quantity(np.ndarray):
    """Has NumPy's functions ask it, as those of units do."""

    def __array_function__(self, function, types, args, kwargs):
        return NotImplemented


class TestSubclasses:
    def test_results_of_xs_shape_are_xs_kind(self):
        given = operands()
        plain = numbabn.batch_norm_forward(given["x"], activation="relu")
        x = Measured(given["x"], "m")
        result = numbabn.batch_norm_forward(x, activation="relu")
        gradients = numbabn.batch_norm_backward(
            given["dy"], x, given["weight"], result.mean, result.invstd,
            mask=result.mask, with_residual=True,
        )  # fmt: skip
        mean, var = given["running_mean"], given["running_var"]
        y, z = numbabn.batch_norm(x, mean, var), numbabn.batch_norm_inference(x, mean, var)
        for array in (result.y, gradients.dx, gradients.dresidual, y, z):
            assert type(array) is Measured
            assert array.unit == "m"
        stats = numbabn.batch_stats(x)
        for array in (
            result.mean, result.invstd, result.mask, gradients.dweight, gradients.dbias,
            stats.mean, stats.m2,
        ):  # fmt: skip
            assert type(array) is np.ndarray
        np.testing.assert_array_equal(result.y, plain.y)

    def test_x_alone_decides(self):
        given = operands()
        given["dy"] = Measured(given["dy"], "m")
        given["residual"], given["weight"] = Measured(given["residual"]), Measured(given["weight"])
        dy = given.pop("dy")
        result = numbabn.batch_norm_forward(**given)
        gradients = numbabn.batch_norm_backward(
            dy, given["x"], given["weight"], *result[1:3], with_residual=True
        )
        for array in (result.y, *gradients):
            assert type(array) is np.ndarray

    def test_as_numpys_functions_of_whole_arrays(self):
        """They ask ``__array_wrap__``, and not ``__array_ufunc__``."""
        x = cases.normal((4, 4)).view(Counting)
        assert np.linalg.inv(x).times == 1
        y = numbabn.batch_norm(x, training=True)
        assert type(y) is Counting
        assert y.times == 1
        assert numbabn.batch_norm(y, training=True).times == 2

    def test_out_comes_back_itself(self):
        given = operands()
        x, out = given["x"].view(Measured), given["dy"].view(Measured)
        assert numbabn.batch_norm(x, training=True, out=out) is out
        expected = numbabn.batch_norm(given["x"], training=True)
        np.testing.assert_array_equal(out, expected)
        assert numbabn.batch_norm(given["x"], training=True, out=out) is out
        assert numbabn.batch_norm(x, training=True, out=x) is x
        np.testing.assert_array_equal(x, expected)

    def test_running_statistics_may_be_of_one(self):
        given = operands()
        plain = {name: given[name].copy() for name in ("running_mean", "running_var")}
        numbabn.batch_norm(given["x"], **plain, training=True)
        own = {name: given[name].copy().view(Measured) for name in plain}
        numbabn.batch_norm(given["x"].view(Measured), **own, training=True)
        for name, array in plain.items():
            np.testing.assert_array_equal(own[name], array)
        stats = numbabn.batch_stats(given["x"])
        for running in (plain, own):
            numbabn.update_running_stats(*running.values(), stats)
        np.testing.assert_array_equal(own["running_var"], plain["running_var"])

    @pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
    def test_a_matrix_gives_a_matrix(self):
        x = cases.normal((6, 4))
        y = numbabn.batch_norm(np.matrix(x), training=True)
        assert type(y) is np.matrix
        np.testing.assert_array_equal(np.asarray(y), numbabn.batch_norm(x, training=True))

    def test_overlap_is_seen_through_them(self):
        x = cases.normal((9, 4)).view(Measured)
        before = x.copy()
        with pytest.raises(ValueError, match="out: expected memory of its own, got an overlap"):
            numbabn.batch_norm(x[1:], training=True, out=x[:-1])
        np.testing.assert_array_equal(x, before)

    @pytest.mark.parametrize(
        ("convert", "reason"),
        [
            (np.ma.masked_array, "MaskedArray, whose mask would be ignored"),
            (lambda a: a.view(Quantity), "Quantity, whose __array_function__ NumPy would ask"),
        ],
        ids=["masked", "with functions of its own"],
    )
    @pytest.mark.parametrize("name", ["x", "weight", "residual", "running_mean", "out"])
    def test_refused(self, convert, reason, name):
        given = operands()
        given["out"] = given.pop("dy")
        before = {key: array.copy() for key, array in given.items()}
        with pytest.raises(TypeError, match=rf"^{name}: expected a.* array.*got {reason}"):
            numbabn.batch_norm(**given | {name: convert(given[name])}, training=True)
        for key, array in before.items():
            np.testing.assert_array_equal(given[key], array)

    def test_a_layer_gives_xs_kind(self):
        given = operands()
        layer = numbabn.BatchNorm(4)
        for training in (True, False):
            layer.train(training)
            assert type(layer(given["x"].view(Measured))) is Measured
            assert type(layer.backward(given["dy"])) is Measured
            assert type(layer.grad_weight) is np.ndarray
