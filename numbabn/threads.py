"""Threads: how many a call takes, and how it keeps out of the way of others, of loops and of forks.

Numba's threads do the work, through OpenMP, TBB or a queue of its own, "workqueue". That one aborts
the process where two threads enter it at once, or one from within a loop; OpenMP gives every thread
that calls a team of its own, and aborts a child forked after use.
"""

import ctypes
import inspect
import operator
import os
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import _GeneratorContextManager, suppress
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import numba
from numba.core.compiler_lock import global_compiler_lock
from numba.core.entrypoints import init_all
from numba.np.ufunc import parallel

PARALLEL_BYTES = 1 << 17  # below this, entering a parallel region costs more than it saves


class Team(NamedTuple):
    """How many threads work on a call, and how many numba would take."""

    threads: int
    most: int


_team = cache(Team)
ALONE = Team(1, 1)  # of calls too short to be counted

_bounds: ContextVar[frozenset[tuple[object, int]] | None] = ContextVar(
    "numbabn.threads", default=None
)
_running: set[int] = set()  # the caller's threads that are within a call
_turn = threading.RLock()  # a signal's handler may come before it is given back, and call, too
_forked = False


class _Bound(_GeneratorContextManager[None]):
    def __call__(self, func: Any) -> Any:
        """Decorate a function, which must have done its work when it returns."""
        is_async = inspect.iscoroutinefunction(func) or inspect.isasyncgenfunction(func)
        if is_async or inspect.isgeneratorfunction(func):
            raise TypeError(
                "threads: expected a function that is neither async nor a generator, got "
                f"{func!r}, whose body runs after it has returned: "
                "use `with numbabn.threads(...)` within it"
            )
        return super().__call__(func)


def threads(limit: int) -> _Bound:
    """Bound how many threads a call takes, in a ``with`` statement or as a decorator.

    Holds for calls of the thread, or asyncio task, that enters it. Other bounds hold beside it:
    those around it, ``numba.set_num_threads``, and an equal share where several threads call at
    once. Results have the same bits whatever the number. Each ``with`` takes a bound of its own. A
    decorated function is a plain one: within what is async, or a generator, write ``with``; a
    generator binds its caller, too, where it yields within.

    Parameters
    ----------
    limit : int
        At least 1, at most ``NUMBA_NUM_THREADS``, which is the number of cores unless the
        environment variable of that name says otherwise. With 1 none of numba's is ever started.

    Raises
    ------
    TypeError, ValueError
        If it is no such number, or the decorated function is async or a generator.

    Examples
    --------
    >>> import numpy as np, numbabn
    >>> x = np.ones((32, 64, 28, 28), np.float32)
    >>> with numbabn.threads(1):
    ...     y = numbabn.batch_norm(x, training=True)
    """
    most: int = numba.config.NUMBA_NUM_THREADS
    try:
        limit = operator.index(limit)
    except TypeError:
        kind = type(limit).__name__
        raise TypeError(f"limit: expected a whole number of threads, got {kind}") from None
    if not 1 <= limit <= most:
        raise ValueError(f"limit: expected 1 to {most} (NUMBA_NUM_THREADS), got {limit}")
    return _Bound(_bounded, (limit,), {})


def _bounded(limit: int) -> Generator[None, None, None]:
    bound = object(), limit
    try:
        _bounds.set((_bounds.get() or frozenset()) | {bound})
        yield
    finally:
        # Not what was there before: generators may end in the order in which they began.
        _bounds.set(((_bounds.get() or frozenset()) - {bound}) or None)


def team_for(nbytes: int) -> Team:
    """Choose how many threads move so many bytes."""
    if nbytes < PARALLEL_BYTES or _forked:
        return ALONE
    bounds = _bounds.get()
    bound = min(limit for _, limit in bounds) if bounds else None
    if bound == 1:
        return _team(1, 1)
    layer = _layer()
    count = most = layer.threads()
    if _running or bound:
        share = numba.config.NUMBA_NUM_THREADS // (len(_running) + 1)
        count = min(most, share, bound or most)
    return _team(count, most) if count > 1 and not layer.within_a_loop() else _team(1, 1)


