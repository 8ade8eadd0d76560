"""Kernels in Numba's simulator: in processes of their own, where it is on from the start.

Single tests run with ``NUMBA_ENABLE_CUDASIM=1 pytest tests/cuda/simulator -k ...``.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

for module in ("numba_cuda", "greenlet"):
    if find_spec(module) is None:
        pytest.skip(f"{module} is not installed", allow_module_level=True)

DIRECTORY = Path(__file__).parent / "simulator"
# Side by side; blocks are small enough that tiny inputs cross their borders, or as on a GPU.
RUNS = {
    "training": ("small", "-k", "test_training"),
    "all else": ("small", "-k", "not test_training"),
    "blocks as on a GPU": ("real", "-m", "real_blocks"),
}


@pytest.fixture(scope="module")
def processes():
    started = {}
    for name, (blocks, *choice) in RUNS.items():
        sizes = {"NUMBA_ENABLE_CUDASIM": "1", "NUMBABN_TEST_BLOCKS": blocks}
        started[name] = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(DIRECTORY), *choice],
            env=os.environ | sizes,
            cwd=DIRECTORY.parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield started
    for process in started.values():
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("name", RUNS)
def test_in_a_process_of_its_own(processes, name):
    output = processes[name].stdout.read()
    if processes[name].wait():
        pytest.fail(output, pytrace=False)
