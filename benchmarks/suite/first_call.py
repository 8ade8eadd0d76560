"""What a process waits for before its first result: import, compilation, kernels from disk."""

import statistics
import subprocess
import sys
from typing import Any

TIMES = 3
CALL = """
import sys
from time import perf_counter

import numpy as np

import numbabn

x, out = np.ones((2, 32, 64, 56, 56), np.float32)
mean, invstd = np.zeros(64), np.ones(64)
running = mean.astype(x.dtype), invstd.astype(x.dtype)
calls = {
    "forward": lambda: numbabn.batch_norm_forward(x, out=out),
    "inference": lambda: numbabn.batch_norm_inference(x, *running, out=out),
    "backward": lambda: numbabn.batch_norm_backward(x, x, None, mean, invstd, out=out),
}
start = perf_counter()
calls[sys.argv[1]]()
print(perf_counter() - start)
"""
IMPORT = """
from time import perf_counter

import numba, numpy

start = perf_counter()
import numbabn

print(perf_counter() - start)
"""


def setup_cache() -> dict[str, Any]:
    from .compilation import compile_kernels

    return compile_kernels()


def _seconds(program: str, *args: str) -> float:
    """Run a program in a process of its own, some times; give the median of what it prints."""
    command = [sys.executable, "-c", program, *args]
    return statistics.median(
        float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        for _ in range(TIMES)
    )


class FirstCall:
    """Of an operation on float32, in a process of its own: kernels compiled, and from disk."""

    param_names = ("op",)
    params = (["forward", "inference", "backward"],)
    unit = "seconds"

    def setup(self, compiled: dict[str, Any], op: str) -> None:
        if op not in compiled["seconds"]:
            raise NotImplementedError

    def track_cold(self, compiled: dict[str, Any], op: str) -> float:
        return round(compiled["seconds"][op], 2)

    def track_warm(self, compiled: dict[str, Any], op: str) -> float:
        return round(_seconds(CALL, op), 4)


class Disk:
    """What kernels take there."""

    unit = "bytes"

    def track_cache_size(self, compiled: dict[str, Any]) -> int:
        """Of all kernels of all cases."""
        return compiled["nbytes"]


class Import:
    """Of numbabn by itself, once NumPy and Numba are there."""

    unit = "seconds"

    def track_import(self, compiled: dict[str, Any]) -> float:
        return round(_seconds(IMPORT), 4)
