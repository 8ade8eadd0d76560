"""Threads of the caller's beside numba's: how many a call takes, loops around it, and Ctrl-C.

What keeps a process alive is also taken away, to see that it is what does.
"""

import importlib
import signal
import sys

import numba
import pytest
from programs import CALL, LAYERS, environment_of, finish, run

import numbabn

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")

EIGHT = """
from concurrent.futures import ThreadPoolExecutor

begin = threading.Barrier(8)

def call(_):
    begin.wait()
    return all(right() for _ in range(20))

with ThreadPoolExecutor(8) as pool:
    print(all(pool.map(call, range(8))))
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_eight_threads_at_once(layer):
    output = run(CALL + EIGHT, NUMBA_NUM_THREADS="8", **environment_of(layer))
    assert output.split() == ["True"]


@posix
def test_workqueue_would_abort_if_two_threads_entered_it():
    without = """
import contextlib

threads._turn = contextlib.nullcontext()
"""
    done = finish(CALL + without + EIGHT, NUMBA_NUM_THREADS="8", **environment_of("workqueue"))
    assert done.returncode == -signal.SIGABRT
    assert "Concurrent access has been detected" in done.stderr


# What a call finds while others are held within calls of theirs.
SHARES = """
leave = threading.Event()
shares = []
for held in (0, 1, 2, 3, 7, 20):
    enter = threading.Barrier(held + 1)

    def hold():
        enter.wait()
        leave.wait()

    callers = [
        threading.Thread(target=threads.run, args=(threads.Team(1, 1), hold)) for _ in range(held)
    ]
    for caller in callers:
        caller.start()
    enter.wait()
    shares.append(threads.team_for(1 << 20).threads)
    leave.set()
    for caller in callers:
        caller.join()
    leave.clear()
print(*shares, threads.team_for(1 << 20).threads)
"""


def test_calls_at_once_share_the_threads():
    assert run(CALL + SHARES, NUMBA_NUM_THREADS="8").split() == ["8", "4", "2", "2", "1", "1", "8"]


# Eight threads at once, in calls on 52 MB: how many of numba's threads work on them together.
TOGETHER = """
from numbabn.cpu import compilation

class Nobody(set):
    def add(self, caller):
        pass

if sys.argv[1:] == ["without"]:
    threads._running = Nobody()
begin, at_work, most, real = threading.Barrier(8), {}, [0], threads.run
large = np.broadcast_to(np.float32(1), (100, 2, 1 << 16))

def noted(team, *args):
    at_work[threading.get_ident()] = team.threads
    most[0] = max(most[0], sum(at_work.copy().values()))
    real(team, *args)
    del at_work[threading.get_ident()]

def call():
    begin.wait()
    for _ in range(3):
        numbabn.batch_stats(large)

compilation.run = noted
numbabn.batch_stats(large)
with numbabn.threads(1):
    numbabn.batch_stats(large)
most[0] = 0
callers = [threading.Thread(target=call) for _ in range(8)]
for caller in callers:
    caller.start()
for caller in callers:
    caller.join()
print(most[0])
"""


def test_eight_threads_do_not_take_eight_times_all_cores():
    # One after the other they find 8, 4, 2, 2, 1, 1, 1 and 1 threads.
    assert int(run(CALL + TOGETHER, NUMBA_NUM_THREADS="8")) <= 24
    assert int(run(CALL + TOGETHER, "without", NUMBA_NUM_THREADS="8")) >= 40


LOOP = """
from numba import njit, objmode, prange
from numbabn.cpu import schedule

if sys.argv[1:] == ["without"]:
    layer = threads._layer()._replace(within_a_loop=bool)
    threads._layer = lambda: layer
takes, same = [], []

def noted(nbytes):
    team = threads.team_for(nbytes)
    takes.append(team.threads)
    return team

def call():
    same.append(right())

@njit(parallel=True)
def loop(n):
    for i in prange(n):
        with objmode():
            call()

