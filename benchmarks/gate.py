"""Fail if a commit made a kernel slower than another: ``python benchmarks/gate.py BASE [HEAD]``.

Airspeed velocity builds both commits, finds the benchmarks and sets them up; what is compared here
is the ratio of two calls made in turns in one process (``side_by_side.py``). All benchmarks are
compared in some rounds, each a process of its own. Those whose median ratio is near the threshold
or beyond are compared again, for longer and in more rounds, and what they show then decides.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from asv import environment, util
from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.console import log
from asv.repo import NoSuchNameError, Repo, get_repo

ROOT = Path(__file__).parents[1]
KEPT = Path(".asv", "gate")
PROGRAM = ROOT / "benchmarks" / "side_by_side.py"
BENCHMARKS = r"^times\."  # those whose classes are grids
THRESHOLD = 5.0  # %
SUSPECT = 0.6  # of the threshold
ROUNDS, SECONDS = 3, 0.1  # of all
MORE_ROUNDS, MORE_SECONDS = 5, 0.4  # of suspects
# Prints where the package is installed; isolated (-I), or it would be the working tree's.
WHERE = (
    "-I",
    "-c",
    "import importlib.util as u; print(*u.find_spec('numbabn').submodule_search_locations)",
)


Place = tuple[str, int]  # asv's name of a benchmark, and of its parameters the place among all


class GateError(Exception):
    """Something that the user can mend."""


class Sides:
    """Two commits' packages, and the environment of asv's in which both are run."""

    def __init__(self, base: str, head: str) -> None:
        self.conf = Config.load("asv.conf.json")
        self.conf.benchmark_dir = str(ROOT / self.conf.benchmark_dir)
        self.repo: Repo = get_repo(self.conf)
        self.repo.pull()
        self.commits = {"base": self._commit("BASE", base), "head": self._commit("HEAD", head)}
        (self.env, *_) = environment.get_environments(self.conf, None)
        self.env.create()
        self.folders = {side: self._installed(side) for side in self.commits}

    def _commit(self, argument: str, name: str) -> str:
        try:
            return str(self.repo.get_hash_from_name(name))
        except NoSuchNameError:
            raise GateError(
                f"{argument}: expected a commit, a branch or a tag, got {name!r}"
            ) from None

    def _installed(self, side: str) -> str:
        """Install a commit; keep the package by itself, as asv's environment has room for one.

        Either side has a copy: what numba compiles knows the name that its package had then.
        """
        commit = self.commits[side]
        folder = KEPT / side / commit
        if not folder.exists():
            self.env.install_project(self.conf, self.repo, commit)
            partial = folder.with_suffix(".partial")
            shutil.copytree(self.env.run([*WHERE]).strip(), partial, dirs_exist_ok=True)
            partial.rename(folder)
        return str(folder.resolve())

    def find(self, pattern: str) -> dict[str, Place]:
        """Find the benchmarks of kernels, by asv's names with parameters."""
        try:
            found = Benchmarks.discover(
                self.conf, self.repo, [self.env], [self.commits["head"]], regex=pattern
            )
        except re.error as error:
            raise GateError(
                f"--bench: expected a regular expression, got {pattern!r}: {error}"
            ) from None
        places = {
            f"{name}({', '.join(parameters)})": (name, at)
            for name, each in found.items()
            if name.startswith("times.")
            for at, parameters in enumerate(product(*each["params"]))
            if at in found.benchmark_selection[name]
        }
        if not places:
            raise GateError(f"--bench: expected a pattern of benchmarks in times, got {pattern!r}")
        return places

    def run(self, places: Iterable[Place], seconds: float | None, round_: int) -> list[Any]:
        """Compare benchmarks for some seconds each; compile what they call where None are given."""
        request = {
            "suite": self.conf.benchmark_dir,
            "sides": self.folders,
            "benchmarks": list(places),
            "seconds": seconds,
            "round": round_,
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump(request, file)
        try:
            text = self.env.run([str(PROGRAM), file.name], timeout=3600, dots=False)
        finally:
            os.unlink(file.name)
        answers: list[Any] = json.loads(text.splitlines()[-1])
        return answers


def decide(sides: Sides, places: dict[str, Place], threshold: float) -> dict[str, Any]:
    """Compare all, then the suspects again; return what was found of each, by name."""
    log.info(f"Compiling {len(places)} benchmarks' kernels for both commits")
    sides.run(places.values(), None, 0)
    found: dict[str, list[Any]] = {name: [] for name in places}

    def rounds(names: list[str], count: int, seconds: float, first: int) -> None:
        for at in range(first, first + count):
            log.info(f"Round {at + 1}: {len(names)} benchmarks, {seconds} s each")
            answers = sides.run([places[name] for name in names], seconds, at)
            for name, answer in zip(names, answers, strict=True):
                found[name].append(answer)

    rounds([*places], ROUNDS, SECONDS, 0)
    able = [name for name in places if not any("error" in each for each in found[name])]
    limit = 1 + threshold / 100
    suspects = [name for name in able if not within(ratio(found[name]), SUSPECT * threshold)]
    first = {name: found[name] for name in suspects}
    found.update({name: [] for name in suspects})
    if suspects:
        rounds(suspects, MORE_ROUNDS, MORE_SECONDS, ROUNDS)
    result = {}
    for name, answers in found.items():
        unable = next((each for each in answers if "error" in each), None)
        if unable is not None:
            result[name] = {"verdict": f"not by {unable['side']}", "error": unable["error"]}
            continue
        value = ratio(answers)
        verdict = "slower" if value > limit else "faster" if value < 1 / limit else "same"
        result[name] = {
            "verdict": verdict,
            "ratio": value,
            "ratios": [each["ratio"] for each in (*first.get(name, ()), *answers)],
            "base": statistics.median(each["base"] for each in answers),
            "head": statistics.median(each["head"] for each in answers),
        }
    return result


def ratio(answers: list[Any]) -> float:
    """Take the median over rounds."""
    return statistics.median(each["ratio"] for each in answers)


def within(value: float, percent: float) -> bool:
    """Whether a ratio is near 1, either way."""
    return 1 / (1 + percent / 100) <= value <= 1 + percent / 100


def report(result: dict[str, Any], sides: Sides, threshold: float) -> None:
    """Print what differs, and a line that sums up."""
    print()  # after asv's last step, which ends no line
    for word in ("slower", "faster"):
        for name, each in result.items():
            if each["verdict"] == word:
                print(
                    f"{word}  {each['ratio']:.3f}x  {1e6 * each['base']:.1f} us -> "
                    f"{1e6 * each['head']:.1f} us  {name}"
                )
    for name, each in result.items():
        if "error" in each:
            print(f"{each['verdict']}: {name}: {each['error']}")
    ratios = sorted(each["ratio"] for each in result.values() if "ratio" in each)
    slower = sum(each["verdict"] == "slower" for each in result.values())
    base, head = (commit[:8] for commit in sides.commits.values())
    if ratios:
        print(
            f"{head} against {base}: {slower} of {len(ratios)} benchmarks slower by more than "
            f"{threshold:g}%; ratios {ratios[0]:.3f} to {ratios[-1]:.3f}, "
            f"median {statistics.median(ratios):.3f}"
        )


def main(argv: list[str] | None = None) -> int:
    """Compare; return 1 if HEAD is slower or unable to do something, 2 if that cannot be told."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("base", metavar="BASE", help="the commit that is compared with")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD")
    parser.add_argument("--bench", default=BENCHMARKS, metavar="REGEX", help="only some benchmarks")
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, metavar="PERCENT",
        help="what counts as slower (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all ratios")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    log.enable()
    try:
        sides = Sides(args.base, args.head)
        result = decide(sides, sides.find(args.bench), args.threshold)
    except (GateError, util.UserError, util.ProcessError) as error:
        print(f"\ngate: {error}", file=sys.stderr)
        return 2
    report(result, sides, args.threshold)
    if args.json:
        document = {"commits": sides.commits, "threshold": args.threshold, "benchmarks": result}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return int(any(each["verdict"] in ("slower", "not by head") for each in result.values()))


if __name__ == "__main__":
    sys.exit(main())
