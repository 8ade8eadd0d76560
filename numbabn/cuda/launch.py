"""How kernels are launched on a device's stream.

Arguments go as numbers of 8 bytes to kernels that `compilation` has compiled, past Numba's own
launch, which takes 40 microseconds to look at six arrays.
"""

import struct
import threading
from collections.abc import Iterable, Sequence
from ctypes import addressof, c_int64, c_void_p
from functools import cache, lru_cache, partial
from itertools import chain
from typing import Any

from cuda.bindings import driver
from cuda.core import Device, ObjectCode

from ..layout import View
from ..libraries import DeviceArray, Place
from .arguments import Map, Memory
from .compilation import OLDEST, Variant, codes, compiled
from .driver import SUCCESS, checked, on_device, refuse_to_capture
from .formats import LEGACY, MOST_BLOCKS, THREADS

__all__ = [
    "Launches",
    "capacity",
    "l2_bytes",
    "launch",
    "map_of",
    "mask_of",
    "memory_of",
    "on_device",
    "prepare",
]

_SHARED = 48 << 10  # bytes of a block, where no more has been asked for
_MOST_NUMBERS = 512  # of a kernel: its arguments take 4 KB at most


_NO_MAP = Map(0, 0, 0, 0)
# Past the constructors of named tuples, as in `layout`.
_map = partial(tuple.__new__, Map)
_memory = partial(tuple.__new__, Memory)


def map_of(view: View | None, width: int, sizes: tuple[int, int, int]) -> Map:
    """Pass an array that is moved `width` numbers at a time."""
    if view is None:
        return _NO_MAP
    array, dn, dc, ds = view
    return _map((array, dn, dc, ds))


def mask_of(view: View | None) -> Map:
    """Pass a mask of bits."""
    return map_of(view, 1, (0, 0, 0))


def memory_of(partials: DeviceArray, sums: DeviceArray, counters: DeviceArray) -> Memory:
    """Pass what blocks share."""
    return _memory((partials, sums, counters))


class _Kernel:
    """A kernel on a device.

    Attributes
    ----------
    function : CUfunction
        What the driver launches.
    pack : callable
        Write a kernel's numbers into memory, one behind the other.
    shared : int
        Bytes of dynamic shared memory that a block of it may have.
    """

    def __init__(self, variant: Variant, ordinal: int) -> None:
        device = Device(ordinal)
        capability = tuple(device.compute_capability)
        if capability < OLDEST:
            raise RuntimeError(
                f"CUDA device {ordinal}: expected compute capability {OLDEST} or newer, "
                f"got {capability}"
            )
        code = compiled(variant, capability)
        self._loaded = ObjectCode.from_cubin(code.cubin).get_kernel(code.name)
        kernel = self._loaded.handle
        with on_device(ordinal):
            # Else the first launch would load it, which must not be while a graph is captured.
            checked(driver.cuKernelGetFunction(kernel))
        self.function = driver.CUfunction(int(kernel))
        self.pack = struct.Struct(codes(variant)).pack_into
        own = self._loaded.attributes[ordinal].shared_size_bytes
        self.shared = _SHARED - own
        self._most_shared = device.properties.max_shared_memory_per_block_optin - own
        self._device = ordinal

    def allow(self, shared: int) -> bool:
        """Let blocks have more dynamic shared memory, if the device has it."""
        if shared > self._most_shared:
            return False
        if shared > self.shared:
            checked(
                driver.cuKernelSetAttribute(
                    driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    self._most_shared, self._loaded.handle, self._device,
                )
            )  # fmt: skip
            self.shared = self._most_shared
        return True


_kernels: dict[tuple[Any, ...], _Kernel] = {}


def _kernel(place: Place, kernel: str, view: str, format_name: str, width: int) -> _Kernel:
    key = kernel, view, format_name, width, place.device
    found = _kernels.get(key)
    if found is None:
        variant = Variant(kernel, view, format_name, width)
        refuse_to_capture(place.stream, f"the kernel '{variant}' loaded")
        # Of two threads the one that is late gives up its own, which nothing has been launched of.
        found = _kernels.setdefault(key, _Kernel(variant, place.device))
    return found


def prepare(place: Place, kernel: str, view: str, format_name: str, width: int) -> None:
    """Compile and load a kernel."""
    _kernel(place, kernel, view, format_name, width)


