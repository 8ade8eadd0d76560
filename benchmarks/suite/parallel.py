"""Work that is not timed, on all cores."""

import multiprocessing
import os
from collections.abc import Callable, Iterable
from typing import Any


def in_parallel(
    function: Callable[[Any], Any], items: Iterable[Any], *, fresh: bool = False
) -> list[Any]:
    """Map over processes that know what this one knows; each item in a new one, if `fresh`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    context = multiprocessing.get_context("fork")
    with context.Pool(cores, maxtasksperchild=1 if fresh else None) as pool:
        return pool.map(function, items, chunksize=1)
