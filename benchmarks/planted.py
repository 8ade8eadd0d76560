"""Commits that slow a kernel down, planted in a clone, to see whether they are noticed."""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPILATION = "numbabn/cpu/compilation.py"
PLANTED = """

def _planted(self: Kernel, plan: Any, *args: Any) -> None:
    start = time.perf_counter()
    _call(self, plan, *args)
    end = time.perf_counter()
    if self.__name__ == "{kernel}":
        while time.perf_counter() < end + {slower} * (end - start):
            pass


import time  # noqa: E402

_call = Kernel.__call__
Kernel.__call__ = _planted
"""


class Clone:
    """A clone of this repository, made anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        command = ["git", "clone", "--quiet", "--branch", "main", str(ROOT), str(folder)]
        subprocess.run(command, check=True)

    def git(self, *args: str) -> None:
        who = ("-c", "user.name=planted", "-c", "user.email=planted@localhost")
        subprocess.run(["git", *who, *args], cwd=self.folder, check=True)

    def plant(self, kernel: str, slower: float) -> None:
        """Commit a slow-down of a kernel, by a fraction, on top of what is checked out."""
        path = self.folder / COMPILATION
        source = path.read_text(encoding="utf-8") + PLANTED.format(kernel=kernel, slower=slower)
        path.write_text(source, encoding="utf-8")
        self.git("commit", "--quiet", "--all", "--message", f"Let {kernel} take longer")
