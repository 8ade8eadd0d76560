"""The calls that are timed, of the installed numbabn or of another one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from yardstick.cli.bench.arrays import Arrays, make
from yardstick.cli.bench.calls import call_of as bench_call_of
from yardstick.cli.bench.cases import Case

import numbabn

# Raised by a commit that lacks an operation, an option or a dtype.
ABSENT = (AttributeError, TypeError, ValueError)
LIKE = {"statistics": "inference", "eval_backward": "backward"}  # whose arrays they take


def arrays_of(case: Case) -> Arrays:
    """Draw a case's data, and touch its result's pages."""
    return make(replace(case, op=LIKE.get(case.op, case.op)))


def call_of(case: Case, arrays: Arrays, library: Any = numbabn) -> Callable[[], Any]:
    """Return the call that is timed."""
    if case.op == "statistics":
        return lambda: library.batch_stats(arrays.x, axis=case.axis)
    if case.op == "eval_backward":
        given = arrays.other, arrays.x, arrays.weight, arrays.mean, arrays.invstd
        options = {"axis": case.axis, "training": False, "out": arrays.out}
        return lambda: library.batch_norm_backward(*given, **options)
    return bench_call_of(case, arrays, library)
