"""What airspeed velocity measures of a commit: one file for each kind of figure.

Suites, data, limits and oracle are those of ``numbabn bench``, and what reads machine code is the
tests', both from the working tree, whichever commit is installed: a change in them is not taken for
one in a kernel. Their folders are packages under another name than the one measured, and without
what those run at import.

Each commit compiles into a folder of its own, and so does each state of what is installed in an
environment that is not asv's: compilation is measured, and starts from nothing.
"""

import os
import sys
from importlib.util import find_spec
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

if {"ASV_ENV_DIR", "ASV_COMMIT"} <= os.environ.keys():
    COMPILED = Path(os.environ["ASV_ENV_DIR"], "compiled", os.environ["ASV_COMMIT"])
else:
    (_installed,) = find_spec("numbabn").submodule_search_locations
    _changed = max(path.stat().st_mtime_ns for path in Path(_installed).rglob("*.py"))
    COMPILED = ROOT / ".asv" / "compiled" / str(_changed)
os.environ["NUMBA_CACHE_DIR"] = str(COMPILED)