schedule.team_for = noted
loop(8)
within = max(takes)
print(len(same), all(same), within, right(), takes[-1])
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_within_a_loop_a_call_takes_one_thread(layer):
    output = run(CALL + LOOP, NUMBA_NUM_THREADS="4", **environment_of(layer))
    assert output.split() == ["8", "True", "1", "True", "4"]


def test_tbb_runs_a_loop_within_a_loop():
    output = run(CALL + LOOP, NUMBA_NUM_THREADS="4", **environment_of("tbb"))
    assert output.split()[:2] == ["8", "True"]


@posix
def test_workqueue_would_abort_and_openmp_take_more_within_a_loop():
    done = finish(CALL + LOOP, "without", NUMBA_NUM_THREADS="4", **environment_of("workqueue"))
    assert done.returncode == -signal.SIGABRT
    output = run(CALL + LOOP, "without", NUMBA_NUM_THREADS="4", **environment_of("omp"))
    assert int(output.split()[2]) > 1


BOUNDS = """
import asyncio
from concurrent.futures import ThreadPoolExecutor

alone = threading.Lock()

def takes():
    found = []
    with alone:
        team = threads.team_for(1 << 20)
        threads.run(team, lambda: found.append(numba.get_num_threads()))
    return team.threads if team.threads == 1 or found == [team.threads] else found

def tell(name):
    print(name, takes(), numba.get_num_threads(), right())

tell("outside")
with numbabn.threads(3):
    tell("bound")
    with numbabn.threads(2):
        tell("bound twice")
    with numbabn.threads(4):
        tell("bound less")
    numba.set_num_threads(2)
    tell("bound by numba")
    numba.set_num_threads(4)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(tell, "another thread").result()
    try:
        with numbabn.threads(1):
            tell("one")
            raise KeyError
    except KeyError:
        tell("after an error")
tell("after")
numbabn.threads(2)(tell)("decorated")

async def task(limit):
    with numbabn.threads(limit):
        await asyncio.sleep(0.01)  # the others enter
        return takes(), await asyncio.to_thread(takes)

async def tasks():
    return await asyncio.gather(*(task(limit) for limit in (1, 2, 3)))

print(asyncio.run(tasks()))
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_bounds(layer):
    output = run(CALL + BOUNDS, NUMBA_NUM_THREADS="4", **environment_of(layer))
    assert output.splitlines() == [
        "outside 4 4 True",
        "bound 3 4 True",
        "bound twice 2 4 True",
        "bound less 3 4 True",
        "bound by numba 2 2 True",
        "another thread 4 4 True",
        "one 1 4 True",
        "after an error 3 4 True",
        "after 4 4 True",
        "decorated 2 4 True",
        "[(1, 1), (2, 2), (3, 3)]",
    ]


STARTED = """
import os, time
import numpy as np
import numbabn

with numbabn.threads({limit}):
    numbabn.batch_norm(np.ones((20, 2, 65, 67), np.float32), training=True)
time.sleep(0.2)  # what loaded the kernels ends
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_more_threads_are_started_than_the_bound_allows():
    environment = environment_of("omp")
    one, two, eight = (
        int(run(STARTED.format(limit=limit), NUMBA_NUM_THREADS="8", **environment))
        for limit in (1, 2, 8)
    )
    assert (two - one, eight - one) == (1, 7)


@pytest.mark.parametrize("limit", [0, -1, 1 << 20])
def test_a_bound_that_no_call_can_keep(limit):
    with pytest.raises(ValueError, match=rf"limit: expected 1 to \d+ .NUMBA_NUM_THR.*got {limit}"):
        numbabn.threads(limit)


@pytest.mark.parametrize("limit", [1.0, "2", None])
def test_a_bound_that_is_no_number_of_threads(limit):
    kind = type(limit).__name__
    with pytest.raises(TypeError, match=f"limit: expected a whole number of threads, got {kind}"):
        numbabn.threads(limit)


