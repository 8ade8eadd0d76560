"""The one table of cases: shapes, dtypes with their tolerances, and ways to lie in memory."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

# Borders of the CPU kernels crossed here: tiles of 1024 places and 16 rows, pieces of 16384 places
# and 1024 rows, groups of 1024 places of short planes, planes shorter than 16 places, rows narrower
# than 16 (64 taken as one) and shorter than 512 (joined), blocks of 64 columns, and 128 KiB.
SHAPES = {
    "NC": ((5, 37), 1),
    "NC C=1": ((127, 1), 1),
    "NC N=2": ((2, 300), 1),
    "NC narrow": ((1000, 3), -1),
    "NC narrow, few": ((37, 5), 1),
    "NC several pieces": ((4099, 19), 1),
    "NC wide": ((131, 1061), 1),
    "NCHW short, large": ((33, 67, 7, 7), 1),
    "CN": ((17, 301), 0),
    "NCL short": ((9, 5, 13), 1),
    "NCL few planes": ((3, 5, 13), 1),
    "NCHW short": ((11, 29, 7, 7), 1),
    "NCHW fused": ((2, 17, 23, 23), 1),
    "NCHW fused, large": ((3, 19, 31, 37), 1),
    "NCHW few channels": ((2, 3, 24, 25), 1),
    "NCHW tiles": ((20, 2, 65, 67), 1),
    "NCHW N=1": ((1, 6, 23, 29), 1),
    "NCHW C=1": ((5, 1, 8, 9), 1),
    "NCHW S=1": ((13, 33, 1, 1), 1),
    "NCDHW": ((2, 4, 3, 5, 7), 1),
    "NHWC": ((3, 5, 7, 33), -1),
    "NHWC narrow": ((3, 5, 7, 11), -1),
    "NHWC large": ((5, 23, 29, 17), -1),
    "NHCW": ((3, 5, 7, 11), 2),
    "CNHW": ((3, 5, 7, 11), 0),
}
LARGE = [
    "NC several pieces",
    "NC wide",
    "NCHW short, large",
    "NCHW fused, large",
    "NCHW tiles",
    "NHWC large",
]


class Tolerance(NamedTuple):
    """Relative error of one term of a result.

    A unit in the last place of float32, whose sums run in float64; several of float64's own.
    """

    dtype: type
    ulp: float


TOLERANCES = {"float32": Tolerance(np.float32, 2**-23), "float64": Tolerance(np.float64, 2**-48)}
NARROW = {
    "float16": Tolerance(np.float16, 2**-10),
    "bfloat16": Tolerance(ml_dtypes.bfloat16, 2**-7),
}


def axis_shape(shape, axis):
    """Shape in which a per-channel array broadcasts against the data."""
    return [size if i == axis % len(shape) else 1 for i, size in enumerate(shape)]


def normal(shape, dtype=np.float64, *, seed=0, offset=0.0):
    return (np.random.default_rng(seed).standard_normal(shape) + offset).astype(dtype)


def _with_steps(array, steps):
    """Embed in a larger array, every `steps[i]`-th element along axis i, backwards if negative."""
    shape = [size * abs(step) for size, step in zip(array.shape, steps, strict=True)]
    view = np.full(shape, np.nan, array.dtype)[tuple(slice(None, None, s) for s in steps)]
    view[...] = array
    return view


def _unaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def _field(array):
    record = np.zeros(array.shape, [("a", np.uint8), ("b", array.dtype)])
    record["b"] = array
    return record["b"]


def _memory_order(array, order):
    """Copy whose axis `order[0]` is outermost in memory."""
    return np.ascontiguousarray(array.transpose(order)).transpose(np.argsort(order))


# How an array of four dimensions may lie in memory, its values unchanged.
MEMORY = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "channels last": lambda a: _memory_order(a, (0, 2, 3, 1)),
    "channels first": lambda a: _memory_order(a, (1, 0, 2, 3)),
    "places first": lambda a: _memory_order(a, (2, 3, 0, 1)),
    "mixed": lambda a: _memory_order(a, (2, 0, 3, 1)),
    "stepped N": lambda a: _with_steps(a, (2, 1, 1, 1)),
    "stepped C": lambda a: _with_steps(a, (1, 3, 1, 1)),
    "stepped H": lambda a: _with_steps(a, (1, 1, 2, 1)),
    "stepped W": lambda a: _with_steps(a, (1, 1, 1, 2)),
    "stepped HW": lambda a: _with_steps(a, (1, 1, 2, 3)),
    "backwards N": lambda a: _with_steps(a, (-1, 1, 1, 1)),
    "backwards C": lambda a: _with_steps(a, (1, -1, 1, 1)),
    "backwards W": lambda a: _with_steps(a, (1, 1, 1, -1)),
    "backwards all": lambda a: _with_steps(a, (-1, -2, -1, -1)),
    "unaligned": _unaligned,
    "field of a record": _field,
}

shapes = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize(("dtype", "ulp"), TOLERANCES.values(), ids=TOLERANCES)
narrow_dtypes = pytest.mark.parametrize(("dtype", "ulp"), NARROW.values(), ids=NARROW)
memory = pytest.mark.parametrize("lay", MEMORY.values(), ids=MEMORY)
