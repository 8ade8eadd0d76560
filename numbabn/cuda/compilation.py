"""From a kernel's Python function to machine code, with neither a driver nor a device.

A kernel is compiled once for each format and number of numbers moved at a time, and for each
compute capability.
"""

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.cuda import dispatcher, types
from numba.cuda.core.compiler_lock import global_compiler_lock

from . import arguments, channels, disk, planes, rows, short
from .formats import FORMATS, THREADS
from .intrinsics import Global

OLDEST = (8, 0)  # compute capability: rounding two float32 to 16 bits at once came with it
# Blocks of a multiprocessor: 16 warps with four accesses each in flight should keep its memory busy
# (latency times bandwidth, not measured), and leave 128 registers to a thread. Where those do not
# do, one block has twice as many.
RESIDENT = (2, 1)

_TAKES = {
    "statistics": ("Map", "Parameters", "Settings", "Memory", "Shape"),
    "normalize": ("Forward", "Parameters", "Settings", "Shape"),
    "forward": ("Forward", "Parameters", "Settings", "Memory", "Shape"),
    "products": ("Backward", "Gradients", "Memory", "Shape"),
    "gradient": ("Backward", "Gradients", "flag", "Memory", "Shape"),
    "backward": ("Backward", "Gradients", "flag", "Memory", "Shape"),
}
# Of what puts together the pieces of channels.
_CHANNELS_TAKE = {
    "statistics": ("Parameters", "Settings", "Memory", "Shape"),
    "products": ("Map", "Gradients", "Memory", "Shape"),
}
_VIEWS = {"planes": planes, "rows": rows, "short": short, "channels": channels}


class Variant(NamedTuple):
    """What is compiled by itself."""

    kernel: str
    view: str
    format: str
    width: int  # numbers moved at a time

    def __str__(self) -> str:
        return f"{self.kernel} {self.view} {self.format} x{self.width}"


class Code(NamedTuple):
    """Machine code for one compute capability."""

    cubin: bytes
    name: str  # of the kernel
    report: str  # what the assembler says of registers and memory
    resident: int  # blocks of a multiprocessor that it was compiled for

    def _count(self, pattern: str) -> int:
        return sum(map(int, re.findall(pattern, self.report)))

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._count(r"Used (\d+) registers")

    @property
    def shared(self) -> int:
        """Bytes of a block's shared memory, without those that a launch asks for."""
        return self._count(r"(\d+) bytes smem")

    @property
    def spills(self) -> bool:
        """Whether registers did not do."""
        return re.search(r"\b0 bytes stack frame", self.report) is None


def function(variant: Variant) -> Callable[..., None]:
    """Give a kernel's Python function."""
    name = f"{variant.kernel}_{variant.view}"
    kernel: Callable[..., None] = getattr(_VIEWS[variant.view], name)
    return kernel


def variants() -> list[Variant]:
    """List all variants, the widest of each format first."""
    return (
        [
            Variant(kernel, view, each.name, each.lanes >> k)
            for each in FORMATS.values()
            for k in range(each.lanes.bit_length())
            for view in ("planes", "rows")
            for kernel in _TAKES
        ]
        + [
            Variant(kernel, "short", each.name, each.lanes)
            for each in FORMATS.values()
            for kernel in _TAKES
        ]
        + [
            Variant(kernel, "channels", name, 1)
            for name in ("float32", "float64")
            for kernel in _CHANNELS_TAKE
        ]
    )


def _tuple(kind: str, *members: Any) -> Any:
    return types.NamedTuple(members, getattr(arguments, kind))


def _signature(variant: Variant) -> Any:
    """Give the types of a kernel's arguments: what `arguments` says of each."""
    i64, f64 = types.int64, types.float64
    data, wide = Global(variant.format, variant.width), Global("float64", 1)
    map_, mask = (_tuple("Map", at, i64, i64, i64) for at in (data, i64))
    numbers = _tuple("Numbers", i64, i64, i64)
    kinds = {
        "Map": map_,
        "Forward": _tuple("Forward", map_, map_, map_, mask),
        "Backward": _tuple("Backward", map_, map_, map_, map_, mask),
        "Parameters": _tuple("Parameters", *(numbers,) * len(arguments.Parameters._fields)),
        "Gradients": _tuple("Gradients", *(numbers,) * len(arguments.Gradients._fields)),
        "Settings": _tuple("Settings", f64, f64, f64, i64),
        "Memory": _tuple("Memory", wide, wide, i64),
        "Shape": _tuple("Shape", *(i64,) * len(arguments.Shape._fields)),
        "flag": i64,
    }
    takes = _CHANNELS_TAKE if variant.view == "channels" else _TAKES
    return types.void(*(kinds[name] for name in takes[variant.kernel]))


def _codes(kind: Any) -> str:
    if isinstance(kind, types.BaseTuple):
        return "".join(map(_codes, kind))
    return "d" if kind == types.float64 else "q"


def codes(variant: Variant) -> str:
    """Give the types of all numbers that a kernel takes, as `struct` has them."""
    return "".join(map(_codes, _signature(variant).args))


def assemble(
    kernel: Callable[..., None], signature: Any, capability: tuple[int, int], *, resident: int
) -> Code:
    """Compile a function for some types and a compute capability."""
    with global_compiler_lock:
        # numba-cuda asks the driver for the device that a device function is compiled for, even
        # where the caller has named it.
        asked = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=capability)
        try:
            ptx, _ = cuda.compile(
                kernel, signature, device=False, cc=capability, abi="numba",
                launch_bounds=(THREADS, resident),
            )  # fmt: skip
        finally:
            dispatcher.get_current_device = asked
    text = ptx.decode() if isinstance(ptx, bytes) else ptx
    options = LinkerOptions(arch="sm_{}{}".format(*capability), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    cubin = bytes(linker.link("cubin").code)
    entry = re.search(r"\.entry\s+([^\s(]+)", text)
    assert entry is not None
    return Code(cubin, entry[1], linker.get_info_log(), resident)


@cache
def compiled(variant: Variant, capability: tuple[int, int]) -> Code:
    """Compile a variant for a compute capability, or find it on disk; once in a process."""
    name = "{}.sm_{}{}.cubin".format(str(variant).replace(" ", "-"), *capability)
    found = disk.load(name, RESIDENT)
    if found is not None:
        facts, cubin = found
        return Code(cubin, **facts)
    for resident in RESIDENT:
        code = assemble(function(variant), _signature(variant), capability, resident=resident)
        if not code.spills:
            break
    facts = code._asdict()
    disk.save(name, facts, facts.pop("cubin"), RESIDENT)
    return code
