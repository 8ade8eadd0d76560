"""Kernels of a caller's own that call `numbabn.cuda.device`, as machine code for GPUs not here.

What they compute is tested in ``simulator/test_device.py``.
"""

import os
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import sass

if sass.disassembler() is None:
    pytest.skip("nvdisasm is not installed", allow_module_level=True)

import numpy as np
from numba import cuda
from numba.cuda import dispatcher, types

from numbabn.cuda import compilation
from numbabn.cuda import device as bn

EXAMPLE = Path(__file__).parents[2] / "examples" / "cuda_epilogue.py"
CAPABILITIES = (8, 0), (9, 0), (10, 0)
ROW = types.float32[::1]
every_capability = pytest.mark.parametrize("capability", CAPABILITIES, ids=str)


def compiled(kernel, capability, *kinds):
    code = compilation.assemble(kernel, types.void(*kinds), capability, resident=2)
    return sass.read(code.cubin, code.report)


def sweeps(kernel):
    """Give the loops that move data: all by 16 bytes at once, or where it must be, one by one."""
    return [each for each in kernel.loops if 128 in each.moved("LDG")]


def check(kernel):
    assert kernel.stack == kernel.spilled == 0
    for each in sweeps(kernel):
        assert not [str(one) for one in each.instructions if one.is_f64]
    for body in kernel.functions.values():
        assert not [str(one) for one in body if one.name in ("LD", "ST", "ATOM", "ATOMG", "RED")]


# Each a kernel of a caller's own.


def normalized(x, weight, bias, eps, y):
    c, step = cuda.blockIdx.x, 4 * cuda.blockDim.x
    moments = bn.no_moments()
    for i in range(4 * cuda.threadIdx.x, x.shape[1], step):
        moments = bn.add4(moments, bn.load4(x[c], i), x.shape[1] - i)
    stats = bn.block_stats(moments)
    constants = bn.affine(stats.mean, stats.m2 / stats.count, weight[c], bias[c], eps)
    for i in range(4 * cuda.threadIdx.x, x.shape[1], step):
        bn.store4(y[c], i, bn.normalize4(bn.load4(x[c], i), constants))


def added_up(x, out):
    moments = bn.no_moments()
    for i in range(4 * cuda.threadIdx.x, len(x), 4 * cuda.blockDim.x):
        moments = bn.add4(moments, bn.load4(x, i), len(x) - i)
    out[0], out[1], out[2] = moments.count, moments.mean, moments.mean_rest
    out[3], out[4] = moments.m2, moments.m2_rest


def copied(x, y):
    for i in range(4 * cuda.threadIdx.x, len(x), 4 * cuda.blockDim.x):
        bn.store4(y, i, bn.load4(x, i))


@every_capability
def test_machine_code(capability):
    kind = types.float32[:, ::1]
    kernel = compiled(normalized, capability, kind, ROW, ROW, types.float64, kind)
    check(kernel)
    # Each a load of 16 bytes, beside the four that take its place off its alignment.
    first, second = sweeps(kernel)
    assert first.moved("LDG") == second.moved("LDG") == [32] * 4 + [128]
    assert first.moved("STG") == []
    assert second.moved("STG") == [32] * 4 + [128]


@every_capability
def test_the_example(capability):
    spec = spec_from_file_location("cuda_epilogue", EXAMPLE)
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    data, wide = types.float32[:, :, ::1], types.float64[::1]
    kernel = compiled(
        example.residual_norm_gelu_int8.py_func, capability,
        data, data, ROW, ROW, types.float64, types.int8[:, :, ::1], wide, wide,
    )  # fmt: skip
    check(kernel)
    first, second = sweeps(kernel)
    assert first.moved("LDG") == second.moved("LDG") == [32] * 8 + [128] * 2
    assert second.moved("STG") == [8] * 4 + [32]


@pytest.mark.parametrize(
    ("kind", "bits"),
    [(types.int8, 32), (types.uint8, 32), (types.int16, 64), (types.float16, 64), (ROW.dtype, 128)],
    ids=str,
)
def test_what_moves_at_once(kind, bits):
    (sweep,) = compiled(copied, (9, 0), kind[::1], kind[::1]).loops
    for name in ("LDG", "STG"):
        assert sweep.moved(name) == [bits // 4] * 4 + [bits]


def test_float64_moves_in_two_halves():
    (sweep,) = compiled(copied, (9, 0), types.float64[::1], types.float64[::1]).loops
    assert sweep.moved("LDG") == [64] * 4 + [128] * 2


def test_an_array_with_gaps_is_refused():
    with pytest.raises(Exception, match=r"is_aligned|get_four"):
        compiled(copied, (9, 0), types.float32[:], ROW)


SUMS = "add", "sub", "add.rn", "sub.rn"


def test_fast_math_of_the_caller_s_changes_no_sum(monkeypatch):
    """What a sum has rounded away would be 0 if LLVM took it for algebra."""
    found = SimpleNamespace(compute_capability=(9, 0))
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: found)

    def sums(fastmath):
        ptx, _ = cuda.compile(
            added_up, types.void(ROW, ROW), cc=(9, 0), abi="numba", fastmath=fastmath
        )
        text = ptx.decode() if isinstance(ptx, bytes) else ptx
        assert (".ftz" in text.replace("rcp.approx.ftz", "")) == fastmath
        return [text.count(f"{name}.f32") + text.count(f"{name}.ftz.f32") for name in SUMS]

    assert sums(True) == sums(False)


def test_documentation_compiles():
    """The module's own example, as it stands."""
    lines = [line[4:] for line in bn.__doc__.splitlines() if line.startswith((">>> ", "... "))]
    names = {}
    exec("\n".join(lines), names)
    kind = types.float32[:, ::1]
    check(compiled(names["normalize_tanh"].py_func, (9, 0), kind, ROW, ROW, types.float64, kind))


def test_numbers_of_memory_are_taken_as_float32():
    """Whatever dtype a thread loads, no sum of the loop is float64."""

    def of_int8(x, out):
        moments = bn.no_moments()
        for i in range(4 * cuda.threadIdx.x, len(x), 4 * cuda.blockDim.x):
            moments = bn.add4(moments, bn.load4(x, i), len(x) - i)
        stats = bn.block_stats(moments)
        out[0] = np.float32(stats.mean)

    (sweep,) = compiled(of_int8, (9, 0), types.int8[::1], ROW).loops
    assert sweep.moved("LDG") == [8] * 4 + [32]
    assert not any(each.is_f64 for each in sweep.instructions)
