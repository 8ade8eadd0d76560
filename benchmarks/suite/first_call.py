"""What a process waits for before its first result: import, compilation, kernels from disk."""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .grid import in_parallel

OPS = ["forward", "inference", "backward"]
IMPORTS = 7
CALL = """
import json, sys
from time import perf_counter

import numpy as np

import numbabn

op = sys.argv[1]
x, out = np.ones((2, 32, 64, 56, 56), np.float32)
mean, invstd = np.zeros(64), np.ones(64)
running = mean.astype(x.dtype), invstd.astype(x.dtype)
calls = {
    "forward": lambda: numbabn.batch_norm_forward(x, out=out),
    "inference": lambda: numbabn.batch_norm_inference(x, *running, out=out),
    "backward": lambda: numbabn.batch_norm_backward(x, x, None, mean, invstd, out=out),
}
start = perf_counter()
calls[op]()
print(json.dumps(perf_counter() - start))
"""
IMPORT = """
from time import perf_counter

import numba, numpy

start = perf_counter()
import numbabn

print(perf_counter() - start)
"""


class First(NamedTuple):
    """Of an operation on float32."""

    cold: float  # seconds of a process's first call that finds nothing on disk
    warm: float  # and of one that finds what the other left there
    nbytes: int  # that it left


def seconds(program: str, *args: str, cache: str = "") -> float:
    """Run a program in a process of its own; give what it prints."""
    environment = os.environ | ({"NUMBA_CACHE_DIR": cache} if cache else {})
    done = subprocess.run(
        [sys.executable, "-c", program, *args], env=environment, stdout=subprocess.PIPE, check=True
    )
    return float(done.stdout)


def first_calls(op: str) -> First:
    with tempfile.TemporaryDirectory() as folder:
        cold = seconds(CALL, op, cache=folder)
        warm = statistics.median(seconds(CALL, op, cache=folder) for _ in range(3))
        nbytes = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return First(cold, warm, nbytes)


class Compilation:
    """Of the first call of an operation on float32, in a process of its own."""

    param_names = ("op",)
    params = (OPS,)
    timeout = 600

    def setup_cache(self) -> dict[str, First]:
        """Compile two operations at a time: one after the other takes twice as long."""
        return dict(zip(OPS, in_parallel(first_calls, OPS), strict=True))

    def track_cold(self, found: dict[str, First], op: str) -> float:
        return round(found[op].cold, 2)

    def track_warm(self, found: dict[str, First], op: str) -> float:
        return round(found[op].warm, 4)

    def track_cache_size(self, found: dict[str, First], op: str) -> int:
        return found[op].nbytes

    track_cold.unit = track_warm.unit = "seconds"
    track_cache_size.unit = "bytes"


class Import:
    """Of numbabn by itself, once NumPy and Numba are there."""

    unit = "seconds"

    def track_import(self) -> float:
        return round(statistics.median(seconds(IMPORT) for _ in range(IMPORTS)), 4)
