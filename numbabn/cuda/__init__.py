"""The five operations on CUDA arrays, as views that `numbabn.layout` made; see `numbabn.cpu`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..layout import Layout, View
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
from .formats import FORMATS
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
    """What all launches of a call share."""

    def __init__(self, layout: Layout, maps: tuple[View | None, ...], mask: View | None) -> None:
        first = next(view for view in maps if view is not None)
        self.like: DeviceArray = first.array
        self.place = self.like.place
        self.view = layout.kind
        self.format = layout.dtype.name
        self.width = _width(layout, maps, mask)
        self.shape: Shape = shape_of(self.view, layout.shape, self.width)
        self.maps = tuple(runner.map_of(view, self.width, layout.shape) for view in maps)
        self.mask = runner.mask_of(mask)
        self.tasks = self.shape.groups * self.shape.pieces
        self.workspace = workspace_of(self.place.device, self.place.stream)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Launch on the call's device, and nothing of other threads in between."""
        with runner.on_device(self.place.device), self.workspace.lock:
            yield

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


def _width(layout: Layout, maps: tuple[View | None, ...], mask: View | None) -> int:
    """Choose how many numbers move at a time: as many as lie aligned in every array."""
    N, C, S = layout.shape
    planes = layout.kind == "planes"
    width, itemsize = FORMATS[layout.dtype.name].lanes, layout.dtype.itemsize
    numbers = [S if planes else C]
    for view in (*maps, mask):
        if view is None:
            continue
        array, dn, dc, ds = view
        inner, between = (ds, dc) if planes else (dc, ds)
        if inner != 1 and numbers[0] != 1:
            return 1
        numbers += [dn] if N > 1 else []
        numbers += [between] if (C if planes else S) > 1 else []
        if view is not mask:
            numbers.append(array.address // itemsize)
    while any(number % width for number in numbers):
        width //= 2
    return width


def statistics(layout: Layout) -> tuple[DeviceArray, DeviceArray]:
    """Give mean and M2 of each channel. Views: x."""
    x, _ = layout.views
    call = _Call(layout, (x,), None)
    mean, m2 = call.per_channel(), call.per_channel()
    none = numbers_of(None)
    parameters = Parameters(none, none, none, none, numbers_of(mean), numbers_of(m2), none)
    with call.alone():
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
    with call.alone():
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
    with call.alone():
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
    with call.alone():
        memory = call.memory()
        if is_whole(call.shape):
            call.launch("backward", views, given, int(training), memory)
        else:
            call.prepare("products", "gradient")
            call.launch("products", views, given, memory)
            call.launch("gradient", views, given, int(training), memory)
    return dweight, dbias
