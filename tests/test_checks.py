"""Every error of the public functions: its type, its message, and that nothing was written."""

import re
from fractions import Fraction
from importlib.util import find_spec
from math import inf, nan, prod

import cases
import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import numbabn
from numbabn import BatchStats, checks
from numbabn.libraries import DeviceArray, Place, form_of

SHAPE = (4, 3, 2, 2)
FULL = ("x", "residual", "dy", "out")  # arguments of x's shape and dtype
SWEEP = ("x", "residual", "out", "weight", "bias", "running_mean", "running_var")
FUNCTIONS = {
    "batch_norm training": (numbabn.batch_norm, SWEEP, {"training": True}),
    "batch_norm": (numbabn.batch_norm, SWEEP, {}),
    "forward": (numbabn.batch_norm_forward, SWEEP, {}),
    "inference": (numbabn.batch_norm_inference, SWEEP, {}),
    "backward": (numbabn.batch_norm_backward, ("x", "dy", "out", "weight", "mean", "invstd"), {}),
    "stats": (numbabn.batch_stats, ("x",), {}),
    "update": (numbabn.update_running_stats, ("running_mean", "running_var", "stats"), {}),
}
TRAINING = ("batch_norm training", "forward")
INFERENCE = ("batch_norm", "inference")
SWEEPS = TRAINING + INFERENCE
INTO_OUT = (*SWEEPS, "backward")
WITH_X = (*INTO_OUT, "stats")
UPDATING = (*TRAINING, "update")


def valid(call, shape=SHAPE):
    """Arguments by which the call succeeds, if `shape` allows it; no two elements alike."""
    _, names, others = FUNCTIONS[call]
    C = shape[1] if len(shape) > 1 else 3

    def argument(name):
        seed = sum(map(ord, name))
        if name == "stats":
            return BatchStats(16, *(np.arange(C) + 1.0 for _ in range(2)))
        if name in FULL:  # with an element to spare, for a view shifted by one
            return cases.normal(prod(shape) + 1, np.float32, seed=seed)[:-1].reshape(shape)
        dtype = np.float64 if takes_both(call, name) else np.float32
        return np.abs(cases.normal(C, dtype, seed=seed)) + dtype(1)

    return {name: argument(name) for name in names} | others


def takes_both(call, name):
    """Whether the argument may be float32 or float64 by itself."""
    return name in ("x", "mean", "invstd") or call == "update"


def contents(arguments):
    arrays = [a for a in arguments.values() if isinstance(a, np.ndarray)]
    return [a.tobytes() for a in arrays]


def refused(call, arguments, error, name, expected, came):
    """Call; check the error's type, the three parts of its message and that nothing is written."""
    before = contents(arguments)
    with pytest.raises(error) as caught:
        FUNCTIONS[call][0](**arguments)
    assert contents(arguments) == before
    parts = rf"{name}: expected .*{re.escape(expected)}.*, got .*{re.escape(came)}"
    assert re.match(parts, str(caught.value)), caught.value


def array_for(name):
    """Name what is expected of x, and of what is beside it."""
    return "an array on the CPU or a CUDA device" if name == "x" else "a NumPy array"


def over(*names, calls=FUNCTIONS):
    """Run the test for each of the arguments in each of the calls that take it."""
    pairs = [(call, name) for call in calls for name in names if name in FUNCTIONS[call][1]]
    return pytest.mark.parametrize(("call", "name"), pairs)


def over_calls(*calls):
    return pytest.mark.parametrize("call", calls)


arrays = over(*FULL, "weight", "bias", "running_mean", "running_var", "mean", "invstd")
per_channel = over("weight", "bias", "running_mean", "running_var", "mean", "invstd")


