"""The gate: what it makes of ratios, how they are taken, what it says of a wrong use."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import numbabn
from numbabn.cpu import compilation, planes, rows

asv = pytest.importorskip("asv")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gate():
    return script("gate")


@pytest.fixture(scope="module")
def turns():
    return script("suite/turns")


class Sides:
    """Answers ratios of a first look and of a second, or an error, by name."""

    def __init__(self, gate, looks):
        self.commits = {"base": "b" * 40, "head": "h" * 40}
        self.gate, self.looks = gate, looks
        self.second = []

    def run(self, names, seconds, round_):
        if seconds is None:
            return []
        first = seconds == self.gate.SECONDS
        if not first:
            self.second = list(names)
        return [self.answer(self.looks[name], 0 if first else 1, round_) for name in names]

    def answer(self, looks, at, round_):
        if isinstance(looks, tuple):
            return dict(zip(("side", "error"), looks, strict=True))
        ratio = looks[at][round_ % len(looks[at])]
        return {"ratio": ratio, "base": 1e-3, "head": 1e-3 * ratio}


def decided(gate, looks, threshold=5.0):
    sides = Sides(gate, looks)
    return gate.decide(sides, {name.upper(): name for name in looks}, threshold), sides


def test_what_a_second_look_shows_decides(gate):
    found, sides = decided(gate, {
        "same": [[1.0, 1.01, 0.99]],
        "cleared": [[1.2, 1.1, 1.3], [1.0, 1.01, 1.02]],
        "slower": [[1.04, 1.05, 1.03], [1.06, 1.2, 1.07]],
        "faster": [[0.9, 0.9, 0.9], [0.91, 0.92, 0.9]],
    })  # fmt: skip
    assert sides.second == ["cleared", "slower", "faster"]
    assert {name: each["verdict"] for name, each in found.items()} == {
        "SAME": "same", "CLEARED": "same", "SLOWER": "slower", "FASTER": "faster"
    }  # fmt: skip


def test_one_odd_round_raises_no_alarm(gate):
    found, _ = decided(gate, {"odd": [[1.0, 1.5, 1.0]]})
    assert found["ODD"]["verdict"] == "same"


def test_a_threshold_is_in_percent(gate):
    looks = {"a": [[1.08], [1.08]]}
    assert decided(gate, looks, 10.0)[0]["A"]["verdict"] == "same"
    assert decided(gate, looks, 7.0)[0]["A"]["verdict"] == "slower"


def test_a_report_names_what_is_slower_and_what_could_not_be_compared(gate, capsys):
    looks = {"a": [[1.1], [1.1]], "b": ("base", "TypeError: no residual"), "c": [[1.0]]}
    found, sides = decided(gate, looks)
    gate.report(found, sides, 5.0)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "slower  1.100x  1000.0 us -> 1100.0 us  A",
        "not by base: B: TypeError: no residual",
        "hhhhhhhh against bbbbbbbb: 1 of 2 benchmarks slower by more than 5%; "
        "ratios 1.000 to 1.100, median 1.050",
    ]


@pytest.mark.parametrize(("looks", "status"), [
    ({"a": [[1.0]]}, 0),
    ({"a": [[1.1], [1.1]]}, 1),
    ({"a": [[0.8], [0.8]]}, 0),
    ({"a": [[1.0]], "b": ("base", "TypeError: no residual")}, 0),
    ({"a": [[1.0]], "b": ("head", "TypeError: no residual")}, 1),
])  # fmt: skip
def test_exit_status(looks, status, gate, monkeypatch, tmp_path):
    sides = Sides(gate, looks)
    sides.find = lambda pattern: {name: name for name in looks}
    monkeypatch.setattr(gate, "Sides", lambda base, head: sides)
    answer = tmp_path / "answer.json"
    assert gate.main(["main", "--json", str(answer)]) == status
    assert set(json.loads(answer.read_text())["benchmarks"]) == set(looks)


def test_a_build_that_fails_is_no_slow_down(gate, monkeypatch, capsys):
    def fails(base, head):
        raise asv.util.ProcessError(["pip", "wheel"], 1, "", "no such backend")

    monkeypatch.setattr(gate, "Sides", fails)
    assert gate.main(["main"]) == 2
    assert "gate: Command 'pip wheel' returned non-zero exit status 1" in capsys.readouterr().err


def test_two_versions_of_which_one_lacks_an_operation(tmp_path):
    package = Path(numbabn.__file__).parent
    for side in ("base", "head"):
        shutil.copytree(package, tmp_path / side, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "head" / "__init__.py").open("a") as file:
        file.write("\ndel batch_stats\n")
    names = [("times.Small.time_call", 0), ("times.NC.time_call", 4)]  # inference, statistics
    request = {
        "suite": str(BENCHMARKS / "suite"),
        "sides": {side: str(tmp_path / side) for side in ("base", "head")},
        "benchmarks": names,
        "round": 0,
    }

    def answers(seconds):
        file = tmp_path / "request.json"
        file.write_text(json.dumps(request | {"seconds": seconds}))
        command = [sys.executable, BENCHMARKS / "side_by_side.py", file]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    assert answers(None) == []
    assert list(tmp_path.rglob("base/**/*.nbi"))
    inference, statistics = answers(0.05)
    assert inference["ratio"] > 0
    message = "AttributeError: module 'head' has no attribute 'batch_stats'"
    assert statistics == {"side": "head", "error": message}


def test_a_ratio_is_the_median_over_turns(turns, monkeypatch):
    now = 0.0

    def lasting(seconds):
        def call():
            nonlocal now
            now += next(seconds)

        return call

    def disturbed(seconds):  # each tenth call takes thrice as long
        while True:
            yield from [seconds] * 9 + [3 * seconds]

    monkeypatch.setattr(turns, "perf_counter", lambda: now)
    base, head = (lasting(disturbed(seconds)) for seconds in (1e-3, 1.1e-3))
    found = turns.compare(base, head, 0.5, random.Random(0))
    assert found == pytest.approx({"ratio": 1.1, "base": 1e-3, "head": 1.1e-3})


def test_a_version_is_loaded_under_a_name_of_its_own(turns):
    other = turns.load("another_numbabn", Path(numbabn.__file__).parent)
    assert other is not numbabn
    assert other.functional.__name__ == "another_numbabn.functional"
    assert other.batch_norm_forward is not numbabn.batch_norm_forward


def test_the_installed_package_is_compared_not_the_working_trees(gate, tmp_path):
    (tmp_path / "numbabn").mkdir()
    (tmp_path / "numbabn" / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, *gate.WHERE], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True
    )
    assert Path(done.stdout.strip()) == Path(numbabn.__file__).parent


@pytest.mark.skipif(not (BENCHMARKS.parent / ".git").exists(), reason="no repository")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's, if a test before imported it
def test_an_unknown_commit(gate, capsys, monkeypatch):
    monkeypatch.chdir(BENCHMARKS)
    assert gate.main(["no-such-commit"]) == 2
    message = "gate: BASE: expected a commit, a branch or a tag, got 'no-such-commit'"
    assert capsys.readouterr().err.strip() == message


def test_kernels_of_the_experiment_are_there(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = {
        each.__name__
        for view in (planes, rows)
        for each in vars(view).values()
        if isinstance(each, compilation.Kernel)
    }
    assert set(script("gate_experiment").KERNELS) == names


def test_a_planted_commit_imports_and_slows_its_kernel_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    planted = script("planted")
    source = Path(compilation.__file__).read_text() + planted.PLANTED.format(
        kernel="forward_planes", slower=0.5
    )
    now = 0.0
    module = ModuleType("numbabn.cpu.planted")
    module.__package__ = "numbabn.cpu"
    module.__file__ = compilation.__file__
    exec(compile(source, "planted.py", "exec"), vars(module))

    def tick():
        nonlocal now
        now += 1
        return now

    def spent(name):
        function = FunctionType((lambda: None).__code__, {}, name)
        before = now
        module.Kernel(function)(None)
        return now - before

    monkeypatch.setattr(module, "_call", lambda self, plan: [tick() for _ in range(8)])
    monkeypatch.setattr(module.time, "perf_counter", tick)
    assert spent("forward_rows") == 10
    assert spent("forward_planes") > 13
