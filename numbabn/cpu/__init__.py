"""The five operations on NumPy arrays, as views that `numbabn.layout` made.

Per-channel arrays are contiguous float64, whatever the data are: C numbers each.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from ..layout import Layout
from . import planes, rows, schedule

PerChannel = npt.NDArray[np.float64]

_STATISTICS = {"planes": planes.statistics_planes, "rows": rows.statistics_rows}
_NORMALIZE = {"planes": planes.normalize_planes, "rows": rows.normalize_rows}
_BACKWARD_REDUCE = {"planes": planes.backward_reduce_planes, "rows": rows.backward_reduce_rows}
_DX = {"planes": planes.dx_planes, "rows": rows.dx_rows}


def _fused(layout: Layout) -> bool:
    """Whether a channel at a time keeps every core busy, by the shape alone."""
    return layout.kind == "planes" and layout.shape[1] >= schedule.FUSE_CHANNELS


def statistics(layout: Layout) -> tuple[PerChannel, PerChannel]:
    """Give mean and M2 of each channel. Views: x."""
    (x,) = layout.views
    C = layout.shape[1]
    mean, m2 = np.empty(C), np.empty(C)
    _STATISTICS[layout.kind](layout.nbytes, x, layout.shape, mean, m2)
    return mean, m2


def normalize(
    layout: Layout,
    mean: PerChannel,
    invstd: PerChannel,
    weight: PerChannel,
    bias: PerChannel,
    relu: bool,
) -> None:
    """``y = act((x - mean) * invstd * weight + bias + residual)``. Views: y, x, residual."""
    y, x, residual = layout.views
    _NORMALIZE[layout.kind](
        2 * layout.nbytes,
        x, residual, y, layout.mask, layout.shape, mean, invstd, weight, bias, relu,
    )  # fmt: skip


def forward(
    layout: Layout, weight: PerChannel, bias: PerChannel, eps: float, relu: bool
) -> tuple[PerChannel, PerChannel]:
    """Give mean and M2 of each channel, and `normalize` by them. Views: y, x, residual."""
    y, x, residual = layout.views
    N, C, S, fold = layout.shape
    mean, m2 = np.empty(C), np.empty(C)
    if _fused(layout):
        planes.forward_planes(
            2 * layout.nbytes,
            x, residual, y, layout.mask, layout.shape, weight, bias, eps, relu, mean, m2,
        )  # fmt: skip
    else:
        _STATISTICS[layout.kind](layout.nbytes, x, layout.shape, mean, m2)
        with np.errstate(all="ignore"):
            invstd = 1.0 / np.sqrt(m2 / (N * S * fold) + eps)
        normalize(layout, mean, invstd, weight, bias, relu)
    return mean, m2


def backward(
    layout: Layout, weight: PerChannel, mean: PerChannel, invstd: PerChannel, training: bool
) -> tuple[PerChannel, PerChannel]:
    """Write dx; give the sums of dy and of dy * (x - mean). Views: dx, dresidual, dy, x."""
    dx, dresidual, dy, x = layout.views
    mask, shape = layout.mask, layout.shape
    total, product = np.empty(shape[1]), np.empty(shape[1])
    if _fused(layout):
        planes.backward_planes(
            3 * layout.nbytes,
            dy, x, dx, mask, dresidual, shape, mean, invstd, weight, total, product, training,
        )  # fmt: skip
    else:
        _BACKWARD_REDUCE[layout.kind](2 * layout.nbytes, dy, x, mask, shape, mean, total, product)
        _DX[layout.kind](
            3 * layout.nbytes,
            dy, x, dx, mask, dresidual, shape, mean, invstd, weight, total, product, training,
        )  # fmt: skip
    return total, product


def cache_folder() -> str | None:
    """Where compiled kernels are kept between processes; None if no folder can be written."""
    return schedule.cache_folder(planes.statistics_planes)


def allocate_mask(x: Any) -> Any:
    """Zeros for one bit per element of ``x``."""
    return np.zeros(-(-x.size // 8), np.uint8)