class OnADevice:
    """What an array on a GPU looks like to who does not touch it."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "version": 3, "shape": SHAPE, "typestr": "<f4", "data": (0, False),
    }  # fmt: skip


class OnTheCPU:
    """What an array of another library looks like that is on no GPU, but gives no memory."""

    def __dlpack_device__(self):
        return 1, 0


def seen(array, *, address=None, writeable=True):
    """See a NumPy array as if it were on a device; its memory is not there to be read."""
    address = array.ctypes.data if address is None else address
    form = form_of(array.shape, array.strides, array.dtype)
    return DeviceArray(None, Place(None, 0, 0, False), address, form, writeable)


class TestKindsAndDtypes:
    @arrays
    @pytest.mark.parametrize("dtype", [np.int64, np.complex64, np.object_, np.bool_, np.longdouble])
    def test_no_float(self, call, name, dtype):
        arguments = valid(call)
        arguments[name] = np.ones(arguments[name].shape, dtype)
        refused(call, arguments, TypeError, name, "float32", str(arguments[name].dtype))

    @arrays
    def test_byte_swapped(self, call, name):
        arguments = valid(call)
        swapped = arguments[name].dtype.newbyteorder()
        arguments[name] = arguments[name].astype(swapped)
        refused(call, arguments, TypeError, name, "float32", f"{swapped} (byte-swapped)")

    @over("residual", "dy", "out", "weight", "bias", "running_mean", "running_var", calls=WITH_X)
    @pytest.mark.parametrize(("x", "other"), [("float32", "float64"), ("float64", "float32")])
    def test_another_float_than_x(self, call, name, x, other):
        arguments = valid(call)
        for each in set(arguments) & {*SWEEP, "dy"}:
            arguments[each] = arguments[each].astype(other if each == name else x)
        refused(call, arguments, TypeError, name, x, other)

    @arrays
    @pytest.mark.parametrize(
        ("convert", "kind"),
        [
            (lambda a: a.tolist(), "list"),
            (lambda a: 1.0, "float"),
            (np.ma.masked_array, "MaskedArray"),
        ],
        ids=["list", "number", "masked"],
    )
    def test_no_numpy_array(self, call, name, convert, kind):
        arguments = valid(call)
        arguments[name] = convert(arguments[name])
        refused(call, arguments, TypeError, name, array_for(name), kind)

    @over("residual", "dy", "out", "weight", "bias", "running_mean", "running_var", calls=WITH_X)
    def test_on_a_device_beside_numpy(self, call, name):
        arguments = valid(call) | {name: OnADevice()}
        refused(call, arguments, TypeError, name, "a NumPy array", "OnADevice")

    @over("x")
    def test_of_another_library_on_the_cpu_that_cannot_be_read(self, call, name):
        arguments = dict.fromkeys(FUNCTIONS[call][1]) | FUNCTIONS[call][2]
        arguments[name] = OnTheCPU()
        refused(call, arguments, TypeError, name, "NumPy can read", "a OnTheCPU")

    @pytest.mark.skipif(find_spec("numba_cuda") is not None, reason="numba-cuda is there")
    @over("x")
    def test_on_a_device_without_numba_cuda(self, call, name):
        before = contents(arguments := valid(call) | {name: OnADevice()})
        with pytest.raises(RuntimeError, match=r"numba-cuda.*numbabn\[cuda13\]"):
            FUNCTIONS[call][0](**arguments)
        assert contents(arguments) == before

    @over_calls(*WITH_X)
    @pytest.mark.parametrize("stream", [0, 7, object()], ids=["0", "7", "object"])
    def test_a_stream_beside_numpy(self, call, stream):
        arguments = valid(call) | {"stream": stream}
        refused(call, arguments, TypeError, "stream", "None", type(stream).__name__)

    @over("x", "dy", "mean", "invstd")
    def test_none(self, call, name):
        refused(call, valid(call) | {name: None}, TypeError, name, array_for(name), "NoneType")

    @pytest.mark.parametrize(
        "stats", [None, (2, np.ones(3), np.ones(3)), {"count": 2}], ids=["None", "tuple", "dict"]
    )
    def test_stats(self, stats):
        arguments = valid("update") | {"stats": stats}
        refused("update", arguments, TypeError, "stats", "BatchStats", type(stats).__name__)


class TestShapes:
    @over("residual", "dy", "out")
    @pytest.mark.parametrize("change", [lambda a: a[:3], lambda a: a.reshape(4, 3, 4)])
    def test_unlike_x(self, call, name, change):
        arguments = valid(call)
        arguments[name] = change(arguments[name])
        refused(call, arguments, ValueError, name, str(SHAPE), str(arguments[name].shape))

    @per_channel
    @pytest.mark.parametrize("shape", [(2,), (4,), (1,), (3, 1), (1, 3), ()], ids=str)
    def test_per_channel(self, call, name, shape):
        arguments = valid(call)
        arguments[name] = np.ones(shape, arguments[name].dtype)
        refused(call, arguments, ValueError, name, "(3,)", str(shape))

    @over_calls(*WITH_X)
    @pytest.mark.parametrize("shape", [(3,), ()], ids=str)
    def test_fewer_than_two_dimensions(self, call, shape):
        refused(call, valid(call, shape), ValueError, "x", "2 or more dimensions", str(shape))

    @over_calls(*WITH_X)
    @pytest.mark.parametrize("shape", [(4, 0), (0, 0, 2)], ids=str)
    def test_no_channels(self, call, shape):
        refused(call, valid(call, shape), ValueError, "x", "a channel or more", str(shape))

    @over_calls(*TRAINING, "backward")
    @pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (1, 1)], ids=str)
    def test_one_value_per_channel_in_training(self, call, shape):
        refused(call, valid(call, shape), ValueError, "x", "more than one value", str(shape))

    def test_one_value_per_channel_otherwise(self):
        arguments = valid("inference", (1, 3))
        arguments["residual"] = None
        y = numbabn.batch_norm_inference(**arguments)
        running_mean, running_var = (arguments[f"running_{name}"] for name in ("mean", "var"))
        x_hat = (arguments["x"] - running_mean) / np.sqrt(running_var + 1e-5)
        np.testing.assert_allclose(y, x_hat * arguments["weight"] + arguments["bias"], rtol=1e-5)
        arguments = valid("backward", (1, 3)) | {"training": False}
        dx, _, dbias, _ = numbabn.batch_norm_backward(**arguments)
        np.testing.assert_array_equal(dbias, arguments["dy"][0])
        np.testing.assert_allclose(
            dx, arguments["dy"] * arguments["weight"] * arguments["invstd"], rtol=1e-6
        )

    @over("running_mean", "running_var", calls=INFERENCE)
    def test_inference_without_running_statistics(self, call, name):
        refused(call, valid(call) | {name: None}, ValueError, name, "in inference", "None")

    @pytest.mark.parametrize(
        ("mask", "error", "expected", "came"),
        [
            (np.zeros(5, np.uint8), ValueError, "(6,)", "(5,)"),
            (np.zeros(48, np.uint8), ValueError, "(6,)", "(48,)"),
            (np.zeros((6, 1), np.uint8), ValueError, "(6,)", "(6, 1)"),
            (np.zeros(6, np.bool_), TypeError, "uint8", "bool"),
            (np.zeros(6, np.int8), TypeError, "uint8", "int8"),
            ([0] * 6, TypeError, "a NumPy array", "list"),
        ],
        ids=["short", "an element each", "2-d", "bool", "int8", "list"],
    )
    def test_mask(self, mask, error, expected, came):
        refused("backward", valid("backward") | {"mask": mask}, error, "mask", expected, came)


# name: calls, ((value, error, what was expected, what came), ...)
NO_REAL_NUMBER = (
    ("0.1", TypeError, "a real number", "str"),
    (None, TypeError, "a real number", "NoneType"),
    (0.1j, TypeError, "a real number", "complex"),
    (True, TypeError, "a real number", "bool"),
    ([0.1], TypeError, "a real number", "list"),
    (nan, ValueError, "a finite number", "nan"),
    (inf, ValueError, "a finite number", "inf"),
    (-inf, ValueError, "a finite number", "-inf"),
    (10**400, ValueError, "a finite number", ""),
)
SCALARS = {
    "eps": (SWEEPS, (*NO_REAL_NUMBER, (-1e-9, ValueError, "0 or more", "-1e-09"))),
    "momentum": ((*UPDATING, "batch_norm"), NO_REAL_NUMBER),
    "correction": (
        UPDATING,
        (
            *NO_REAL_NUMBER,
            (16, ValueError, "less than the 16 values", "16"),
            (16.5, ValueError, "less than the 16 values", "16.5"),
        ),
    ),
    "axis": (
        WITH_X,
        (
            (4, ValueError, "-4 to 3", "4"),
            (-5, ValueError, "-4 to 3", "-5"),
            (1.0, TypeError, "an integer", "float"),
            (None, TypeError, "an integer", "NoneType"),
            ((1,), TypeError, "an integer", "tuple"),
        ),
    ),
    "activation": (
        SWEEPS,
        (
            ("gelu", ValueError, "None or 'relu'", "'gelu'"),
            ("ReLU", ValueError, "None or 'relu'", "'ReLU'"),
            (True, ValueError, "None or 'relu'", "True"),
        ),
    ),
} | {
    flag: (
        calls,
        (
            ("yes", TypeError, "True or False", "'yes'"),
            (None, TypeError, "True or False", "None"),
            (0.1, TypeError, "True or False", "0.1"),
            (2, TypeError, "True or False", "2"),
        ),
    )
    for flag, calls in {
        "training": ("batch_norm", "backward"),
        "with_residual": ("backward",),
    }.items()
}


class TestValues:
    @pytest.mark.parametrize(
        ("call", "name", "value", "error", "expected", "came"),
        [
            pytest.param(call, name, *row, id=f"{call}-{name}-{str(row[0])[:9]}")
            for name, (calls, rows) in SCALARS.items()
            for call in calls
            for row in rows
        ],
    )
    def test_scalars(self, call, name, value, error, expected, came):
        refused(call, valid(call) | {name: value}, error, name, expected, came)

    def test_correction_of_one_value(self):
        stats = BatchStats(1, np.ones(3), np.zeros(3))
        arguments = valid("update") | {"stats": stats}
        refused("update", arguments, ValueError, "correction", "less than the 1", "1")

    @pytest.mark.parametrize(
        "value",
        [1, np.int8(1), np.float16(0.25), np.longdouble(0.25), Fraction(1, 4)],
        ids=lambda value: type(value).__name__,
    )
    @pytest.mark.parametrize("name", ["eps", "momentum", "correction"])
    def test_any_real_number(self, name, value):
        """Enough channels that their number reaches a compiled kernel."""
        given, as_float = (valid("forward", (2, 16, 2, 2)) for _ in range(2))
        numbabn.batch_norm_forward(**given, **{name: value})
        numbabn.batch_norm_forward(**as_float, **{name: float(value)})
        for argument, array in given.items():
            np.testing.assert_array_equal(array, as_float[argument], err_msg=argument)


def shifted(array):
    return array.base[1:].reshape(array.shape)


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def strided(shape, strides):
    """Fresh memory in which the steps, given in elements, overlap."""
    memory = np.arange(64, dtype=np.float32)
    return as_strided(memory, shape, [4 * step for step in strides])


class TestMemory:
    @over("out", calls=INTO_OUT)
    def test_read_only_out(self, call, name):
        arguments = valid(call)
        arguments[name] = frozen(arguments[name])
        refused(call, arguments, ValueError, name, "a writeable array", "read-only")

    @over("running_mean", "running_var", calls=UPDATING)
    def test_read_only_running_statistics(self, call, name):
        arguments = valid(call)
        arguments[name] = frozen(arguments[name])
        refused(call, arguments, ValueError, name, "a writeable array", "read-only")

    @over("x", "residual", "dy", calls=INTO_OUT)
    @pytest.mark.parametrize(
        "view",
        [shifted, lambda a: a[::-1], lambda a: a.swapaxes(2, 3)],
        ids=["shifted", "reversed", "transposed"],
    )
    def test_out_over_an_input_in_another_order(self, call, name, view):
        arguments = valid(call)
        arguments["out"] = view(arguments[name])
        refused(call, arguments, ValueError, "out", "memory of its own", f"overlap with {name}")

    @over(
        "weight", "bias", "running_mean", "running_var", "mean", "invstd", calls=INTO_OUT
    )  # fmt: skip
    def test_out_over_an_array_of_channels(self, call, name):
        arguments = valid(call)
        arguments[name] = arguments["out"][1, :, 0, 1]
        arguments["out"][...] = np.abs(arguments["out"])
        refused(call, arguments, ValueError, "out", "memory of its own", f"overlap with {name}")

    def test_out_over_the_mask(self):
        arguments = valid("backward")
        arguments["mask"] = arguments["out"].reshape(-1).view(np.uint8)[:6]
        refused("backward", arguments, ValueError, "out", "memory of its own", "overlap with mask")

    @over_calls(*INTO_OUT)
    @pytest.mark.parametrize("strides", [(0, 4, 2, 1), (12, 0, 2, 1), (12, 4, 1, 1)], ids=str)
    def test_out_over_itself(self, call, strides):
        arguments = valid(call) | {"out": strided(SHAPE, strides)}
        refused(call, arguments, ValueError, "out", "distinct elements", str(SHAPE))

    @over("running_mean", "running_var", calls=UPDATING)
    def test_running_statistics_over_themselves(self, call, name):
        arguments = valid(call) | {name: strided((3,), (0,))}
        if call == "update":
            arguments |= {"running_mean": np.ones(3, np.float32), name: arguments[name]}
        refused(call, arguments, ValueError, name, "distinct elements", "(0,)")

    @over_calls(*UPDATING)
    @pytest.mark.parametrize("start", [0, 1], ids=["same", "partly"])
    def test_running_statistics_over_each_other(self, call, start):
        memory = np.ones(4, np.float32)
        arguments = valid(call)
        arguments |= {"running_mean": memory[:3], "running_var": memory[start : start + 3]}
        refused(
            call, arguments, ValueError, "running_mean", "memory of its own", "with running_var"
        )

    @over_calls(*INFERENCE)
    def test_inference_only_reads(self, call):
        arguments = valid(call)
        y = FUNCTIONS[call][0](**arguments | {"out": None})
        ours = {name: frozen(a) for name, a in arguments.items() if name != "out"}
        np.testing.assert_array_equal(FUNCTIONS[call][0](**ours), y)
        # One array as both statistics is well defined if neither is written.
        same = dict.fromkeys(("running_mean", "running_var"), arguments["running_mean"])
        copied = {name: a.copy() for name, a in same.items()}
        np.testing.assert_array_equal(
            *(FUNCTIONS[call][0](**arguments | {"out": None} | given) for given in (same, copied))
        )

    @over("x", "residual", "dy", calls=INTO_OUT)
    def test_out_may_be_an_input(self, call, name):
        """Element for element; results are compared in test_functional."""
        apart, arguments = valid(call), valid(call)
        FUNCTIONS[call][0](**apart)
        arguments["out"] = arguments[name][...]
        FUNCTIONS[call][0](**arguments)
        np.testing.assert_array_equal(arguments[name], apart["out"])

    @pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
    @over_calls(*INTO_OUT)
    def test_a_matrix_is_an_array(self, call):
        """As ``todense`` of a SciPy matrix gives; its ``reshape`` keeps two dimensions."""
        plain, arguments = valid(call, (4, 3)), valid(call, (4, 3))
        FUNCTIONS[call][0](**plain)
        arguments |= {name: np.matrix(arguments[name], copy=False) for name in {*FULL} & {*plain}}
        FUNCTIONS[call][0](**arguments)
        np.testing.assert_array_equal(np.asarray(arguments["out"]), plain["out"])


class TestOnADevice:
    """What is known of memory that only a device can read; other checks are the same code."""

    def test_overlap_is_told_by_addresses(self):
        memory = np.zeros((8, 6), np.float32)
        checks.writable("out", seen(memory[:4]), {"x": seen(memory[4:]), "residual": None})
        checks.writable("out", seen(memory[:, ::2]), {"x": seen(memory[:, 1::2])})
        for other in (memory[3:], memory[::-1][:5], memory[:4].T):
            with pytest.raises(ValueError, match=r"out: expected memory of its own.*with x"):
                checks.writable("out", seen(memory[:4]), {"x": seen(other)})

    def test_no_address_is_read(self):
        nowhere = seen(np.zeros((8, 6), ml_dtypes.bfloat16), address=2**44)
        checks.writable("out", nowhere, {"x": nowhere}, in_place=("x",))
        with pytest.raises(ValueError, match=r"out: expected memory of its own.*with x"):
            checks.writable("out", nowhere, {"x": nowhere})

    def test_read_only_and_over_itself(self):
        x = np.zeros((8, 6))
        with pytest.raises(ValueError, match="out: expected a writeable array"):
            checks.writable("out", seen(x, writeable=False), {})
        with pytest.raises(ValueError, match="out: expected distinct elements"):
            checks.writable("out", seen(as_strided(x, (8, 6), (8, 8))), {})

    def test_what_has_passed_is_told_from_numpy_arrays(self):
        calls = []
        check = checks.remembered(lambda *a: calls.append(a) or len(calls))
        x = np.zeros((8, 6))
        assert [check(x, 1), check(seen(x), 1), check(seen(x), 1), check(x, 1)] == [1, 2, 2, 1]


@over_calls(*FUNCTIONS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (2, 3, 0)], ids=str)
def test_an_empty_batch_writes_nothing(call, shape):
    arguments = valid(call, shape)
    if call == "update":
        arguments["stats"] = BatchStats.empty(3)
    before = contents(arguments)
    result = FUNCTIONS[call][0](**arguments)
    assert contents(arguments) == before
    if call == "stats":
        assert result.count == 0
        np.testing.assert_array_equal([result.mean, result.m2], np.zeros((2, 3)))
    elif call == "backward":
        assert result.dx is arguments["out"]
        np.testing.assert_array_equal([result.dweight, result.dbias], np.zeros((2, 3)))
        assert result.dweight.dtype == result.dbias.dtype == np.float32
    elif call != "update":
        y = result.y if call == "forward" else result
        assert y is arguments["out"]


def test_what_has_passed_is_checked_again_where_it_may_differ():
    x = np.ones((4, 5, 6), np.float32)
    assert numbabn.batch_norm_forward(x, axis=np.array(1)).mean.shape == (5,)
    assert numbabn.batch_norm_forward(x, axis=np.array(2)).mean.shape == (6,)
    with pytest.raises(ValueError, match="axis: expected -3 to 2"):
        numbabn.batch_norm_forward(x, axis=np.array(9))
    numbabn.batch_norm_forward(x, eps=1)
    with pytest.raises(TypeError, match="eps: expected a real number"):
        numbabn.batch_norm_forward(x, eps=True)
    numbabn.batch_norm_forward(x, out=np.empty_like(x))
    with pytest.raises(ValueError, match="out: expected distinct elements"):
        numbabn.batch_norm_forward(x, out=as_strided(np.empty(9, np.float32), x.shape, (0, 0, 0)))
    swapped = x.astype(x.dtype.newbyteorder())
    with pytest.raises(TypeError, match="byte-swapped"):
        numbabn.batch_norm_forward(swapped)


def test_what_is_remembered_is_bounded():
    calls = []
    check = checks.remembered(lambda *arguments: calls.append(arguments) or True)
    for k in [*range(checks.REMEMBERED + 1), *range(checks.REMEMBERED + 1)]:
        check(k)
    assert checks.REMEMBERED + 1 < len(calls) <= 2 * checks.REMEMBERED + 2
    before = len(calls)
    check(checks.REMEMBERED)
    assert len(calls) == before


def test_running_statistics_have_memory_of_their_own():
    x, shared = cases.normal((8, 5), np.float32), np.ones(5, np.float32)
    with pytest.raises(ValueError, match=r"running_mean: expected memory of its own.*weight"):
        numbabn.batch_norm_forward(x, shared, None, shared)
    with pytest.raises(ValueError, match=r"running_var: expected memory of its own.*bias"):
        numbabn.batch_norm_forward(x, None, shared, None, shared)
    np.testing.assert_array_equal(shared, 1)


def test_correction_is_checked_in_inference_too():
    x, one = np.ones((4, 5), np.float32), np.ones(5, np.float32)
    with pytest.raises(TypeError, match="correction: expected a real number"):
        numbabn.batch_norm(x, one, one, correction="no")
