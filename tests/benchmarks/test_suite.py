"""The benchmarks run, and find what they are there to find."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "benchmarks" / "suite"
pytest.importorskip("asv_runner")
if not hasattr(os, "fork"):
    pytest.skip("kernels are compiled in forks", allow_module_level=True)


def run_once(folder, *lacking):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("once.py"), SUITE, *lacking],
        env=os.environ
        | {"ASV_ENV_DIR": str(folder), "ASV_COMMIT": "some", "NUMBA_DISABLE_CUDA": "1"},
        cwd=folder,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert (folder / "compiled" / "some" / "compiled.json").exists()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("suite")


@pytest.fixture(scope="module")
def found(folder):
    return run_once(folder)


def test_all_are_found(found):
    layouts = ["NC", "NCHW", "NHWC"]
    costs = ["registers", "spills", "shared", "instructions", "bytes_per_access"]
    assert sorted(found) == sorted(
        [f"times.{name}.time_call" for name in (*layouts, "Float16", "Small")]
        + [f"limits.{name}.track_fraction" for name in (*layouts, "Float16")]
        + [f"gpu.{name}.track_{what}" for name in layouts for what in ("device_time", "fraction")]
        + [f"cuda_code.{name}.track_{what}" for name in ("Fused", "Parts") for what in costs]
        + [f"memory.{name}" for name in ("Peak.peakmem_baseline", "Peak.peakmem_call")]
        + ["memory.Added.track_added"]
        + ["first_call.FirstCall.track_cold", "first_call.FirstCall.track_warm"]
        + ["first_call.Disk.track_cache_size", "first_call.Import.track_import"]
        + ["accuracy.Accuracy.track_error", "against_numpy.NumPy.track_ratio"]
        + ["against_reference.Reference.track_time"]
    )


def test_times_and_ratios_are_positive(found):
    for name, value in found.items():
        if name.startswith("times."):
            assert value["samples"][0] > 0
        if name.startswith(("limits.", "against_numpy.", "first_call.")):
            assert value > 0


def test_the_references_kernels_are_kept_apart(folder, found):
    (reference,) = re.findall(
        '^REFERENCE = "(.+)"', (SUITE / "against_reference.py").read_text(), re.M
    )
    command = ["git", "cat-file", "-e", reference]
    if subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("the history here does not go back to the reference")
    assert found["against_reference.Reference.track_time"] > 0
    kept = ROOT / ".asv" / "reference" / reference
    assert (kept / "numbabn" / "__init__.py").exists()
    assert [*kept.glob("kernels/**/*.nbi")]
    # Nothing was added to what the commit's own kernels took.
    compiled = folder / "compiled" / "some"
    recorded = json.loads((compiled / "compiled.json").read_text())["nbytes"]
    assert sum(path.stat().st_size for path in compiled.rglob("*.nb?")) == recorded > 0


def test_a_call_that_compiles_takes_longest(found):
    warm, cold = (found[f"first_call.FirstCall.track_{how}"] for how in ("warm", "cold"))
    assert warm < cold / 2


def test_errors_are_a_few_units_in_the_last_place(found):
    assert 0 < found["accuracy.Accuracy.track_error"] < 4


def test_memory_is_more_than_the_arrays(found):
    # x and y of 32x64x56x56 float32, touched before either is measured.
    baseline, call = (found[f"memory.Peak.peakmem_{what}"] for what in ("baseline", "call"))
    assert 2 * 4 * 32 * 64 * 56 * 56 < baseline <= call
    # A copy of x would make it 1.5.
    assert 1 <= found["memory.Added.track_added"] < 1.1


@pytest.mark.skipif(
    find_spec("numba_cuda") is None or sass.disassembler() is None,
    reason="no compiler for CUDA, or no disassembler",
)
def test_machine_code_is_read(found):
    for kernel in ("Fused", "Parts"):
        cost = {what: found[f"cuda_code.{kernel}.track_{what}"] for what in (
            "registers", "spills", "instructions", "bytes_per_access"
        )}  # fmt: skip
        assert 0 < cost["registers"] <= 255
        assert cost["spills"] == 0
        assert cost["instructions"] > 0
        assert 4 <= cost["bytes_per_access"] <= 16


def test_without_a_gpu_device_times_are_left_out(found):
    assert {value for name, value in found.items() if name.startswith("gpu.")} == {None}


def test_of_an_operation_that_a_commit_lacks_nothing_is_measured(tmp_path):
    found = run_once(tmp_path, "batch_norm_inference")
    assert {name.split(".")[0] for name, value in found.items() if value is not None} <= {
        "cuda_code", "first_call"
    }  # fmt: skip
    assert found["first_call.FirstCall.track_warm"] is None
    assert found["first_call.Import.track_import"] > 0


def test_gains_are_no_regressions_nor_is_what_the_system_decides(found):
    # asv takes what rises for a loss.
    conf = json.loads((ROOT / "asv.conf.json").read_text())
    (pattern,) = (name for name, commit in conf["regressions_first_commits"].items() if not commit)
    gains = {name for name in found if re.match(pattern, name)}
    assert {name.rpartition("_")[2] for name in gains} == {
        "access", "fraction", "ratio", "baseline", "call"
    }  # fmt: skip
    assert not any(name.startswith(("times.", "accuracy.", "memory.Added")) for name in gains)
