"""These tests run where numba simulates a GPU: with NUMBA_ENABLE_CUDASIM=1 from the start.

Blocks are small there, so that tiny inputs cross their borders; with NUMBABN_TEST_BLOCKS=real they
are as on a GPU.
"""

import os
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
REAL = os.environ.get("NUMBABN_TEST_BLOCKS") == "real"

if not SIMULATED:
    collect_ignore_glob = ["test_*.py"]


def _shrink_blocks():
    """Change the sizes that kernels are built on before any module takes them over."""
    (package,) = find_spec("numbabn").submodule_search_locations
    name = "numbabn.cuda.formats"
    spec = spec_from_file_location(name, Path(package) / "cuda" / "formats.py")
    formats = module_from_spec(spec)
    assert "numbabn.cuda" not in sys.modules
    sys.modules[name] = formats
    spec.loader.exec_module(formats)
    warp, threads = 8, 64  # as 32 and 256: threads are as many as lanes of a warp
    sizes = {
        "WARP": warp,
        "THREADS": threads,
        "CREWS": threads // warp,
        "STAGE": threads * formats.LANES,
    }
    assert sizes.keys() <= vars(formats).keys()
    vars(formats).update(sizes)

    from numbabn.cuda import schedule

    # Few, so that some shapes of the table are held and others are swept twice.
    schedule.DEPTH, schedule.BLOCKS = 16, 4

    from numbabn.cuda import simulation

    simulation.RUNNING, simulation.L2 = 4, 1 << 12


if SIMULATED and not REAL:
    _shrink_blocks()

GUARD = 64  # bytes on either side of an array


@pytest.fixture(autouse=SIMULATED)
def fresh_workspace():
    """A kernel that failed leaves its counters anywhere."""
    from numbabn.cuda import workspace

    workspace._workspace.cache_clear()


@pytest.fixture(autouse=SIMULATED)
def guarded_memory(monkeypatch):
    """Fresh memory holds NaN, and what lies beside it stays as it is."""
    from numba import cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    guarded = []

    def device_array(shape, dtype=np.float64, strides=None, **_):
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(nbytes + 3 * GUARD, 0xFF, np.uint8)
        start = GUARD + -memory.ctypes.data % GUARD
        guarded.append((memory, start, nbytes))
        return FakeCUDAArray(np.ndarray(shape, dtype, memory[start:], 0, strides))

    monkeypatch.setattr(cuda, "device_array", device_array)
    yield
    for memory, start, nbytes in guarded:
        assert (memory[:start] == 0xFF).all(), "written in front of an array"
        assert (memory[start + nbytes :] == 0xFF).all(), "written behind an array"
