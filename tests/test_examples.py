"""Every example runs, prints no warning, and finds what it claims."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_example(path, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
    )
    lacking = re.search(r"ModuleNotFoundError: No module named '(\w+)'", done.stderr)
    if lacking and lacking[1] != "numbabn":
        pytest.skip(f"{lacking[1]} is not installed")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip()
    assert not [*tmp_path.iterdir()]
