"""These tests run where numba simulates a GPU: with NUMBA_ENABLE_CUDASIM=1 from the start."""

import os

if os.environ.get("NUMBA_ENABLE_CUDASIM") != "1":
    collect_ignore_glob = ["test_*.py"]