class _Numbers(threading.local):
    """A thread's memory for the arguments of a launch, which the driver copies."""

    def __init__(self) -> None:
        self.memory = (c_int64 * _MOST_NUMBERS)()
        first = addressof(self.memory)
        self._pointers = (c_void_p * _MOST_NUMBERS)(*range(first, first + 8 * _MOST_NUMBERS, 8))
        self.pointers = addressof(self._pointers)


_numbers = _Numbers()


def flatten(arguments: Iterable[Any]) -> list[Any]:
    """Put behind one another: numbers, those of tuples, and those of tuples of tuples."""
    numbers: list[Any] = []
    for each in arguments:
        if not isinstance(each, tuple):
            numbers.append(each)
        elif isinstance(each[0], tuple):
            numbers += chain.from_iterable(each)
        else:
            numbers += each
    return numbers


@lru_cache(maxsize=1024)
def _config(blocks: int, shared: int, together: bool, stream: int) -> Any:
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
    config.sharedMemBytes = shared
    config.hStream = driver.CUstream(stream or LEGACY)
    if together:
        cooperative = driver.CUlaunchAttribute()
        cooperative.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        cooperative.value.cooperative = 1
        config.attrs, config.numAttrs = [cooperative], 1
    return config


def launch(
    place: Place, kernel: str, view: str, format_name: str, width: int, blocks: int,
    *arguments: Any, shared: int = 0, together: bool = False,
) -> None:  # fmt: skip
    """Put a kernel on the call's stream, its device being current.

    A block gets some bytes of dynamic shared memory. Blocks that wait for one another are launched
    together, no more of them than there is `capacity` for.
    """
    loaded = _kernel(place, kernel, view, format_name, width)
    if shared > loaded.shared:
        loaded.allow(shared)
    config = _config(min(blocks, MOST_BLOCKS), shared, together, place.stream)
    numbers = flatten(arguments)
    loaded.pack(_numbers.memory, 0, *numbers)
    name = f"{kernel}_{view}"
    _submit(config, loaded.function, _numbers.pointers, name)
    if place.log is not None:
        place.log.launches.append((config, loaded, numbers, name))


def _submit(config: Any, function: Any, pointers: int, name: str) -> None:
    (error,) = driver.cuLaunchKernelEx(config, function, pointers, 0)
    if error != SUCCESS:
        raise RuntimeError(f"launch of {name}: expected success, got {error.name}")


class Launches:
    """The launches of a call, to be made again, by one thread at a time.

    Each kernel's numbers stay where they are, but for addresses, which all kernels read in one
    place.
    """

    __slots__ = ("_addresses", "_kept", "_launches", "_pack")

    def __init__(self, launches: Iterable[Any], arrays: Sequence[DeviceArray | None]) -> None:
        self._addresses = (c_int64 * len(arrays))()
        self._pack = struct.Struct(f"{len(arrays)}q").pack_into
        first = addressof(self._addresses)
        at = {id(array): first + 8 * k for k, array in enumerate(arrays) if array is not None}
        self._kept: list[Any] = []  # memory that the driver reads
        self._launches: list[tuple[Any, ...]] = []
        for config, loaded, numbers, name in launches:
            memory = (c_int64 * len(numbers))()
            loaded.pack(memory, 0, *numbers)
            own = range(addressof(memory), addressof(memory) + 8 * len(numbers), 8)
            pointers = (c_void_p * len(numbers))(*[
                at[id(number)] if type(number) is DeviceArray else place
                for number, place in zip(numbers, own, strict=True)
            ])  # fmt: skip
            self._kept += memory, pointers
            self._launches.append((config, loaded.function, addressof(pointers), name))

    def __call__(self, *addresses: int) -> None:
        """Launch, given the address of each of the arrays, their device being current."""
        self._pack(self._addresses, 0, *addresses)
        for each in self._launches:
            _submit(*each)


@lru_cache(maxsize=1024)
def _capacity(kernel: _Kernel, ordinal: int, shared: int) -> int:
    if not kernel.allow(shared):
        return 0
    with on_device(ordinal):
        blocks = checked(
            driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(kernel.function, THREADS, shared)
        )
    return int(blocks * Device(ordinal).properties.multiprocessor_count)


def capacity(
    place: Place, kernel: str, view: str, format_name: str, width: int, shared: int
) -> int:
    """Count the blocks of a kernel that the device holds at once; 0 if not even one."""
    return _capacity(_kernel(place, kernel, view, format_name, width), place.device, shared)


@cache
def _l2_bytes(ordinal: int) -> int:
    return int(Device(ordinal).properties.l2_cache_size)


def l2_bytes(place: Place) -> int:
    """Give the size of the device's L2 cache."""
    return _l2_bytes(place.device)
