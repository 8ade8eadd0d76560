"""``.ci/run`` tests what is committed, and leaves no trace; its commands are stand-ins here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GIT = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]

pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("git"), reason="needs a shell and git"
)

# Makes an environment whose commands tell where they run; `pytest` fails if it is told to.
PYTHON3 = """#!/bin/sh
mkdir -p .venv/bin
for name in pip ruff mypy; do
    printf '#!/bin/sh\\necho "%s $* in $PWD"\\n' $name > .venv/bin/$name
done
printf '#!/bin/sh\\ncat state\\necho 2 passed\\nexit ${PYTEST_FAILS-0}\\n' > .venv/bin/pytest
chmod +x .venv/bin/*
"""


@pytest.fixture
def copy(tmp_path):
    """Give a repository with the script, the README and an environment of somebody's."""
    copy = tmp_path / "copy"
    (copy / ".ci").mkdir(parents=True)
    for name in ".ci/run", "README.md", ".gitignore":
        shutil.copy(ROOT / name, copy / name)
    (copy / "state").write_text("committed\n")
    for command in ["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "All"]:
        subprocess.run([*GIT, *command], cwd=copy, check=True)
    (copy / ".venv").mkdir()
    (copy / ".venv/mine").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").write_text(PYTHON3)
    (tmp_path / "bin/python3").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    return copy


def run_ci(copy, **environment):
    path = f"{copy.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [copy / ".ci/run"],
        env=os.environ | {"PATH": path, "TMPDIR": str(copy.parent / "temporary")} | environment,
        capture_output=True,
        text=True,
    )
    assert os.listdir(copy.parent / "temporary") == []
    assert (copy / ".venv/mine").exists()
    return done


def test_runs_in_a_clone_that_is_gone_afterwards(copy):
    done = run_ci(copy)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert last == "2 passed"
    told = [line for line in lines if " in " in line]
    assert [line.split()[0] for line in told] == ["pip", "ruff", "ruff", "mypy", "pip"]
    assert all(f" in {copy.parent / 'temporary'}" in line for line in told)


def test_says_that_it_tests_what_is_committed(copy):
    (copy / "state").write_text("changed\n")
    done = run_ci(copy)
    assert (done.returncode, done.stderr) == (0, "Not tested: what is not committed.\n")
    assert "committed" in done.stdout
    assert "changed" not in done.stdout


def test_fails_as_the_tests_do(copy):
    assert run_ci(copy, PYTEST_FAILS="1").returncode == 1
