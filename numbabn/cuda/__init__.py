"""The five operations on CUDA arrays, as views that `numbabn.layout` made; see `numbabn.cpu`."""

from functools import lru_cache
from typing import Any

import numpy as np

from ..layout import Layout, Plan, View
from ..libraries import DeviceArray
from .arguments import Backward, Forward, Gradients, Memory, Parameters, Settings, Shape, numbers_of
from .arrays import (
    allocate_mask,
    borrow,
    contiguous,
    copy,
    download,
    empty,
    empty_like,
    give,
    upload,
)
from .formats import ACCESS, FORMATS
from .schedule import is_whole, shape_of
from .target import SIMULATED
from .workspace import workspace_of

if SIMULATED:
    from . import simulation as runner
else:
    from . import launch as runner  # type: ignore[no-redef]

__all__ = [
    "allocate_mask",
    "backward",
    "borrow",
    "contiguous",
    "copy",
    "download",
    "empty",
    "empty_like",
    "forward",
    "give",
    "normalize",
    "statistics",
    "upload",
]


class _Call:
    """What all launches of a call share.

    They are made on the call's device, under the workspace's lock: nothing of other threads must
    come in between.
    """

    def __init__(self, layout: Layout, maps: tuple[View | None, ...], mask: View | None) -> None:
        first = next(view for view in maps if view is not None)
        self.like: DeviceArray = first.array
        self.place = self.like.place
        self.view = layout.kind
        self.format = self.like.form.name
        offsets = tuple([view.array.address % ACCESS for view in maps if view is not None])
        self.width, self.shape, self.tasks = _cut(layout.plan, self.format, offsets)
        self.maps = tuple([runner.map_of(view, self.width, layout.shape) for view in maps])
        self.mask = runner.mask_of(mask)
        self.workspace = workspace_of(self.place.device, self.place.stream)

    def per_channel(self, dtype: Any = np.float64) -> DeviceArray:
        """Allocate one number per channel."""
        return empty((self.shape.C,), dtype, self.like)

    def memory(self) -> Memory:
        columns = self.width << self.shape.across if self.view == "rows" else 1
        self.shared = self.workspace.fit(self.shape, columns, self.like)
        return runner.memory_of(*self.shared)

    def prepare(self, *kernels: str) -> None:
        """Compile ahead of the first launch, after which nothing must fail."""
        for kernel in kernels:
            runner.prepare(self.place, kernel, self.view, self.format, self.width)

    def launch(self, kernel: str, *arguments: Any) -> None:
        runner.launch(
            self.place, kernel, self.view, self.format, self.width, self.tasks,
            *arguments, self.shape,
        )  # fmt: skip


@lru_cache(maxsize=1024)
def _cut(plan: Plan, format_name: str, offsets: tuple[int, ...]) -> tuple[int, Shape, int]:
    """Choose how many numbers move at a time, cut the work accordingly, and count its parts.

    As many as lie aligned in every array; `offsets` are bytes behind an aligned address.
    """
    width, itemsize = FORMATS[format_name].lanes, FORMATS[format_name].itemsize
    N, C, S = plan.shape
    planes = plan.kind == "planes"
    numbers = [S if planes else C, *(offset // itemsize for offset in offsets)]
    for dn, dc, ds in plan.steps:
        inner, between = (ds, dc) if planes else (dc, ds)
        if inner != 1 and numbers[0] != 1:
            width = 1
        numbers += [dn] if N > 1 else []
        numbers += [between] if (C if planes else S) > 1 else []
    while any(number % width for number in numbers):
        width //= 2
    shape = shape_of(plan.kind, plan.shape, width)
    return width, shape, shape.groups * shape.pieces


def statistics(layout: Layout) -> tuple[DeviceArray, DeviceArray]:
    """Give mean and M2 of each channel. Views: x."""
    x, _ = layout.views
    call = _Call(layout, (x,), None)
    mean, m2 = call.per_channel(), call.per_channel()
    none = numbers_of(None)
    parameters = Parameters(none, none, none, none, numbers_of(mean), numbers_of(m2), none)
    with runner.on_device(call.place.device), call.workspace.lock:
        settings = Settings(0.0, 0.0, 0.0, 0)
        call.launch("statistics", call.maps[0], parameters, settings, call.memory())
    return mean, m2


def normalize(
    layout: Layout, parameters: tuple[Any, Any, Any, Any], eps: float, relu: bool
) -> None:
    """``y = act((x - mean) * invstd * weight + bias + residual)``. Views: y, x, residual.

    Parameters are weight, bias, running mean and running variance.
    """
    *maps, mask = layout.views
    call = _Call(layout, tuple(maps), mask)
    given = Parameters(*map(numbers_of, (*parameters, None, None, None)))
    settings = Settings(eps, 0.0, 0.0, int(relu))
    y, x, residual = call.maps
    with runner.on_device(call.place.device), call.workspace.lock:
        call.launch("normalize", Forward(y, x, residual, call.mask), given, settings)


def forward(
    layout: Layout,
    parameters: tuple[Any, Any, Any, Any],
    eps: float,
    momentum: float,
    correction: float,
    relu: bool,
) -> tuple[DeviceArray, DeviceArray]:
    """`normalize` by the batch's own mean and invstd, which are returned. Views: y, x, residual.

    Parameters are as there, but the running ones, where given, are updated.
    """
    *maps, mask = layout.views
    call = _Call(layout, tuple(maps), mask)
    mean, invstd = call.per_channel(), call.per_channel()
    given = Parameters(*map(numbers_of, (*parameters, mean, None, invstd)))
    settings = Settings(eps, momentum, correction, int(relu))
    y, x, residual = call.maps
    views = Forward(y, x, residual, call.mask)
    with runner.on_device(call.place.device), call.workspace.lock:
        if is_whole(call.shape):
            call.launch("forward", views, given, settings)
        else:
            call.prepare("statistics", "normalize")
            call.launch("statistics", x, given, settings, call.memory())
            call.launch("normalize", views, given, settings)
    return mean, invstd


def backward(
    layout: Layout,
    weight: Any,
    mean: DeviceArray,
    invstd: DeviceArray,
    dtype: Any,
    training: bool,
) -> tuple[DeviceArray, DeviceArray]:
    """Write dx and dresidual; give dweight and dbias, of a dtype. Views: dx, dresidual, dy, x."""
    *maps, mask = layout.views
    call = _Call(layout, tuple(maps), mask)
    dweight, dbias = call.per_channel(dtype), call.per_channel(dtype)
    given = Gradients(*map(numbers_of, (weight, mean, invstd, dweight, dbias)))
    dx, dresidual, dy, x = call.maps
    views = Backward(dx, dresidual, dy, x, call.mask)
    with runner.on_device(call.place.device), call.workspace.lock:
        memory = call.memory()
        if is_whole(call.shape):
            call.launch("backward", views, given, int(training), memory)
        else:
            call.prepare("products", "gradient")
            call.launch("products", views, given, memory)
            call.launch("gradient", views, given, int(training), memory)
    return dweight, dbias
