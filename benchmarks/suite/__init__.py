"""What airspeed velocity measures of a commit: one file for each kind of figure.

Suites, data, limits and oracle are those of ``numbabn bench``, and what reads machine code is the
tests', both from the working tree, whichever commit is installed: a change in them is not taken for
one in a kernel. Their folders are packages under another name than the one measured, and without
what those run at import.

Each commit compiles into a folder of its own: numba's cache knows a kernel by its file alone, not
by the files that it calls.
"""

import os
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

if {"ASV_ENV_DIR", "ASV_COMMIT"} <= os.environ.keys():
    _compiled = Path(os.environ["ASV_ENV_DIR"], "compiled", os.environ["ASV_COMMIT"])
    os.environ["NUMBA_CACHE_DIR"] = str(_compiled)
