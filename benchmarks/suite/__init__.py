"""What airspeed velocity measures of a commit: one file for each kind of figure.

Each commit compiles into a folder of its own: numba's cache knows a kernel by its file alone, not
by the files that it calls.
"""

import os
from pathlib import Path

if {"ASV_ENV_DIR", "ASV_COMMIT"} <= os.environ.keys():
    _compiled = Path(os.environ["ASV_ENV_DIR"], "compiled", os.environ["ASV_COMMIT"])
    os.environ["NUMBA_CACHE_DIR"] = str(_compiled)
