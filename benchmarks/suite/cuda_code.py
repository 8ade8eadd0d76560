"""What CUDA kernels cost by their machine code, compiled for GPUs that need not be here.

Each kernel that moves 16 bytes at a time.
"""

import os
from itertools import product
from typing import NamedTuple

from .grid import in_parallel
from .yardstick import sass

VIEWS = ("planes", "rows", "short")
FUSED = ("forward", "backward")
ALL = ("statistics", "normalize", "forward", "products", "gradient", "backward")
WIDTHS = {"float32": 4, "float16": 8}
GLOBAL = ("LDG", "STG")


class Cost(NamedTuple):
    """What is counted of a kernel."""

    registers: int
    spilled: int
    shared: int
    instructions: int
    bytes_per_access: float


def _cost(job: tuple[str, str]) -> Cost | None:
    """Compile and read a kernel; None if the commit that is measured has none like it."""
    try:
        from numbabn.cuda import compilation

        kernel, view, format_name = job[0].split()
        variant = compilation.Variant(kernel, view, format_name, WIDTHS[format_name])
        digits = job[1].removeprefix("sm_")
        code = compilation.compiled(variant, (int(digits[:-1]), int(digits[-1])))
        found = sass.read(code.cubin, code.report)
    except (AttributeError, ImportError, KeyError, TypeError):
        return None
    moved = [bits for loop in found.loops for name in GLOBAL for bits in loop.moved(name)]
    return Cost(
        found.registers,
        found.spilled,
        found.shared,
        sum(len(loop.instructions) for loop in found.loops),
        round(sum(moved) / 8 / len(moved), 3),
    )


Found = dict[tuple[str, str], Cost | None]


def _all(kernels: list[str], targets: list[str]) -> Found:
    os.environ["NUMBA_DISABLE_CUDA"] = "1"  # no driver takes part, where there is one
    jobs = [*product(kernels, targets)]
    return dict(zip(jobs, in_parallel(_cost, jobs), strict=True))


class _Costs:
    param_names = ("kernel", "target")
    params: tuple[list[str], list[str]]

    def setup(self, found: Found, kernel: str, target: str) -> None:
        if found[kernel, target] is None:
            raise NotImplementedError

    def track_registers(self, found: Found, kernel: str, target: str) -> int:
        """Count those of a thread."""
        return found[kernel, target].registers

    def track_spills(self, found: Found, kernel: str, target: str) -> int:
        """Count what a thread stores and loads for want of registers."""
        return found[kernel, target].spilled

    def track_shared(self, found: Found, kernel: str, target: str) -> int:
        """Count a block's shared memory, but for that which holds x."""
        return found[kernel, target].shared

    def track_instructions(self, found: Found, kernel: str, target: str) -> int:
        """Count what is in loops that read or write global memory, one turn of each."""
        return found[kernel, target].instructions

    def track_bytes_per_access(self, found: Found, kernel: str, target: str) -> float:
        """Take the mean over the loads and stores of those loops: 16 for x, less for masks."""
        return found[kernel, target].bytes_per_access

    track_registers.unit = "registers"
    track_spills.unit = track_shared.unit = "bytes"
    track_instructions.unit = "instructions"
    track_bytes_per_access.unit = "bytes"


class Float32(_Costs):
    """All kernels."""

    params = (
        [f"{kernel} {view} float32" for view in VIEWS for kernel in ALL],
        ["sm_80", "sm_90", "sm_100"],
    )

    def setup_cache(self) -> Found:
        return _all(*self.params)


class Float16(_Costs):
    """Those that do an operation as a whole."""

    params = ([f"{kernel} {view} float16" for view in VIEWS for kernel in FUSED], ["sm_90"])

    def setup_cache(self) -> Found:
        return _all(*self.params)