def threads_for_c() -> int:
    """Give how many of numba's threads a call from C may use.

    `run` does not count such calls: they do not share the threads out. It does not let them take
    turns either, so that it is one where numba's threads may not be entered twice at once.
    """
    layer = _layer()
    return 1 if _forked or layer.one_at_a_time else layer.threads()


def bindings() -> tuple[int, int]:
    """Give the addresses of C functions that tell, and set, how many threads the caller may use."""
    layer = _layer()
    functions: tuple[Any, Any] = layer.threads, layer.bind
    told, given = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)
    return told, given


def run(team: Team, function: Callable[..., Any], *args: Any) -> None:
    """Call a kernel, and count it as long as it runs."""
    caller = threading.get_ident()
    # Ctrl-C is seen after calls alone, of which the first in each `finally` is not Python's, so
    # that it is made in any case, and may find nothing to undo.
    try:
        _running.add(caller)
        if team.threads == 1:
            function(*args)
        else:
            _run_in_parallel(team, function, args)
    finally:
        _running.discard(caller)


def _run_in_parallel(team: Team, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    layer = _layer()
    try:
        if team.threads < team.most:
            layer.bind(team.threads)
        if layer.one_at_a_time:
            with _turn:
                function(*args)
        else:
            function(*args)
    finally:
        if team.threads < team.most:
            layer.bind(team.most)


class _Layer(NamedTuple):
    """What numba's threads work through."""

    one_at_a_time: bool
    threads: Callable[[], int]  # how many the calling thread may use
    bind: Callable[[int], None]  # sets that
    within_a_loop: Callable[[], Any]  # whether it is at work for a parallel loop already


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Work where no signal is seen: Ctrl-C leaves numba unable to compile, load or start again.

    The caller is interrupted all the same, and the work done in the background.
    """
    # Another thread would wait for ever: for a lock of this one's, or the interpreter that ends.
    if global_compiler_lock.is_locked() or sys.is_finalizing():
        return work(*args)
    # Numba imports what extends it as it first compiles. That must not be in the other thread: who
    # calls while such a module is being imported has the lock of its import.
    init_all()
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(work(*args))
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=run).start()
    except RuntimeError:  # the interpreter ends, and starts no more
        run()
    return outcome.result()


def _start() -> None:
    with global_compiler_lock:
        numba.get_num_threads()


@cache
def _layer() -> _Layer:
    """Start numba's threads."""
    apart(_start)
    # Numba's public functions take locks first, to see whether the threads have started.
    functions = parallel._get_num_threads, parallel._set_num_threads
    name = numba.threading_layer()
    if name == "omp":
        return _Layer(False, *functions, _omp_in_parallel())
    if name == "workqueue":
        return _Layer(True, *functions, _is_foreign)
    return _Layer(False, *functions, bool)  # TBB's loops share its threads, wherever they begin


def _is_foreign() -> bool:
    """Whether Python has not started the calling thread, as those that loops of numba's run on."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def _omp_in_parallel() -> Callable[[], int]:
    """Find OpenMP's own function, in the library that numba uses."""
    import numba.np.ufunc.omppool as omppool

    try:
        found: Callable[[], int] = ctypes.PyDLL(omppool.__file__).omp_in_parallel
    except AttributeError:  # Windows looks for it in numba's own file alone
        return int
    return found


def _after_fork() -> None:
    """Keep to serial kernels if the parent's threads had started: they are not there any more."""
    global _forked, _running, _turn
    _running, _turn = set(), threading.RLock()
    with suppress(ValueError):  # raised where no layer has started
        numba.threading_layer()
        _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
    # A child forked while another thread compiles or starts threads would wait for their locks for
    # ever.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )
