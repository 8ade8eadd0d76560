"""Time two versions of numbabn in one process, on the same arrays, in turns.

Run by ``gate.py`` in an environment of airspeed velocity's. Two processes would differ by several
percent in where their arrays happen to lie in memory and caches, whatever is timed in them; here
both versions read and write the same bytes, with the same threads, within milliseconds of each
other.
"""

import contextlib
import gc
import importlib
import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def suite(name: str) -> ModuleType:
    """Import a module of the suite."""
    return importlib.import_module(f"suite.{name}")


def case_of(name: str, at: int) -> Any:
    """Give the case of a benchmark's parameters, by their place among all of its class."""
    module, class_name, _ = name.split(".")
    grid = getattr(suite(module), class_name)()
    return grid.cases()[at]


def compile_for(job: tuple[str, Any]) -> None:
    """Let one side do one case, so that numba keeps the kernel."""
    side, case = job
    calls = suite("calls")
    with contextlib.suppress(*calls.ABSENT):
        calls.call_of(case, calls.arrays_of(case), sys.modules[side])()


def compared(case: Any, sides: list[str], seconds: float, rng: random.Random) -> dict[str, Any]:
    """Compare both sides' calls of a case, or say which of them cannot make it, and why."""
    calls = suite("calls")
    arrays = calls.arrays_of(case)
    able = {}
    for side in sides:
        able[side] = calls.call_of(case, arrays, sys.modules[side])
        try:
            able[side]()
        except calls.ABSENT as error:
            return {"side": side, "error": f"{type(error).__name__}: {error}"}
    return suite("turns").compare(*able.values(), seconds, rng)


def main() -> None:
    """Do what a file of JSON asks for, and print JSON: one entry for each benchmark."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.path.insert(0, str(Path(request["suite"]).parent))
    turns = suite("turns")
    del os.environ["NUMBA_CACHE_DIR"]  # the kernels of each side are kept beside its sources
    sides = request["sides"]
    # Which is loaded first must not matter.
    for side in sorted(sides, reverse=request["round"] % 2):
        turns.load(side, Path(sides[side]))
    cases = [case_of(*each) for each in request["benchmarks"]]
    answers: list[Any] = []
    if request["seconds"] is None:
        # Of cases that differ in shape alone, one calls all kernels.
        apart = {
            (name, case.op, case.dtype): case
            for (name, _), case in zip(request["benchmarks"], cases, strict=True)
        }
        jobs = [(side, case) for case in apart.values() for side in sides]
        suite("parallel").in_parallel(compile_for, jobs)
    else:
        rng = random.Random(request["round"])
        gc.disable()
        for case in cases:
            answers.append(compared(case, list(sides), request["seconds"], rng))
            gc.collect()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
