"""What commits are measured by: the suites, data, limits and oracle of ``numbabn bench``.

They are those of the working tree, whichever commit is installed, so that a change in them is not
taken for one in a kernel: its folders are packages under another name than the one measured, and
without what those run at import. So is what the tests read machine code with.
"""

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]

for _name, _folder in (
    ("yardstick", "numbabn"),
    ("yardstick.cli", "numbabn/cli"),
    ("yardstick.cli.bench", "numbabn/cli/bench"),
    ("yardstick.tests", "tests"),
):
    _package = ModuleType(_name)
    _package.__path__ = [str(ROOT / _folder)]
    sys.modules[_name] = _package

from yardstick.cli.bench.arrays import Arrays, make  # noqa: E402
from yardstick.cli.bench.calls import call_of as bench_call_of  # noqa: E402
from yardstick.cli.bench.cases import DTYPES, Case  # noqa: E402
from yardstick.cli.bench.devices import find as find_device  # noqa: E402
from yardstick.cli.bench.devices.cpu import CPU  # noqa: E402
from yardstick.cli.bench.measurement import Budget, Result, measure  # noqa: E402
from yardstick.cli.bench.oracle import expected  # noqa: E402
from yardstick.cli.bench.peers import numpy_peer  # noqa: E402
from yardstick.cli.bench.sampling import Sampler, Timing  # noqa: E402
from yardstick.cli.bench.suites import BATCH, SUITES, parse_shape  # noqa: E402
from yardstick.tests import sass  # noqa: E402

__all__ = [
    "BATCH", "CPU", "DTYPES", "ROOT", "SUITES", "Arrays", "Budget", "Case", "Result", "Sampler",
    "Timing", "bench_call_of", "expected", "find_device", "make", "measure", "numpy_peer",
    "parse_shape", "sass",
]  # fmt: skip
