"""What ``numbabn bench --device cuda`` is made of, as far as that shows without a device.

The command itself runs in `tests/cuda/simulator` on simulated arrays, and in `tests/gpu` for real.
"""

import os

import pytest

from numbabn.cli.bench import results

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import sass
from numba.cuda import types

from numbabn.cli.bench.devices import cuda, cuda_clock, cuda_limits
from numbabn.cuda import compilation

CAPABILITY = (9, 0)
MIB = 2**20


@pytest.mark.parametrize(
    ("nbytes", "sets"), [(1, 128), (MIB, 128), (3 * MIB, 50), (149 * MIB, 2), (1200 * MIB, 1)]
)
def test_sets_fill_the_cache_three_times(nbytes, sets):
    assert cuda.sets_of(nbytes, 50 * MIB) == sets


def test_place_of_the_figures():
    gpu = {
        "name": "A GPU", "compute_capability": [9, 0], "multiprocessors": 132,
        "l2_bytes": 50 * MIB, "driver_version": "580.1",
    }  # fmt: skip
    place = "Device time on A GPU (compute capability 9.0, 132 multiprocessors, 50 MiB of L2)"
    assert results.place({"gpu": gpu}) == f"{place}, driver 580.1"
    gpu["driver_version"] = None
    assert results.place({"gpu": gpu}) == place


needs_disassembler = pytest.mark.skipif(
    sass.disassembler() is None, reason="nvdisasm is not installed"
)


def assembled(function, *signature):
    code = compilation.assemble(function, signature, CAPABILITY, resident=1)
    kernel = sass.read(code.cubin, code.report)
    assert kernel.spilled == kernel.stack == 0
    return kernel


@needs_disassembler
def test_the_device_looks_at_the_gate_again_and_again():
    (loop,) = assembled(cuda_clock.hold, types.uint32[::1], types.int64).loops
    names = [each.name for each in loop.instructions]
    assert names.count("LDG") == 1
    assert {"NANOSLEEP", "MEMBAR", "CCTL"} <= set(names)  # the last empties the nearest cache


@needs_disassembler
@pytest.mark.parametrize("reads", [1, 2])
def test_the_limit_has_all_loads_on_their_way_before_it_stores(reads):
    array = types.uint64[::1]
    kernel = assembled(cuda_limits.sweep(reads).py_func, array, array, array)
    (body,) = kernel.functions.values()
    moves = [each for each in body if each.name in ("LDG", "STG")]
    assert {each.bits for each in moves} == {64}
    order = "".join(each.name[0] for each in moves)
    assert "L" * cuda_limits.EACH * reads + "S" * cuda_limits.EACH in order