async def _coroutine(): ...


async def _async_generator():
    yield


def _generator():
    yield


@pytest.mark.parametrize("function", [_coroutine, _async_generator, _generator])
def test_a_bound_that_would_end_before_the_body_begins(function):
    got = f"got <function {function.__name__} .*: use `with numbabn.threads"
    with pytest.raises(
        TypeError, match=f"threads: expected .* neither async nor a generator, {got}"
    ):
        numbabn.threads(1)(function)


def test_generators_may_end_in_the_order_in_which_they_began():
    def bounded(limit):
        with numbabn.threads(limit):
            yield team()
            yield team()

    def team():
        return importlib.import_module("numbabn.threads").team_for(1 << 30).threads

    free = team()
    one, most = bounded(1), bounded(numba.config.NUMBA_NUM_THREADS)
    assert [next(one), next(most), next(one), next(most)] == [1] * 4
    assert list(one) == []
    assert team() == free
    assert list(most) == []
    assert team() == free


# A call that takes a second or more on a large array that takes no memory. A thread sends Ctrl-C
# while it runs, which it could not if the call did not let other threads go on. What a shell starts
# in the background ignores Ctrl-C unless it asks for it.
LONG = """
signal.signal(signal.SIGINT, signal.default_int_handler)
large = np.broadcast_to(x[:1], (1000000, *x.shape[1:]))
sent = []

def interrupt():
    while not threads._running:
        time.sleep(0.001)
    time.sleep(0.05)
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)

threading.Thread(target=interrupt, daemon=True).start()
"""
CAUGHT = """
try:
    with numbabn.threads(int(sys.argv[1])):
        numbabn.batch_stats(large)
except KeyboardInterrupt:
    ended = time.monotonic()
    print("interrupted", ended - sent[0] > 0.05)
print(len(threads._running), threads._turn._is_owned(), numba.get_num_threads(), right())
"""


@posix
@pytest.mark.parametrize(("layer", "limit"), [("omp", 1), *((layer, 2) for layer in LAYERS)])
def test_ctrl_c_during_a_long_call(layer, limit):
    code = CALL + LONG + CAUGHT
    output = run(code, str(limit), NUMBA_NUM_THREADS="2", **environment_of(layer))
    assert output.splitlines() == ["interrupted True", "0 False 2 True"]


@posix
def test_ctrl_c_ends_the_process_as_any_other():
    done = finish(CALL + LONG + "numbabn.batch_stats(large)", NUMBA_NUM_THREADS="2")
    assert done.returncode == -signal.SIGINT
    assert done.stderr.rstrip().endswith("KeyboardInterrupt")


# Interrupts at any moment of calls that are bound, so that all there is to undo is done. Python
# itself drops those that come while a result dies, as in any `__del__`.
OFTEN = """
from numbabn import results

def careless(team, function, *args):
    caller = threading.get_ident()
    threads._running.add(caller)
    numba.set_num_threads(team.threads)
    function(*args)
    numba.set_num_threads(team.most)
    threads._running.discard(caller)

if sys.argv[1:] == ["without"]:
    from numbabn.cpu import compilation
    compilation.run = careless
armed, left, interrupts = set(), set(), 0

def interrupt(*_):
    armed.clear()
    raise KeyboardInterrupt

def standing():
    pool = results._pool
    sizes = sum(block.nbytes for block in pool._blocks)
    return (
        len(threads._running), threads._turn._is_owned(), numba.get_num_threads(),
        threads._bounds.get(), len(pool._visits), pool.kept == sizes,
    )

signal.signal(signal.SIGALRM, interrupt)
for delay in np.random.default_rng(0).uniform(1e-4, 3e-3, 250):
    try:
        armed.add("armed")
        signal.setitimer(signal.ITIMER_REAL, delay)
        with numbabn.threads(2):
            while armed:
                numbabn.batch_norm(x, training=True)
    except KeyboardInterrupt:
        interrupts += 1
    left.add(standing())
print(interrupts > 200, *left, right())
"""


