"""No access out of bounds, no race, no barrier that some threads miss, where a tool can tell."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import on_device
import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
FOLDERS = [os.environ.get("PATH", ""), "/usr/local/cuda/bin", "/opt/cuda/bin"]
# What it says where it cannot work.
REFUSALS = (
    "Device not supported",
    "Unable to find injection library",
    "not supported on this system",
)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_clean(tool):
    on_device.Torch()
    command = shutil.which("compute-sanitizer", path=os.pathsep.join(FOLDERS))
    if command is None:
        pytest.skip("compute-sanitizer is not installed")
    done = subprocess.run(
        [
            command, "--tool", tool, "--error-exitcode", "66",
            sys.executable, Path(__file__).with_name("sanitized.py"),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    told = done.stdout + done.stderr
    for refusal in REFUSALS:
        if refusal in told:
            pytest.skip(f"compute-sanitizer: {refusal}")
    assert done.returncode == 0, told[-6000:]
    assert "done" in done.stdout
