"""What CUDA kernels cost by their machine code, compiled for GPUs that need not be here.

Each kernel for float32 that moves 16 bytes at a time.
"""

import importlib
import os
from itertools import product
from typing import NamedTuple

from .parallel import in_parallel

VIEWS = ("planes", "rows", "short")
LANES = 4  # of float32 in 16 bytes
GLOBAL = ("LDG", "STG")


class Cost(NamedTuple):
    """What is counted of a kernel."""

    registers: int
    spilled: int
    shared: int
    instructions: int
    bytes_per_access: float


Found = dict[tuple[str, str], Cost | None]


def setup_cache() -> Found:
    """Compile and read all; nothing where no CUDA compiler or no disassembler is installed."""
    from yardstick.tests import sass

    os.environ["NUMBA_DISABLE_CUDA"] = "1"  # no driver takes part, where there is one
    try:
        importlib.import_module("numbabn.cuda.compilation")  # here, not in each process
    except ImportError:
        return {}
    if sass.disassembler() is None:
        return {}
    jobs = [job for each in (Fused, Parts) for job in product(*each.params)]
    return dict(zip(jobs, in_parallel(_cost, jobs), strict=True))


def _cost(job: tuple[str, str]) -> Cost | None:
    """Compile and read a kernel; None if the commit that is measured has none like it."""
    from yardstick.tests import sass

    from numbabn.cuda import compilation

    kernel, view = job[0].split()
    digits = job[1].removeprefix("sm_")
    try:
        variant = compilation.Variant(kernel, view, "float32", LANES)
        code = compilation.compiled(variant, (int(digits[:-1]), int(digits[-1])))
        cubin, told = code.cubin, code.report
    except (AttributeError, KeyError, TypeError):
        return None
    found = sass.read(cubin, told)
    moved = [bits for loop in found.loops for name in GLOBAL for bits in loop.moved(name)]
    return Cost(
        found.registers,
        found.spilled,
        found.shared,
        sum(len(loop.instructions) for loop in found.loops),
        round(sum(moved) / 8 / len(moved), 3),
    )


class _Costs:
    param_names = ("kernel", "target")
    params: tuple[list[str], list[str]]

    def setup(self, found: Found, kernel: str, target: str) -> None:
        if found.get((kernel, target)) is None:
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
        """Take the mean over the loads and stores of those loops; less than 16 for edges, masks."""
        return found[kernel, target].bytes_per_access

    track_registers.unit = "registers"
    track_spills.unit = track_shared.unit = "bytes"
    track_instructions.unit = "instructions"
    track_bytes_per_access.unit = "bytes"


class Fused(_Costs):
    """Those that do an operation as a whole."""

    params = (
        [f"{kernel} {view}" for view in VIEWS for kernel in ("forward", "backward")],
        ["sm_80", "sm_90", "sm_100"],
    )


class Parts(_Costs):
    """Those that do one step of it."""

    params = (
        [
            f"{kernel} {view}"
            for view in VIEWS
            for kernel in ("statistics", "normalize", "products", "gradient")
        ],
        ["sm_90"],
    )
