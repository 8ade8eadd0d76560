import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import numbabn
from numbabn import cpu
from numbabn.cli import main, warmup
from numbabn.cpu import planes, rows
from numbabn.cpu.compilation import Kernel

ROOT = Path(numbabn.__file__).parents[1]


def test_variants_are_all_that_can_be_compiled():
    kernels = {
        id(value)
        for module in (planes, rows)
        for value in vars(module).values()
        if isinstance(value, Kernel)
    }
    assert {id(kernel) for views in cpu._KERNELS.values() for kernel in views.values()} == kernels
    variants = cpu.variants()
    assert len(set(variants)) == len(set(map(str, variants))) == len(kernels) * 4 * 2
    assert cpu.variants(["backward"], ["float64"]) == [
        ("backward", "planes", "float64", False),
        ("backward", "planes", "float64", True),
        ("backward", "rows", "float64", False),
        ("backward", "rows", "float64", True),
    ]


# On one thread or two: neither view, small or large, needs the compiler.
CALLS = """
import numpy as np
import numbabn
from numbabn import cpu

for shape in (4, 32), (4096, 32), (4, 3, 999), (4, 30, 999):
    numbabn.batch_stats(np.ones(shape, np.float32))
stats = [
    variant.stats
    for kernel in cpu._KERNELS["statistics"].values()
    for variant in (kernel.serial, kernel.parallel)
]
print(*(found.cache_hits.total() for found in stats))
print(*(found.cache_misses.total() for found in stats))
"""


def test_no_later_process_compiles(capsys):
    said = r"4 kernels \(statistics; float32\): {}, \d+\.\d s, kept in " + re.escape(
        cpu.cache_folder()
    )
    assert main(["warmup", "--op", "statistics"]) == 0
    assert re.fullmatch(
        said.format("(all there already|. compiled, . there already)"),
        capsys.readouterr().out.strip(),
    )
    assert main(["warmup", "--op", "statistics"]) == 0
    assert re.fullmatch(said.format("all there already"), capsys.readouterr().out.strip())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CALLS],
        env=os.environ | {"NUMBA_NUM_THREADS": "2"},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["1 1 1 1", "0 0 0 0"]


@pytest.fixture
def prepared(monkeypatch):
    """Variants that the command had compiled, of which those on rows were there already."""
    variants = []

    def prepare(variant):
        variants.append(variant)
        return variant.view == "planes"

    monkeypatch.setattr(cpu, "prepare", prepare)
    return variants


def test_all_is_all(capsys, prepared):
    assert main(["warmup", "--dtype", "all", "--op", "all,forward"]) == 0
    assert prepared == cpu.variants()
    assert capsys.readouterr().out.startswith(
        "64 kernels (forward, inference, backward, statistics; "
        "float32, float64, float16, bfloat16): 32 compiled, 32 there already, "
    )


def test_default_is_float32(prepared):
    assert main(["warmup"]) == 0
    assert prepared == cpu.variants(dtypes=["float32"])


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal_with_rich(capsys, monkeypatch, prepared, rich):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    if not rich:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["warmup", "--op", "forward"]) == 0
    assert ("forward rows float32 parallel" in capsys.readouterr().out) == rich


def test_no_folder_takes_one_line(capsys, monkeypatch, prepared):
    monkeypatch.setattr(cpu, "cache_folder", lambda: None)
    assert main(["warmup"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), prepared) == ("", 1, [])
    assert err.startswith("numbabn: kernels cannot be kept: no folder ")
    assert "NUMBA_CACHE_DIR" in err


def test_report(capsys):
    assert main(["warmup", "--report", "--op", "statistics"]) == 0
    title, head, row = capsys.readouterr().out.splitlines()
    assert title.startswith("Milliseconds of a call on 32x64x56x56")
    assert re.findall(r"\w[\w, ]*?(?=  |$)", head) == ["first, cold", "first, warm", "later"]
    assert re.fullmatch(r"statistics float32 +\d+ +\d+ +\d+\.\d\d", row)
    assert len(row) == len(head)


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_every_operation_can_be_timed(capsys, monkeypatch, dtype):
    calls = []
    for name in (
        "batch_norm_forward",
        "batch_norm_inference",
        "batch_norm_backward",
        "batch_stats",
    ):
        monkeypatch.setattr(numbabn, name, lambda x, *args, **options: calls.append(x.dtype.name))
    monkeypatch.setattr(warmup, "SHAPE", (2, 3, 5, 7))
    for operation in cpu.OPERATIONS:
        warmup.time_calls(operation, dtype)
        first, later = json.loads(capsys.readouterr().out)
        assert min(first, later) >= 0
    assert calls == [dtype] * 4 * (1 + warmup.LATER)


def test_a_process_that_fails_takes_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warmup, "_PROGRAM", "import sys; sys.exit(3)")
    assert main(["warmup", "--report", "--op", "forward"]) == 1
    assert capsys.readouterr().err == "numbabn: forward of float32 failed with code 3\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--op", "fold"], "expected some of forward, inference, backward, statistics, all, with"),
        (["--dtype", "float32,int8"], "got 'float32,int8'"),
        (["--dtype", ","], "got ','"),
        (["nchw"], "unrecognized arguments: nchw"),
    ],
)
def test_wrong_use_takes_one_line(capsys, argv, message):
    assert main(["warmup", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("numbabn: ")
    assert message in err
