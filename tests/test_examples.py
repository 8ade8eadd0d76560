"""Every example runs, prints no warning, and finds what it claims."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from programs import finish

EXAMPLES = Path(__file__).parents[1] / "examples"
every = pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)


@every
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


@every
def test_an_example_says_what_to_install(path):
    _, docstring, code = path.read_text().split('"""', 2)
    libraries = {*re.findall(r"^ *(?:import|from) (\w+)", code, re.MULTILINE)}
    if libraries - {*sys.stdlib_module_names, "numba", "numbabn", "numpy"}:
        assert re.search(r'``pip install "\.\[.*\]".*``', docstring)


def test_a_start_method_that_there_is_not():
    done = finish(EXAMPLES / "data_loader.py", "thread", PYTHONPATH=str(EXAMPLES.parent))
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: data_loader.py" in done.stderr
