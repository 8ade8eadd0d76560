"""``benchmarks/gpu_report.py`` where there is no GPU, and what it writes of a worker's answers."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_report.py"
CASE = {"op": "forward", "layout": "nchw", "dtype": "float16", "shape": [4, 256, 28, 28]}
TIMING = {"ms": 0.5, "lower": 0.4, "upper": 0.6, "exposed": 0, "samples": 7}
LAUNCH = {
    "kernel": "forward", "view": "planes", "format": "float16", "width": 8, "blocks": 264,
    "shared": 65536, "together": True, "cut": {"pieces": 2},
}  # fmt: skip
# A worker's process, whose answers are given.
WORKER = """
import json, sys, time
ANSWERS = json.loads({answers!r})
ASKED = {{"cuDNN": "torch", "torch.compile": "compile", "numbabn swept twice": "swept"}}
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "die":
        sys.exit(3)
    if do == "sleep":
        time.sleep(60)
    answer = ANSWERS.get(do, {{"did": do}})
    if "times" in answer:
        times = answer["times"].items()
        kept = {{k: v for k, v in times if k not in ASKED or ASKED[k] in request["ways"]}}
        answer = answer | {{"times": kept}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def gpu_report(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.EVERY = 0.0
    return module


def times(**milliseconds):
    return {name: TIMING | {"ms": ms} for name, ms in milliseconds.items()}


def answer(**changed):
    return {
        "times": times(numbabn=0.5, copy=0.4, cuDNN=1.0), "traffic": 10**9, "bytes": 5 * 10**8,
        "wrong": [], "kernels": {"numbabn": [LAUNCH]}, "errors": {"numbabn": {"y": 1e-4}},
    } | changed  # fmt: skip


def fake_workers(gpu_report, monkeypatch, folder, answers):
    (folder / "benchmarks").mkdir()
    code = WORKER.format(answers=json.dumps(answers))
    (folder / "benchmarks" / "gpu_figures.py").write_text(code)
    monkeypatch.setattr(gpu_report, "ROOT", folder)


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
    text = (tmp_path / "report.md").read_text()
    assert "| 4x256x28x28 | 0.5000 | 20% |" in text
    assert "| forward planes x8: 264, 65536 |" in text


def test_what_is_wrong_is_told_and_not_timed(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path)
    wrong = answer(
        wrong=["numbabn is off by nan"],
        errors={"numbabn": {"y": math.nan}},
        times=times(copy=0.4),
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
    lost = {"lose": {"failed": "x", "lost": True}}
    fake_workers(gpu_report, monkeypatch, tmp_path, lost)
    with (tmp_path / "log").open("w") as log:
        worker = gpu_report.Worker(log)
        for do in ("die", "sleep", "lose"):
            assert worker.ask("work", 60) == {"did": "work"}
            assert "failed" in worker.ask(do, 1 if do == "sleep" else 60)
            assert worker.process is None
        worker.stop()


def test_a_crew_does_everything_once(gpu_report, tmp_path, monkeypatch):
    """And goes on where one of its processes dies."""
    fake_workers(gpu_report, monkeypatch, tmp_path, {})
    requests = [{"do": "die" if k == 3 else "work", "k": k} for k in range(12)]
    with (tmp_path / "log").open("w") as log:
        crew = gpu_report.Crew(log, requests, 3)
        crew.finish(60)
    assert not crew.busy
    assert sorted(request["k"] for request, _ in crew.answers) == list(range(12))
    assert crew.failures() == ["1 times: the process died"]


def test_a_crew_that_is_late_is_ended(gpu_report, tmp_path, monkeypatch):
    fake_workers(gpu_report, monkeypatch, tmp_path, {})
    with (tmp_path / "log").open("w") as log:
        crew = gpu_report.Crew(log, [{"do": "sleep"}] * 5, 2)
        crew.finish(0.5)
    assert not crew.busy
    assert crew.answers == []


def test_the_most_important_comes_first(gpu_report):
    cases = gpu_report.cases_of(quick=False)
    assert [tuple(case["shape"]) for case in cases[:3]] == list(gpu_report.FIELD)
    assert len(cases) == 3 + 2 * 2 * 2 * 3 * 9
    assert len({json.dumps(case) for case in cases}) == len(cases)
    compiled = gpu_report.compiled_of(quick=False)
    assert compiled[:3] == cases[:3]
    assert all(case in cases for case in compiled)
    assert len({json.dumps(case) for case in compiled}) == len(compiled) == 3 + 2 * 2 * 2 * 2 * 9
    # Of the first image all kinds, before the next one.
    assert len({(c["op"], c["layout"], c["dtype"], c["shape"][0]) for c in compiled[3:19]}) == 16


FACTS = {"gpu": "none", "capability": [9, 0], "l2_bytes": 60 << 20}
CALLS = [
    {"call": name, "shape": [8, 64, 32, 32], "whole": whole, "pieces": pieces}
    for name, whole, pieces in (
        ("forward", 20.0, {"borrow": 5.0}), ("inference", 9.0, {"borrow": 4.0}),
        ("PyTorch's forward", 10.0, {}), ("PyTorch's inference", 9.5, {}),
    )
]  # fmt: skip
EVERYTHING = {
    "facts": FACTS,
    "variants": {"variants": [["forward", "planes", "float16", 8], ["normalize", "rows", "x", 1]]},
    "assemble": {"seconds": 1.0},
    "compile_for": {"seconds": 1.0},
    "measure": answer(
        times=times(numbabn=0.005, copy=0.004, cuDNN=0.01)
        | times(**{"torch.compile": 0.008, "numbabn swept twice": 0.006})
        | times(**{"numbabn, hot": 0.003, "copy, hot": 0.002}),
        bytes=5 * 10**6, traffic=10**7,
    ),
    "host": {"calls": CALLS},
    "kernels": {"kernels": {
        "forward planes": {"registers": 1, "shared": 2, "spilled": 0, "stack": 0, "resident": 2}
    }},
}  # fmt: skip


@pytest.fixture
def run(gpu_report, tmp_path, monkeypatch):
    """Make the report of a worker's answers, without tests; give what it found, and its text."""

    def run(answers, *arguments):
        fake_workers(gpu_report, monkeypatch, tmp_path, answers)
        monkeypatch.setattr(gpu_report, "lacking", lambda: None)
        monkeypatch.setattr(os, "environ", os.environ | {})
        out = tmp_path / "out"
        monkeypatch.setattr(sys, "argv", ["x", "--out", str(out), *arguments])
        gpu_report.main()
        text = (out / "report.md").read_text()
        assert "Traceback" not in text
        return json.loads((out / "report.json").read_text()), text

    return run


def test_the_whole_report(gpu_report, run):
    gpu_report.EVERY = 5.0
    found, text = run(EVERYTHING, "--no-tests")
    assert found["problems"] == []
    assert len(found["cases"]) == len(gpu_report.cases_of(quick=False))
    assert len(found["compiled"]) == len(gpu_report.compiled_of(quick=False))
    assert len(found["variants"]) == 2 * 2 * len(gpu_report.GROWING)
    assert found["cases"][0]["kernels"]["numbabn"] == [LAUNCH]
    lines = dict(re.findall(r"^\| ([^|]+) \| (.*) \|$", text, re.MULTILINE))
    asked = "at most 2.8 us | 5.00 us, hot in L2 3.00 us | **no** |"
    assert lines["forward training float16 (8, 64, 32, 32)"].startswith(asked)
    resnet = lines["ResNet-50, N = 256 and 32, forward and backward"]
    assert "1.60 in the mean, 1.60 at worst" in resnet
    assert "144 cases | yes" in resnet
    assert "times what held takes: 1.20 in the mean, 1.20 at worst" in text
    assert "0.80 in the mean" in lines["forward, inputs of at most 40 MB"]
    assert "0.67 in the mean" in lines["forward, inputs of at most 40 MB, hot"]
    assert "not measured | -" in lines["large inference"]
    assert "20.0 us, PyTorch 10.0 us | **no**" in lines["host time of forward"]
    assert "9.0 us, PyTorch 9.5 us | yes" in lines["host time of inference"]
    assert "not measured | -" in lines["host time of backward"]


@pytest.mark.parametrize("broken", [*EVERYTHING, "all"])
def test_whatever_fails_is_told_and_no_more(run, broken):
    broken = [*EVERYTHING] if broken == "all" else [broken]
    answers = EVERYTHING | {do: {"failed": "it broke", "lost": True} for do in broken}
    found, text = run(answers, "--quick", "--no-tests")
    assert any("it broke" in problem for problem in found["problems"])
    assert text.startswith("# numbabn on a GPU\n\n## Asked and measured\n")
    if "measure" in broken:
        assert "yes |" not in text.partition("host time")[0]


def test_many_lost_processes_end_the_figures(gpu_report, run, monkeypatch):
    monkeypatch.setattr(gpu_report, "LOST", 2)
    found, _ = run(EVERYTHING | {"measure": {"failed": "x", "lost": True}}, "--no-tests")
    assert len(found["cases"]) == len(found["variants"]) == 2
    assert len(found["compiled"]) == gpu_report.FAILURES
    assert any("after 2 lost processes" in problem for problem in found["problems"])


def test_no_time_is_no_crash(gpu_report, run, monkeypatch):
    monkeypatch.setattr(gpu_report, "BUDGET", 0.0)
    monkeypatch.setattr(gpu_report, "ENDS", dict.fromkeys(gpu_report.ENDS, 0.0))
    found, _ = run(EVERYTHING, "--no-tests")
    assert found["cases"] == found["variants"] == found["compiled"] == []


def test_tests_are_summed_up(gpu_report, tmp_path, monkeypatch):
    """Those that are late are ended."""
    tests = tmp_path / "root" / "tests" / "gpu"
    tests.mkdir(parents=True)
    (tests / "test_good.py").write_text("def test(): pass\n")
    (tests / "test_bad.py").write_text("def test(): assert 1 == 2\n")
    (tests / "test_late.py").write_text("import time\ndef test(): time.sleep(60)\n")
    (tmp_path / "root" / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    for path in tests.iterdir():
        path.write_text("import pytest\npytestmark = pytest.mark.gpu\n" + path.read_text())
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path / "root")
    report = gpu_report.Report(tmp_path)
    shards = {name: (f"test_{name}.py", "") for name in ("good", "bad")}
    gpu_report.finish_tests(report, gpu_report.start_tests(shards, tmp_path), 60)
    late = gpu_report.start_tests({"late": ("test_late.py", "")}, tmp_path)
    gpu_report.finish_tests(report, late, 0.5)
    found = report.found["tests"]
    assert [found[name]["good"] for name in ("good", "bad", "late")] == [True, False, False]
    assert any("assert 1 == 2" in line for line in found["bad"]["lines"])
    assert found["late"]["last"].startswith("stopped after")
    assert "===== bad" in (tmp_path / "tests.txt").read_text()


def test_every_test_file_is_in_a_shard(gpu_report):
    files = {path.name for path in (Path(__file__).parent / "gpu").glob("test_*.py")}
    assert {file for file, _ in (gpu_report.SHARDS | gpu_report.TIMING).values()} == files


def test_a_report_that_cannot_be_read_is_written(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path)
    report.found["cases"] = [{"op": "forward"}]
    report.write()
    assert json.loads((tmp_path / "report.json").read_text())["cases"] == [{"op": "forward"}]
    assert "KeyError" in (tmp_path / "report.md").read_text()


def test_what_the_device_waited_for_is_compared_to_nothing(gpu_report, tmp_path):
    report = gpu_report.Report(tmp_path)
    waited = times(copy=0.4, cuDNN=1.0) | {"numbabn": TIMING | {"exposed": 7}}
    gpu_report.add(report, "cases", CASE, answer(times=waited))
    (row,) = report.found["cases"]
    assert "of_copy" not in row
    assert "times_as_fast" not in row
    assert "| 4x256x28x28! |" in (tmp_path / "report.md").read_text()
