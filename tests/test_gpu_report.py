"""``benchmarks/gpu_report.py`` where there is no GPU, and what it writes of a worker's answers."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_report.py"
CASE = {"op": "forward", "layout": "nchw", "dtype": "float16", "shape": [4, 256, 28, 28]}
TIMING = {"ms": 0.5, "lower": 0.4, "upper": 0.6, "exposed": 0}


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(**changed):
    times = {"numbabn": TIMING, "copy": TIMING | {"ms": 0.4}, "cuDNN": TIMING | {"ms": 1.0}}
    return {
        "times": times, "traffic": 10**9, "bytes": 5 * 10**8, "wrong": [], "kernels": [],
        "errors": {"numbabn": {"y": 1e-4}},
    } | changed  # fmt: skip


def test_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", out],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "expected a machine with a CUDA device, but PyTorch" in done.stderr
    assert not out.exists()


def test_a_case_is_put_beside_a_copy_and_pytorch(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path)
    gpu_report.add(report, "cases", CASE, answer())
    (row,) = json.loads((tmp_path / "report.json").read_text())["cases"]
    assert row["gb_s"] == pytest.approx(2000)
    assert row["of_copy"] == pytest.approx(0.8)
    assert (row["best"], row["times_as_fast"]) == ("cuDNN", 2.0)
    assert "| 4x256x28x28 | 0.5000 | 20% |" in (tmp_path / "report.md").read_text()


def test_what_is_wrong_is_told_and_not_timed(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path)
    wrong = answer(
        wrong=["numbabn is off by nan"],
        errors={"numbabn": {"y": math.nan}},
        times={"copy": TIMING},
    )
    gpu_report.add(report, "cases", CASE, wrong)
    gpu_report.add(report, "cases", CASE, {"failed": "the process died"})
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["cases"][0]["errors"]["numbabn"]["y"] == "nan"
    assert len(found["problems"]) == 2
    text = (tmp_path / "report.md").read_text()
    assert "| 4x256x28x28 | numbabn is off by nan |" in text
    assert "| 4x256x28x28 | the process died |" in text


def test_a_worker_that_dies_is_started_again(gpu_report, tmp_path, monkeypatch):
    """And so is one that is late, or has lost its device."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_figures.py").write_text(
        "import json, sys, time\n"
        "for line in sys.stdin:\n"
        "    do = json.loads(line)['do']\n"
        "    sys.exit(3) if do == 'die' else time.sleep(60) if do == 'sleep' else None\n"
        "    print(json.dumps({'failed': 'x', 'lost': True} if do == 'lose' else {'did': do}))\n"
    )
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    with (tmp_path / "log").open("w") as log:
        worker = gpu_report.Worker(log)
        for do in ("die", "sleep", "lose"):
            assert worker.ask("work", 60) == {"did": "work"}
            assert "failed" in worker.ask(do, 1 if do == "sleep" else 60)
            assert worker.process is None
        worker.stop()


def test_the_most_important_comes_first(gpu_report):
    cases = gpu_report.cases_of(quick=False)
    assert [tuple(case["shape"]) for case in cases[:3]] == gpu_report.FIELD
    assert len(cases) == 3 + 2 * 2 * 2 * 3 * 9
    assert len({json.dumps(case) for case in cases}) == len(cases)
