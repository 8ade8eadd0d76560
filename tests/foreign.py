"""The public functions by way of numbabn.c: NumPy's arrays go in as addresses and strides."""

import ctypes
import inspect

import numpy as np
from problem import Host

import numbabn
from numbabn import c

PARAMETERS = ("weight", "bias", "running_mean", "running_var")
MAPS = ("x", "residual", "y", "dy", "dx", "dresidual")


def address(array):
    return None if array is None else array.__array_interface__["data"][0]


class Call:
    """A struct, and all that it points to."""

    def __init__(self, kind, x, axis, threads=0, /, **fields):
        self.struct = kind()
        self.dtype = x.dtype.name
        self.held = [np.array(x.shape, np.int64), *fields.values()]
        batch = self.struct.batch
        batch.shape, batch.ndim, batch.axis = address(self.held[0]), x.ndim, axis
        batch.threads = threads
        for name, value in fields.items():
            self[name] = value
        batch.float32_parameters = x.dtype.itemsize == 2 and any(
            fields.get(name) is not None and fields[name].dtype == np.float32
            for name in (*PARAMETERS, "dweight")
        )

    def __setitem__(self, name, value):
        if name in MAPS:
            member = getattr(self.struct, name)
            member.data = address(value)
            if value is not None:
                self.held.append(np.array(value.strides, np.int64))
                member.strides = address(self.held[-1])
        else:
            setattr(self.struct, name, address(value) if isinstance(value, np.ndarray) else value)

    def run(self, *, parallel=False):
        name = type(self.struct).__name__.removesuffix("Call").lower()
        table = c.table(self.dtype, name, parallel=parallel)
        return c.Status(getattr(table, name)(table.kernels, ctypes.byref(self.struct)))


def forward(x, out=None, mask=None, threads=0, *, axis, activation, **fields):
    C = x.shape[axis]
    y = np.full_like(x, np.nan) if out is None else out
    mean, invstd = np.full(C, np.nan), np.full(C, np.nan)
    mask = np.full(-(-x.size // 8), 0xFF, np.uint8) if activation else None
    call = Call(
        c.ForwardCall, x, axis, threads, x=x, y=y, mask=mask, mean=mean, invstd=invstd,
        relu=activation is not None, **fields,
    )  # fmt: skip
    return call, numbabn.ForwardResult(y, mean, invstd, mask)


def inference(x, out=None, threads=0, *, axis, activation, **fields):
    y = np.full_like(x, np.nan) if out is None else out
    call = Call(c.InferenceCall, x, axis, threads, x=x, y=y, relu=activation is not None, **fields)
    return call, y


def backward(dy, x, weight, out=None, threads=0, *, axis, training, with_residual, **fields):
    dx, dresidual = (np.full_like(x, np.nan) for _ in range(2))
    dx = dx if out is None else out
    dresidual = dresidual if with_residual else None
    default = np.float32 if x.dtype.itemsize == 2 else x.dtype
    dweight, dbias = (
        np.full(x.shape[axis], np.nan, default if weight is None else weight.dtype)
        for _ in range(2)
    )
    fields = {n: a if n == "mask" else np.float64(a) for n, a in fields.items()}
    call = Call(
        c.BackwardCall, x, axis, threads, dy=dy, x=x, dx=dx, dresidual=dresidual, weight=weight,
        dweight=dweight, dbias=dbias, eval=not training, **fields,
    )  # fmt: skip
    return call, numbabn.Gradients(dx, dweight, dbias, dresidual)


def statistics(x, threads=0, *, axis):
    mean, m2 = np.full(x.shape[axis], np.nan), np.full(x.shape[axis], np.nan)
    count = x.size // x.shape[axis]
    call = Call(c.StatisticsCall, x, axis, threads, x=x, mean=mean, m2=m2)
    return call, numbabn.BatchStats(count, mean, m2)


WAYS = {
    numbabn.batch_norm_forward: forward,
    numbabn.batch_norm_inference: inference,
    numbabn.batch_norm_backward: backward,
    numbabn.batch_stats: statistics,
}


def like_in_memory(array):
    """Make an array with the same strides, as far from a cache line."""
    reach = [(n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)]
    before = -sum(min(0, step) for step in reach)
    memory = np.zeros(sum(map(abs, reach)) + array.itemsize + 64, np.uint8)
    offset = before + (address(array) - before - address(memory)) % 64
    return np.ndarray(array.shape, array.dtype, memory, offset, array.strides)


class Foreign(Host):
    """Calls by address; whatever comes out must be what Python's function gives, bit for bit."""

    def __init__(self, threads=0):
        self.threads = threads

    def call(self, function, *args, **keywords):
        bound = inspect.signature(function).bind(*args, **keywords)
        bound.apply_defaults()
        given = bound.arguments
        del given["stream"]
        copies = {
            name: value.copy() if name.startswith("running") and value is not None else value
            for name, value in given.items()
        }
        if given.get("out") is not None:
            # How a result lies decides which view is taken, and so the order of sums.
            copies["out"] = like_in_memory(given["out"])
        expected = function(**copies)
        call, got = WAYS[function](threads=self.threads, **given)
        status = call.run(parallel=self.threads > 1)
        assert status == c.Status.OK, status.name
        same(got, expected)
        for name in given:
            if name.startswith("running"):
                same(given[name], copies[name])
        return got


def same(got, expected):
    """Compare bits."""
    if isinstance(expected, numbabn.BatchStats):
        got, expected = (got.mean, got.m2), (expected.mean, expected.m2)
    if isinstance(expected, tuple):
        for each in zip(got, expected, strict=True):
            same(*each)
    elif expected is None:
        assert got is None
    else:
        assert got.dtype == expected.dtype
        as_bits = np.dtype(f"u{expected.itemsize}")
        np.testing.assert_array_equal(
            np.ascontiguousarray(got).view(as_bits), np.ascontiguousarray(expected).view(as_bits)
        )
