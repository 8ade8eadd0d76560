"""How long a call takes by what it takes one and the same commit, the reference.

Both are loaded into one process and called in turns, on the same arrays, as the gate does it: so a
step between two commits shows where times of different processes hide it.
"""

import contextlib
import random
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

from . import ROOT
from .grid import IMAGES, ROWS, Case, parse_shape
from .turns import compare, load

REFERENCE = "ba681168e90b0feb12236aa4d3fc8c245bcf3d9d"
NAME = "reference"
FOLDER = ROOT / ".asv" / NAME / REFERENCE
ROUNDS, SECONDS = 3, 0.12  # apart, for what disturbs one round seldom disturbs the next
CASES = [*(f"nchw {shape}" for shape in IMAGES), f"nhwc {IMAGES[0]}", f"nc {ROWS[0]}"]
COMPILED_FOR = (CASES[0], CASES[-1])  # these need all kernels: those of planes, those of rows

Ratios = dict[tuple[str, str], float]


class Reference:
    """The median ratio of neighbours: above 1 is slower than the reference."""

    param_names = ("op", "case")
    params = (
        ["backward", "forward", "inference", "statistics"],
        CASES,
    )
    unit = "of the reference's time"
    version = REFERENCE  # asv keeps no number beside those of another

    def setup_cache(self) -> Ratios:
        from .compilation import compile_kernels
        from .parallel import in_parallel

        able = compile_kernels()["seconds"]
        if not _load():
            return {}
        places = [each for each in product(*self.params) if each[0] in able]
        with _kernels_apart():
            in_parallel(_call_reference, [each for each in places if each[1] in COMPILED_FOR])
        rounds = [[_ratio(*each) for each in places] for _ in range(ROUNDS)]
        return {
            each: round(statistics.median(ratios), 4)
            for each, *ratios in zip(places, *rounds, strict=True)
        }

    def setup(self, ratios: Ratios, op: str, case: str) -> None:
        if (op, case) not in ratios:
            raise NotImplementedError

    def track_time(self, ratios: Ratios, op: str, case: str) -> float:
        return ratios[op, case]


def _load() -> bool:
    """Load the reference, whose sources are in the repository; False if this one lacks them."""
    if not FOLDER.exists():
        archive = FOLDER.with_suffix(".zip")
        archive.parent.mkdir(parents=True, exist_ok=True)
        command = ["git", "archive", "--output", str(archive), REFERENCE, "numbabn"]
        if subprocess.run(command, cwd=ROOT).returncode:
            return False
        partial = FOLDER.with_suffix(".partial")
        shutil.unpack_archive(archive, partial)
        partial.rename(FOLDER)
    load(NAME, FOLDER / "numbabn")
    return True


@contextlib.contextmanager
def _kernels_apart() -> Iterator[None]:
    """Have numba keep what it compiles beside the reference, for all commits."""
    from numba import config

    of_commit, config.CACHE_DIR = config.CACHE_DIR, str(FOLDER / "kernels")
    try:
        yield
    finally:
        config.CACHE_DIR = of_commit


def _calls(op: str, case: str) -> tuple[Any, Any]:
    """Give the reference's call and the commit's, on the same arrays."""
    from .calls import arrays_of, call_of

    layout, _, shape = case.partition(" ")
    of = Case(op, layout, "float32", parse_shape(shape))
    arrays = arrays_of(of)
    return call_of(of, arrays, sys.modules[NAME]), call_of(of, arrays)


def _call_reference(place: tuple[str, str]) -> None:
    """Compile what the reference needs for a case."""
    reference, _ = _calls(*place)
    reference()


def _ratio(op: str, case: str) -> float:
    reference, commit = _calls(op, case)
    with _kernels_apart():
        reference()
    commit()
    return compare(reference, commit, SECONDS, random.Random(case))["ratio"]
