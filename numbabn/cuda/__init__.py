"""The five operations on CUDA arrays, as views that `numbabn.layout` made; see `numbabn.cpu`."""

from typing import Any

import numpy as np

from ..layout import Layout, View
from ..libraries import DeviceArray
from .arguments import Backward, Forward, Gradients, Memory, Parameters, Settings, numbers_of
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
from .schedule import cut, first_lasting, is_held
from .target import SIMULATED
from .workspace import workspace_of

if SIMULATED:
    from . import simulation as runner
    from .simulation import run
else:
    from . import launch as runner  # type: ignore[no-redef]
    from .replay import run

__all__ = [
    "FOLDS_ROWS",
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
    "run",
    "statistics",
    "upload",
]

FOLDS_ROWS = False  # rows of few channels run as planes


class _Call:
    """What all launches of a call share.

    They are made on the call's device, under the workspace's lock: nothing of other threads must
    come in between.
    """

    def __init__(
        self, layout: Layout, maps: tuple[View | None, ...], mask: View | None, arrays: int = 1
    ) -> None:
        first = next(view for view in maps if view is not None)
        self.like: DeviceArray = first.array
        self.place = self.like.place
        self.format = self.like.form.name
        offsets = tuple([view.array.address % ACCESS for view in maps if view is not None])
        self.cut = cut(layout.plan, self.format, offsets, arrays)
        self.view, self.width, self.shape = self.cut.view, self.cut.width, self.cut.shape
        sizes = layout.shape
        if self.view == "short":
            maps, mask = tuple(map(_as_row, maps)), _as_row(mask)
            sizes = 1, sizes[1] * sizes[2], sizes[0]
        self.maps = tuple([runner.map_of(view, self.width, sizes) for view in maps])
        self.mask = runner.mask_of(mask)
        self.workspace = workspace_of(self.place.device, self.place.stream)
        if self.place.log is not None:
            self.place.log.workspace = self.workspace

    def per_channel(self, dtype: Any = np.float64) -> DeviceArray:
        """Allocate one number per channel."""
        return empty((self.shape.C,), dtype, self.like)

    def memory(self) -> Memory:
        """Give what blocks share."""
        self.shared = self.workspace.fit(self.shape, self.like)
        if self.place.log is not None:
            self.place.log.shared = self.shared
        return runner.memory_of(*self.shared)

    def capacity(self, kernel: str) -> int:
        """How many blocks of a kernel that holds its pieces run at once."""
        return runner.capacity(
            self.place, kernel, self.view, self.format, self.width, self.cut.held
        )  # fmt: skip

    def go_back(self) -> None:
        """Let a second sweep begin with what L2 has kept of the first."""
        lasting = first_lasting(self.cut.tasks, self.cut.summed, runner.l2_bytes(self.place))
        self.shape = self.shape._replace(lasting=lasting)

    def prepare(self, kernel: str) -> None:
        """Compile ahead of the first launch, after which nothing must fail."""
        runner.prepare(self.place, kernel, self.view, self.format, self.width)

    def prepare_sums(self, kernel: str) -> None:
        """Compile what sums pieces, and what puts them together."""
        self.prepare(kernel)
        runner.prepare(self.place, kernel, "channels", FORMATS[self.format].computed, 1)

    def launch(self, kernel: str, *arguments: Any) -> None:
        """Launch a block for each piece, which waits for no other."""
        runner.launch(
            self.place, kernel, self.view, self.format, self.width, self.cut.tasks,
            *arguments, self.shape,
        )  # fmt: skip

    def launch_held(self, kernel: str, capacity: int, *arguments: Any) -> None:
        """Launch as many blocks as run at once, if some wait for others."""
        together = self.shape.pieces > 1
        runner.launch(
            self.place, kernel, self.view, self.format, self.width,
            min(self.cut.tasks, capacity) if together else self.cut.tasks,
            *arguments, self.shape, shared=self.cut.held, together=together,
        )  # fmt: skip

    def launch_statistics(self, x: Any, *arguments: Any) -> None:
        """Launch what takes statistics, and what puts together pieces if there are several."""
        self.launch("statistics", x, *arguments)
        if self.shape.pieces > 1:
            self.launch_channels("statistics", *arguments)

    def launch_channels(self, kernel: str, *arguments: Any) -> None:
        """Launch what puts the pieces of all channels together."""
        computed = FORMATS[self.format].computed
        blocks = -(-self.shape.C >> self.shape.beside)
        runner.launch(self.place, kernel, "channels", computed, 1, blocks, *arguments, self.shape)


def _as_row(view: View | None) -> View | None:
    """See planes without a gap, ``[N, C, S]``, as N rows of C * S channels."""
    return view and View(view.array, 0, 1, view.dn)


def statistics(layout: Layout) -> tuple[DeviceArray, DeviceArray]:
    """Give mean and M2 of each channel. Views: x."""
    x, _ = layout.views
    call = _Call(layout, (x,), None)
    mean, m2 = call.per_channel(), call.per_channel()
    none = numbers_of(None)
    parameters = Parameters(none, none, none, none, numbers_of(mean), numbers_of(m2), none)
    settings = Settings(0.0, 0.0, 0.0, 0)
    with runner.on_device(call.place.device), call.workspace.lock:
        memory = call.memory()
        call.prepare_sums("statistics")
        call.launch_statistics(call.maps[0], parameters, settings, memory)
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
    wanted: bool,
) -> tuple[DeviceArray | None, DeviceArray | None]:
    """`normalize` by the batch's own mean and invstd, which are returned. Views: y, x, residual.

    Parameters are as there, but the running ones, where given, are updated. Mean and invstd that
    are not wanted are None, or left over from a second sweep, which reads them.
    """
    *maps, mask = layout.views
    call = _Call(layout, tuple(maps), mask)
    settings = Settings(eps, momentum, correction, int(relu))
    y, x, residual = call.maps
    views = Forward(y, x, residual, call.mask)
    mean = invstd = None
    with runner.on_device(call.place.device), call.workspace.lock:
        memory, capacity = call.memory(), call.capacity("forward")
        held = is_held(call.shape, capacity)
        if wanted or not held:
            mean, invstd = call.per_channel(), call.per_channel()
        given = Parameters(*map(numbers_of, (*parameters, mean, None, invstd)))
        if held:
            call.launch_held("forward", capacity, views, given, settings, memory)
        else:
            call.prepare_sums("statistics")
            call.prepare("normalize")
            call.go_back()
            call.launch_statistics(x, given, settings, memory)
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
    call = _Call(layout, tuple(maps), mask, arrays=2)
    dweight, dbias = call.per_channel(dtype), call.per_channel(dtype)
    given = Gradients(*map(numbers_of, (weight, mean, invstd, dweight, dbias)))
    dx, dresidual, dy, x = call.maps
    views = Backward(dx, dresidual, dy, x, call.mask)
    with runner.on_device(call.place.device), call.workspace.lock:
        memory, capacity = call.memory(), call.capacity("backward")
        if is_held(call.shape, capacity):
            call.launch_held("backward", capacity, views, given, int(training), memory)
        else:
            call.prepare_sums("products")
            call.prepare("gradient")
            call.go_back()
            call.launch("products", views, given, memory)
            call.launch_channels("products", x, given, memory)
            call.launch("gradient", views, given, int(training), memory)
    return dweight, dbias
