"""Two calls, timed in turns: what else the machine does strikes both alike."""

import importlib.util
import math
import random
import statistics
import sys
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any

SAMPLE = 1e-3  # seconds at least, by as many calls as that takes


def load(name: str, folder: Path) -> ModuleType:
    """Import the package that lies in a folder under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def sample(call: Any, calls: int) -> float:
    """Time calls in a row; give the seconds of one."""
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls


def compare(base: Any, head: Any, seconds: float, rng: random.Random) -> dict[str, float]:
    """Sample two calls in turns, either first by chance.

    Returns
    -------
    dict
        `ratio`: the median, over all turns, of head's time by base's; `base`, `head`: medians of
        the seconds of a call.
    """
    for call in (base, head):
        call()
    calls = max(1, math.ceil(SAMPLE / max(sample(base, 1), 1e-9)))
    times: dict[Any, list[float]] = {base: [], head: []}
    end = perf_counter() + seconds
    while perf_counter() < end:
        order = [base, head]
        rng.shuffle(order)
        for call in order:
            times[call].append(sample(call, calls))
    ratios = [h / b for b, h in zip(times[base], times[head], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "base": statistics.median(times[base]),
        "head": statistics.median(times[head]),
    }
