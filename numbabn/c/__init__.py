"""numbabn as a C library: a table of functions for C, C++, ctypes and whatever calls addresses.

`include/numbabn.h` declares the functions and says how to get the table. In Python the table is a
`Table`, and the arguments of a call are a `StatisticsCall`, `InferenceCall`, `ForwardCall` or
`BackwardCall`, which ctypes understands. See docs/c.md.
"""

import ctypes
import os
import threading
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .. import cpu
from ..cpu import schedule
from ..threads import bindings, threads_for_c
from . import entries
from .structs import (
    ABI,
    CALLS,
    FUNCTIONS,
    MESSAGES,
    BackwardCall,
    ForwardCall,
    InferenceCall,
    Kernels,
    StatisticsCall,
    Status,
    Table,
)

__all__ = [
    "BackwardCall",
    "ForwardCall",
    "InferenceCall",
    "StatisticsCall",
    "Status",
    "Table",
    "capsule",
    "get_include",
    "table",
]

NAME = b"numbabn.c.table"  # of the capsule
# Of our own: what `ctypes.pythonapi` has is everyone's, and others say otherwise what it takes.
_new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
_lock = threading.RLock()  # for handlers of signals, too
_kernels: dict[str, Kernels] = {}


def get_include() -> str:
    """Give the folder that holds ``numbabn.h``.

    Examples
    --------
    >>> from pathlib import Path
    >>> import numbabn.c
    >>> [path.name for path in Path(numbabn.c.get_include()).iterdir()]
    ['numbabn.h']
    """
    return str(Path(__file__).parent / "include")


@cache
def _messages() -> Any:
    return (ctypes.c_char_p * len(MESSAGES))(*(MESSAGES[status].encode() for status in Status))


@cache
def _table(dtype: str) -> Table:
    """Make the one table for a dtype, without functions yet."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    kernels = _kernels[dtype] = Kernels(itemsize=kind.itemsize, type_number=kind.num, threads=1)
    kernels.caches[:] = schedule.cache_bytes(2), schedule.cache_bytes(3)
    return Table(
        abi=ABI,
        size=ctypes.sizeof(Table),
        dtype=dtype.encode(),
        itemsize=kind.itemsize,
        threads=1,
        kernels=ctypes.addressof(kernels),
        messages=_messages(),
        message_count=len(MESSAGES),
    )


def table(dtype: str, operations: str | None = None, *, parallel: bool = False) -> Table:
    """Compile operations for a dtype, and give the table of their functions.

    Parameters
    ----------
    dtype : {"float32", "float64", "float16", "bfloat16"}
        Of the data.
    operations : str, optional
        Names separated by spaces, of ``statistics``, ``inference``, ``forward`` and ``backward``;
        None means all.
    parallel : bool
        Whether calls may run over Numba's threads, as many as they ask for. Where Numba has but its
        workqueue, which two threads may not enter at once, or in a process forked from one whose
        threads had started, they run on the calling thread all the same.

    Returns
    -------
    Table
        One for each dtype, which lives until the interpreter ends: what is asked for later is
        added, and functions that have not been are NULL. Each takes ``table.kernels`` and a call,
        and returns a `Status`; ctypes releases the GIL meanwhile.

    Raises
    ------
    ValueError
        If there is no such dtype or operation.

    Examples
    --------
    >>> import ctypes
    >>> import numpy as np
    >>> from numbabn import c
    >>> x, mean, m2 = np.array([[1.0, 10.0], [3.0, 30.0]]), np.empty(2), np.empty(2)
    >>> shape = np.array(x.shape)
    >>> table = c.table("float64", "statistics")
    >>> call = c.StatisticsCall(mean=mean.ctypes.data, m2=m2.ctypes.data)
    >>> call.batch.shape, call.batch.ndim, call.batch.axis = shape.ctypes.data, 2, 1
    >>> call.x.data = x.ctypes.data
    >>> c.Status(table.statistics(table.kernels, call)).name, mean, m2
    ('OK', array([ 2., 20.]), array([  2., 200.]))
    """
    if not (isinstance(dtype, str) and dtype in cpu.DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(cpu.DTYPES)}, got {dtype!r}")
    names = list(CALLS) if operations is None else str(operations).split()
    if not names or not set(names) <= set(CALLS):
        raise ValueError(f"operations: expected some of {', '.join(CALLS)}, got {operations!r}")
    # Compile ahead of the lock: a thread that has numba's own, as it compiles a function that asks
    # for a table, may be waiting for this one.
    functions = {name: FUNCTIONS[name](getattr(entries, name).address) for name in names}
    addresses = {name: list(getattr(_kernels.get(dtype, Kernels()), name)) for name in names}
    for name, known in addresses.items():
        for k, variant in enumerate(cpu.variants([name], [dtype])):
            if (parallel or not variant.parallel) and not known[k]:
                known[k] = cpu.address(variant)
    threads = (*bindings(), threads_for_c()) if parallel else None
    with _lock:
        found = _table(dtype)
        kernels = _kernels[dtype]
        for name in names:
            for k, address in enumerate(addresses[name]):
                getattr(kernels, name)[k] |= address
            setattr(found, name, functions[name])
        if threads:
            kernels.told_threads, kernels.set_threads, kernels.threads = threads
            found.threads = kernels.threads
    return found


def capsule(abi: int, dtype: str, operations: str | None = None, parallel: bool = False) -> Any:
    """Give `table` as a PyCapsule; ``numbabn_import`` of ``numbabn.h`` calls this.

    Parameters
    ----------
    abi : int
        The edition of the header that the caller was compiled with.
    dtype, operations, parallel
        As of `table`.

    Raises
    ------
    ImportError
        If this is a library of another edition.
    ValueError
        As of `table`.

    Examples
    --------
    >>> from numbabn import c
    >>> type(c.capsule(1, "float64", "statistics")).__name__
    'PyCapsule'
    """
    if abi != ABI:
        raise ImportError(f"numbabn.h: expected edition {ABI}, got {abi!r}: compile anew with it")
    address = ctypes.addressof(table(dtype, operations, parallel=parallel))
    return _new_capsule(address, NAME, None)


def _after_fork() -> None:
    """Keep to the calling thread: Numba's others are not there."""
    global _lock
    _lock = threading.RLock()
    for dtype, kernels in _kernels.items():
        kernels.threads = _table(dtype).threads = 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
