"""The model of device times, and the table of what `schedule` chooses, which the docs have."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numbabn.cli.bench.cases import Case
from numbabn.cli.bench.suites import SUITES
from numbabn.cuda import model
from numbabn.cuda.compilation import Code
from numbabn.cuda.schedule import BLOCKS, is_held

H200 = model.GPUS["H200"]
FLOAT16, FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)
DOCS = Path(__file__).parents[2] / "docs" / "cuda.md"


def code(registers, shared):
    return Code(b"", "", f"Used {registers} registers, {shared} bytes smem, 0 bytes stack frame", 2)


@pytest.mark.parametrize(
    ("registers", "shared", "dynamic", "blocks"),
    [
        (128, 2368, 80 << 10, 2),
        (129, 2368, 80 << 10, 1),  # 136 of each thread, as warps are given them
        (64, 2368, 0, 4),
        (32, 16384, 96 << 10, 2),
        (32, 16384, 98 << 10, 1),
        (32, 320, 0, 8),
        (16, 320, 0, 8),  # no more threads
        (32, 16384, 230 << 10, 0),
    ],
)
def test_blocks_of_a_multiprocessor(registers, shared, dynamic, blocks):
    assert model.resident_blocks(code(registers, shared), dynamic, H200) == blocks


def chosen(op, layout, dtype, N, image):
    case = Case(op, layout, dtype.name, (N, *image))
    cut = model.cut_of(op, case.array_shape, case.axis, dtype)
    if not is_held(cut.shape, BLOCKS):
        return "twice"
    side = f" of {(cut.width * dtype.itemsize) << cut.shape.across} B" if cut.view == "rows" else ""
    return f"{cut.shape.pieces}{side}"


def table():
    """Say of how many pieces a channel is, of ResNet-50's shapes."""
    columns = [(N, layout) for N in (32, 256) for layout in ("nchw", "nhwc")]
    lines = ["| | " + " | ".join(f"N = {N}, {layout.upper()}" for N, layout in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for dtype in (FLOAT16, FLOAT32):
        for image in SUITES["resnet50"].images:
            cells = [
                ", ".join(chosen(op, layout, dtype, N, image) for op in ("forward", "backward"))
                for N, layout in columns
            ]
            lines.append(f"| {dtype.name} {'x'.join(map(str, image))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_docs_say_what_is_chosen():
    assert table() in DOCS.read_text(encoding="utf-8"), "\n" + table()


def test_a_call_is_cut_as_it_will_be():
    cut = model.cut_of("forward", (32, 64, 56, 56), 1, FLOAT32)
    assert (cut.view, cut.width) == ("planes", 4)
    assert cut.shape[:3] == (32, 64, 3136)
    cut = model.cut_of("backward", (32, 56, 56, 64), -1, np.dtype(ml_dtypes.bfloat16))
    assert (cut.view, cut.width) == ("rows", 8)
    assert cut.shape[:3] == (1, 64, 32 * 3136)
    assert cut.summed == 2 * 2 * 32 * 64 * 3136
    assert model.cut_of("inference", (8, 512, 7, 7), 1, FLOAT16).view == "short"


def test_what_is_held_moves_once():
    found = model.predict("forward", (32, 256, 56, 56), 1, FLOAT32, H200)
    assert found.variant == "held"
    assert found.nbytes == 2 * 4 * 32 * 256 * 3136
    assert found.bounds["memory"] == pytest.approx(found.nbytes / 4.3e12)
    assert found.seconds >= max(found.bounds.values())
    assert found.bound in (*found.bounds, "launch")


def test_what_is_swept_twice_moves_more_but_for_what_l2_keeps():
    shape = (256, 112, 112, 64)
    found = model.predict("forward", shape, -1, FLOAT32, H200)
    assert (found.variant, found.launches) == ("swept twice", 3)
    size = 4 * int(np.prod(shape))
    assert 3 * size - H200.cache // 2 < found.nbytes < 3.1 * size
    slower = model.predict("forward", shape, -1, FLOAT32, H200._replace(copy=1e12))
    assert slower.seconds > found.seconds
    assert slower.bound == "memory"


def test_inference_is_one_sweep():
    found = model.predict("inference", (4, 128, 64, 64), 1, FLOAT16, H200)
    assert (found.variant, found.launches) == ("one sweep", 1)
    assert found.nbytes == 2 * 2 * 4 * 128 * 4096


def test_a_gpu_that_holds_less_sweeps_twice():
    small = H200._replace(multiprocessors=20)
    assert model.predict("forward", (256, 64, 112, 112), 1, FLOAT32, small).variant == "swept twice"
    assert model.predict("forward", (2, 64, 14, 14), 1, FLOAT32, small).variant == "held"
