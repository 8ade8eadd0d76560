"""Folded layers against the oracle, and against the layer followed by inference."""

import cases
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

import numbabn
from numbabn import reference

C = 5
OPTIONAL = ("conv_bias", "weight", "bias")
PRESENT = [(), *[(name,) for name in OPTIONAL], OPTIONAL]
KERNELS = {"linear": (C, 4), "conv": (C, 2, 3, 2)}

present = pytest.mark.parametrize("given", PRESENT, ids=lambda given: "+".join(given) or "none")
kernels = pytest.mark.parametrize("shape", KERNELS.values(), ids=KERNELS)


def valid(shape, dtype=np.float64, given=OPTIONAL):
    arguments = {
        "conv_weight": cases.normal(shape, dtype, seed=1),
        "running_mean": cases.normal(C, dtype, seed=2),
        "running_var": np.abs(cases.normal(C, dtype, seed=3)) + dtype(0.5),
    }
    optional = {name: cases.normal(C, dtype, seed=4 + i) for i, name in enumerate(OPTIONAL)}
    return arguments | {name: optional[name] if name in given else None for name in OPTIONAL}


def apply(x, conv_weight, conv_bias):
    """Linear layer, or convolution without padding, channels along axis 1."""
    if conv_weight.ndim == 2:
        y = x @ conv_weight.T
    else:
        windows = sliding_window_view(x, conv_weight.shape[2:], axis=(2, 3))
        y = np.einsum("nihwkl,oikl->nohw", windows, conv_weight)
    if conv_bias is None:
        return y
    return y + np.reshape(conv_bias, (C, *[1] * (y.ndim - 2)))


@kernels
@cases.dtypes
@present
def test_against_the_oracle(shape, dtype, ulp, given):
    arguments = valid(shape, dtype, given)
    before = {name: None if a is None else a.copy() for name, a in arguments.items()}
    got = numbabn.fold(**arguments, eps=0.01)
    for array, expected in zip(got, reference.fold(**arguments, eps=0.01), strict=True):
        assert array.dtype == dtype
        assert array.shape == expected.shape
        np.testing.assert_allclose(array, expected, rtol=ulp, atol=ulp)
        assert not any(np.shares_memory(array, a) for a in arguments.values() if a is not None)
    for name, array in before.items():
        np.testing.assert_array_equal(arguments[name], array)


@kernels
@present
def test_is_the_layer_then_inference(shape, given):
    arguments = valid(shape, given=given)
    x = cases.normal((6, 4) if len(shape) == 2 else (3, 2, 7, 5))
    of_layer = {name: arguments[name] for name in ("conv_weight", "conv_bias")}
    of_norm = {name: a for name, a in arguments.items() if name not in of_layer}
    expected = numbabn.batch_norm_inference(apply(x, **of_layer), **of_norm)
    np.testing.assert_allclose(apply(x, *numbabn.fold(**arguments)), expected, atol=1e-13)


def test_float64_parameters_beside_a_float32_kernel():
    arguments = valid(KERNELS["conv"])
    narrow = arguments["conv_weight"].astype(np.float32)
    got = numbabn.fold(**arguments | {"conv_weight": narrow})
    for array, expected in zip(got, numbabn.fold(**arguments), strict=True):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, expected, rtol=2**-22)


def test_a_variance_of_zero_gives_no_warning():
    arguments = valid(KERNELS["linear"], given=()) | {"running_var": np.zeros(C)}
    w, b = numbabn.fold(**arguments, eps=0)
    np.testing.assert_array_equal(w, np.inf * np.sign(arguments["conv_weight"]))
    np.testing.assert_array_equal(b, -np.inf * np.sign(arguments["running_mean"]))


CHANNELS = ["running_mean", "running_var", *OPTIONAL]


@pytest.mark.parametrize(
    ("name", "value", "error", "expected", "came"),
    [
        ("conv_weight", [[1.0]], TypeError, "a NumPy array", "list"),
        ("conv_weight", np.ma.ones((C, 4)), TypeError, "a NumPy array", "MaskedArray"),
        ("conv_weight", np.ones((C, 4), np.int64), TypeError, "float32 or float64", "int64"),
        ("conv_weight", np.ones((C, 4), ">f4"), TypeError, "float32 or float64", ">f4"),
        ("conv_weight", np.ones(C), ValueError, "2 or more dimensions", r"\(5,\)"),
        ("running_mean", None, TypeError, "a NumPy array", "NoneType"),
        ("running_var", None, TypeError, "a NumPy array", "NoneType"),
        *[(name, np.ones(C + 1), ValueError, r"\(5,\)", r"\(6,\)") for name in CHANNELS],
        *[(name, np.ones((C, 1)), ValueError, r"\(5,\)", r"\(5, 1\)") for name in CHANNELS],
        *[(name, np.ones(C, np.int64), TypeError, "float32 or", "int64") for name in CHANNELS],
        *[(name, [1.0] * C, TypeError, "a NumPy array", "list") for name in CHANNELS],
        ("eps", -1.0, ValueError, "0 or more", "-1.0"),
        ("eps", np.nan, ValueError, "finite", "nan"),
        ("eps", "1", TypeError, "a real number", "str"),
    ],
)
def test_errors(name, value, error, expected, came):
    arguments = valid(KERNELS["linear"]) | {name: value}
    with pytest.raises(error, match=f"^{name}: expected .*{expected}.*, got .*{came}"):
        numbabn.fold(**arguments)


class Negated(np.ndarray):
    """Computes in a way of its own."""

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        inputs = [np.asarray(each) for each in inputs]
        return -getattr(ufunc, method)(*inputs, **options)


@pytest.mark.parametrize("name", ["conv_weight", *CHANNELS])
def test_subclasses_are_arrays(name):
    arguments = valid(KERNELS["conv"])
    got = numbabn.fold(**arguments | {name: arguments[name].view(Negated)})
    for array, expected in zip(got, numbabn.fold(**arguments), strict=True):
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, expected)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_a_matrix_is_an_array():
    matrix = np.arange(12.0).reshape(4, 3).view(np.matrix)
    mean, var = np.arange(4.0), np.arange(1.0, 5.0)
    got = numbabn.fold(matrix, None, mean, var)
    for array, expected in zip(got, numbabn.fold(np.asarray(matrix), None, mean, var), strict=True):
        assert type(array) is np.ndarray
        np.testing.assert_array_equal(array, expected)