@posix
@pytest.mark.parametrize("layer", LAYERS)
def test_interrupts_at_any_moment_leave_nothing_behind(layer):
    output = run(CALL + OFTEN, NUMBA_NUM_THREADS="3", **environment_of(layer))
    assert output == "True (0, False, 3, None, 0, True) True\n"


@posix
def test_interrupts_would_leave_threads_bound_and_calls_counted():
    output = run(CALL + OFTEN, "without", NUMBA_NUM_THREADS="3")
    assert "(1, False, 2, " in output


# Ctrl-C during the first call, at a moment from which numba by itself does not recover.
FIRST = """
import os, signal, sys, threading
import numpy as np
import numbabn
from numbabn.cpu import compilation

signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.argv[1:] == ["without"]:
    compilation.apart = lambda work, *args: work(*args)
sent = []

def interrupt(frame, event, _):
    if event == "call" and frame.f_code.co_name == "stream_list" and not sent:
        sent.append(os.kill(os.getpid(), signal.SIGINT))

threading.setprofile(interrupt)
sys.setprofile(interrupt)
x = np.ones((20, 2, 65, 67), np.float32)
try:
    numbabn.batch_stats(x)
except KeyboardInterrupt:
    sys.setprofile(None)
    print("interrupted", (numbabn.batch_norm(x, training=True) == 0).all())
"""


@posix
def test_ctrl_c_during_the_first_call():
    assert run(FIRST).split() == ["interrupted", "True"]


@posix
def test_ctrl_c_as_numbas_threads_start():
    code = FIRST.replace("stream_list", "_launch_threads")
    assert run(code, NUMBA_NUM_THREADS="2").split() == ["interrupted", "True"]


@posix
def test_ctrl_c_while_functions_for_c_compile():
    code = FIRST.replace("import numbabn\n", "import numbabn\nfrom numbabn import c\n")
    code = code.replace("numbabn.batch_stats(x)", "c.table('float32', 'statistics')")
    assert run(code).split() == ["interrupted", "True"]


# A signal's handler runs when the call that it interrupts has ended, but still has its turn.
HANDLER = """
calls = []
large = np.broadcast_to(x[:1], (300000, *x.shape[1:]))
signal.signal(signal.SIGALRM, lambda *_: calls.append(right()))
signal.setitimer(signal.ITIMER_REAL, 0.1)
numbabn.batch_stats(large)
print(calls, threads._turn._is_owned(), right())
"""


@posix
@pytest.mark.parametrize("layer", LAYERS)
def test_a_signals_handler_may_call(layer):
    output = run(CALL + HANDLER, NUMBA_NUM_THREADS="4", **environment_of(layer))
    assert output == "[True] False True\n"


HANDLER_FOR_C = """
import signal
from numbabn import c

made = []
signal.signal(signal.SIGALRM, lambda *_: made.append(c.table("float64", "statistics")))
signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
while not made:
    c._lock.acquire()
    c._lock.release()
    c.table("float32", "statistics inference")
signal.setitimer(signal.ITIMER_REAL, 0)
print(bool(made[0].statistics))
"""


@posix
def test_a_signals_handler_may_ask_for_functions_for_c():
    assert run(HANDLER_FOR_C) == "True\n"


LATE = """
import threading, time
import numpy as np
import numbabn

def serve():
    threading.main_thread().join()
    time.sleep(0.1)
    print((numbabn.batch_norm(np.ones((300, 2)), training=True) == 0).all())

threading.Thread(target=serve).start()
"""


def test_a_first_call_after_the_main_thread_has_ended():
    assert run(LATE) == "True\n"


@posix
def test_ctrl_c_during_the_first_call_would_leave_numba_broken():
    done = finish(FIRST, "without")
    assert done.returncode == 1
    assert "generator raised StopIteration" in done.stderr
