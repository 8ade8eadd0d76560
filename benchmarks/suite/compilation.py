"""Kernels, compiled once for each commit, before anything is measured."""

import json
import shutil
from time import perf_counter
from typing import TypedDict

from yardstick.cli.bench.cases import Case

from . import COMPILED
from .calls import ABSENT, arrays_of, call_of
from .grid import NCHW, NHWC, Float16, Grid, Small
from .parallel import in_parallel

# Any call of an op compiles all that one of this op needs; add_relu is a forward, eval_backward a
# backward. The longest to compile first, so that no core waits for another.
OPS = ("backward", "forward", "inference", "statistics")


class Compiled(TypedDict):
    """What it took: seconds of the first call of each op on NCHW, and bytes of all kernels.

    Seconds are those of a process for each, as many at a time as there are cores; ops that the
    commit lacks are left out.
    """

    seconds: dict[str, float]
    nbytes: int


def compile_kernels() -> Compiled:
    """Compile what all cases call, as a first call does; tell what that took, then or before."""
    record = COMPILED / "compiled.json"
    if not record.exists():
        shutil.rmtree(COMPILED, ignore_errors=True)  # left by a run that was ended meanwhile
        COMPILED.mkdir(parents=True)
        first = _cases(NCHW)
        # Those that were compiled in the same process before would save some of the time.
        seconds = in_parallel(_first_call, first, fresh=True)
        in_parallel(_first_call, _cases(NHWC, Float16, Small))
        files = [path for path in COMPILED.rglob("*") if path.is_file()]
        compiled: Compiled = {
            "seconds": {
                case.op: each for case, each in zip(first, seconds, strict=True) if each is not None
            },
            "nbytes": sum(path.stat().st_size for path in files),
        }
        record.write_text(json.dumps(compiled), encoding="utf-8")
    return json.loads(record.read_text(encoding="utf-8"))


def _cases(*layouts: type[Grid]) -> list[Case]:
    """List one of each op, layout and dtype."""
    return [
        layout().case(op, layout.params[1][0], layout.params[2][0])
        for op in OPS
        for layout in layouts
        if op in layout.params[0]
    ]


def _first_call(case: Case) -> float | None:
    call = call_of(case, arrays_of(case))
    start = perf_counter()
    try:
        call()
    except ABSENT:
        return None
    return perf_counter() - start
