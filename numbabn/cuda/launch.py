"""How kernels are launched on a device's stream.

Arguments go as numbers of 8 bytes to kernels that `compilation` has compiled, past Numba's own
launch, which takes 40 microseconds to look at six arrays.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

from cuda.core import Device, LaunchConfig, ObjectCode, Stream
from cuda.core import launch as _launch

from ..layout import View
from ..libraries import DeviceArray, Place
from .arguments import Map, Memory
from .compilation import OLDEST, Variant, compiled
from .formats import MOST_BLOCKS, THREADS

_LEGACY = 1  # handle of the stream that 0 stands for


def _flatten(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, tuple):
            yield from _flatten(value)
        else:
            yield value


@lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    return Stream.from_handle(handle or _LEGACY)


def map_of(view: View | None, width: int, sizes: tuple[int, int, int]) -> Map:
    """Pass an array that is moved `width` numbers at a time."""
    if view is None:
        return Map(0, 0, 0, 0)
    return Map(view.array.address, *view[1:])


def mask_of(view: View | None) -> Map:
    """Pass a mask of bits."""
    return map_of(view, 1, (0, 0, 0))


def memory_of(partials: DeviceArray, sums: DeviceArray, counters: DeviceArray) -> Memory:
    """Pass what blocks share."""
    return Memory(partials.address, sums.address, counters.address)


@cache
def _kernel(variant: Variant, ordinal: int) -> Any:
    """Load a kernel, on whatever device is current."""
    capability = tuple(Device(ordinal).compute_capability)
    if capability < OLDEST:
        raise RuntimeError(
            f"CUDA device {ordinal}: expected compute capability {OLDEST} or newer, "
            f"got {capability}"
        )
    code = compiled(variant, capability)
    return ObjectCode.from_cubin(code.cubin).get_kernel(code.name)


@lru_cache(maxsize=256)
def _config(blocks: int) -> Any:
    return LaunchConfig(grid=blocks, block=THREADS)


@contextmanager
def on_device(ordinal: int) -> Iterator[None]:
    """Make a device current in this thread, and the caller's again."""
    current, device = Device(), Device(ordinal)
    device.set_current()  # even if it is: the thread may have no context yet
    try:
        yield
    finally:
        if current.device_id != ordinal:
            current.set_current()


def prepare(place: Place, kernel: str, view: str, format_name: str, width: int) -> None:
    """Compile and load a kernel."""
    _kernel(Variant(kernel, view, format_name, width), place.device)


def launch(
    place: Place, kernel: str, view: str, format_name: str, width: int, blocks: int,
    *arguments: Any,
) -> None:  # fmt: skip
    """Put a kernel on the call's stream, its device being current."""
    _launch(
        _stream(place.stream), _config(min(blocks, MOST_BLOCKS)),
        _kernel(Variant(kernel, view, format_name, width), place.device),
        *_flatten(arguments),
    )  # fmt: skip
