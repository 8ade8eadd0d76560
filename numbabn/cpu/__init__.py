"""The five operations on NumPy arrays, as views that `numbabn.layout` made.

Per-channel results are contiguous float64, whatever the data are: C numbers each. Kernels take the
tuples of `arguments` by position: plain ones will do, and are made in less time.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..layout import Layout
from ..results import empty_like as empty_like
from . import compilation, planes, rows, schedule
from .schedule import FOLDS_ROWS as FOLDS_ROWS

PerChannel = npt.NDArray[np.float64]

_STATISTICS = {"planes": planes.statistics_planes, "rows": rows.statistics_rows}
_NORMALIZE = {"planes": planes.normalize_planes, "rows": rows.normalize_rows}
_FORWARD = {"planes": planes.forward_planes, "rows": rows.forward_rows}
_BACKWARD = {"planes": planes.backward_planes, "rows": rows.backward_rows}

# Under the names of the public functions.
_KERNELS = {
    "forward": _FORWARD,
    "inference": _NORMALIZE,
    "backward": _BACKWARD,
    "statistics": _STATISTICS,
}
OPERATIONS = tuple(_KERNELS)
DTYPES = tuple(dtype.name for dtype in schedule.STORED)


class Variant(NamedTuple):
    """What is compiled by itself: an operation on a view, for a dtype, on one thread or many."""

    operation: str
    view: str
    dtype: str
    parallel: bool

    def __str__(self) -> str:
        threads = "parallel" if self.parallel else "serial"
        return f"{self.operation} {self.view} {self.dtype} {threads}"


def variants(
    operations: Iterable[str] = OPERATIONS, dtypes: Iterable[str] = DTYPES
) -> list[Variant]:
    """List all that these operations on data of these dtypes may need."""
    return [
        Variant(operation, view, dtype, parallel)
        for dtype, operation in product(dtypes, operations)
        for view, parallel in product(_KERNELS[operation], (False, True))
    ]


def prepare(variant: Variant) -> bool:
    """Compile a variant ahead of its first call; False if it was there already."""
    kernel, stored = _kernel_of(variant)
    return kernel.prepare(stored, variant.parallel)


def _kernel_of(variant: Variant) -> tuple[compilation.Kernel, str]:
    """Give the kernel of a variant, and what its maps store."""
    stored = {dtype.name: stored for dtype, stored in schedule.STORED.items()}
    return _KERNELS[variant.operation][variant.view], stored[variant.dtype]


def address(variant: Variant) -> int:
    """Compile a variant; give the address at which compiled code calls it."""
    kernel, stored = _kernel_of(variant)
    return kernel.address(stored, variant.parallel)


def statistics(layout: Layout) -> tuple[PerChannel, PerChannel]:
    """Give mean and M2 of each channel. Views: x."""
    x, _ = layout.views
    C = layout.shape[1]
    mean, m2 = np.empty(C), np.empty(C)
    plan = schedule.plan("statistics", layout)
    _STATISTICS[layout.kind](plan, (None, x, None, None), mean, m2)
    return mean, m2


def normalize(
    layout: Layout, parameters: tuple[Any, Any, Any, Any], eps: float, relu: bool
) -> None:
    """``y = act((x - mean) * invstd * weight + bias + residual)``. Views: y, x, residual.

    Parameters are weight, bias, running mean and running variance.
    """
    _NORMALIZE[layout.kind](
        schedule.plan("normalize", layout),
        layout.views,
        (*parameters, None, None),
        (eps, 0.0, 0.0, relu),
    )  # fmt: skip


def forward(
    layout: Layout,
    parameters: tuple[Any, Any, Any, Any],
    eps: float,
    momentum: float,
    correction: float,
    relu: bool,
    wanted: bool,
) -> tuple[PerChannel, PerChannel]:
    """`normalize` by the batch's own mean and invstd, which are returned. Views: y, x, residual.

    Parameters are as there, but the running ones, where given, are updated. Mean and invstd are
    there whether or not they are wanted.
    """
    C = layout.shape[1]
    mean, invstd = np.empty(C), np.empty(C)
    _FORWARD[layout.kind](
        schedule.plan("forward", layout),
        layout.views, (*parameters, mean, invstd), (eps, momentum, correction, relu),
    )  # fmt: skip
    return mean, invstd


def backward(
    layout: Layout, weight: Any, mean: PerChannel, invstd: PerChannel, dtype: Any, training: bool
) -> tuple[Any, Any]:
    """Write dx and dresidual; give dweight and dbias, of a dtype. Views: dx, dresidual, dy, x."""
    C = layout.shape[1]
    dweight, dbias = np.empty(C, dtype), np.empty(C, dtype)
    _BACKWARD[layout.kind](
        schedule.plan("backward", layout),
        layout.views, (weight, mean, invstd, dweight, dbias), training,
    )  # fmt: skip
    return dweight, dbias


def cache_folder() -> str | None:
    """Where compiled kernels are kept between processes; None if no folder can be written."""
    return compilation.cache_folder(planes.statistics_planes)


def allocate_mask(x: Any) -> Any:
    """Zeros for one bit per element of ``x``."""
    return np.zeros(-(-x.size // 8), np.uint8)


def empty(shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Allocate a contiguous array."""
    return np.empty(shape, dtype)


def contiguous(array: Any) -> Any:
    """Give the array itself, or an aligned copy in C order."""
    return np.require(array, requirements=["C", "A"])


def copy(target: Any, source: Any) -> None:
    """Copy between arrays of one shape."""
    target[...] = source


def upload(values: Any, like: Any) -> Any:
    """Give a NumPy array, which is where it is needed."""
    return values


def give(*arrays: Any) -> tuple[Any, ...]:
    """Give results to the caller as they are."""
    return arrays
