"""The gate: what it makes of ratios, how they are taken, what it says of a wrong use."""

import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest

import numbabn

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytest.importorskip("asv")


def script(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gate():
    return script("gate")


@pytest.fixture(scope="module")
def side_by_side():
    return script("side_by_side")


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
        if isinstance(looks, str):
            return {"error": looks}
        ratio = looks[at][round_ % len(looks[at])]
        return {"ratio": ratio, "base": 1e-3, "head": 1e-3 * ratio}


def decided(gate, looks, threshold=5.0):
    sides = Sides(gate, looks)
    return gate.decide(sides, {name: name.upper() for name in looks}, threshold), sides


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
    looks = {"a": [[1.1], [1.1]], "b": "TypeError: unexpected 'residual'", "c": [[1.0]]}
    found, sides = decided(gate, looks)
    gate.report(found, sides, 5.0)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "slower  1.100x  1000.0 us -> 1100.0 us  A",
        "not compared: B: TypeError: unexpected 'residual'",
        "hhhhhhhh against bbbbbbbb: 1 of 2 benchmarks slower by more than 5%; "
        "ratios 1.000 to 1.100, median 1.050",
    ]


def test_a_ratio_is_the_median_over_turns(side_by_side, monkeypatch):
    now = 0.0

    def lasting(seconds):
        def call():
            nonlocal now
            now += next(seconds)

        return call

    def disturbed(seconds):  # each tenth call takes thrice as long
        while True:
            yield from [seconds] * 9 + [3 * seconds]

    monkeypatch.setattr(side_by_side, "perf_counter", lambda: now)
    base, head = (lasting(disturbed(seconds)) for seconds in (1e-3, 1.1e-3))
    found = side_by_side.compare(base, head, 0.5, random.Random(0))
    assert found == pytest.approx({"ratio": 1.1, "base": 1e-3, "head": 1.1e-3})


def test_a_version_is_loaded_under_a_name_of_its_own(side_by_side):
    other = side_by_side.load("another_numbabn", Path(numbabn.__file__).parent)
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
def test_an_unknown_commit(gate, capsys, monkeypatch):
    monkeypatch.chdir(BENCHMARKS)
    assert gate.main(["no-such-commit"]) == 2
    message = "gate: expected a commit, a branch or a tag, got 'no-such-commit'\n"
    assert capsys.readouterr().err == message
