"""Processes that begin after use, by fork, spawn and forkserver: they compute the same bits."""

import pytest
from programs import CALL, LAYERS, environment_of, finish, needs_fork, run

# A data loader: the parent has used its threads before workers start.
LOADER = """
import multiprocessing, sys, warnings
from concurrent.futures import ProcessPoolExecutor
import numba, numpy as np
import numbabn

warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads

def work(seed):
    x = np.random.default_rng(seed).standard_normal((20, 2, 65, 67), dtype=np.float32)
    y, mean, invstd, mask = numbabn.batch_norm_forward(x, activation="relu")
    gradients = numbabn.batch_norm_backward(x, x, None, mean, invstd, mask=mask)
    return [a.tobytes() for a in (y, mean, invstd, mask, *gradients) if a is not None]

if __name__ == "__main__":
    expected = [work(seed) for seed in range(4)]
    numba.threading_layer()  # raises if the parent has no threads
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(2) as pool:
        print(pool.map(work, range(4)) == expected)
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        print(list(pool.map(work, range(4))) == expected)
    print(work(0) == expected[0])
"""


@pytest.mark.parametrize(
    ("method", "layer"),
    [*(("fork", layer) for layer in LAYERS), ("spawn", "omp"), ("forkserver", "omp")],
)
def test_workers_compute_what_their_parent_does(method, layer, tmp_path):
    if method != "spawn" and needs_fork.args[0]:
        pytest.skip(needs_fork.kwargs["reason"])
    program = tmp_path / "loader.py"
    program.write_text(LOADER)
    output = run(program, method, NUMBA_NUM_THREADS="4", **environment_of(layer))
    assert output.split() == ["True"] * 3


# The child ends by itself: multiprocessing would hide one that died behind a hanging queue.
FORK = """
def fork(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


@needs_fork
@pytest.mark.parametrize("layer", LAYERS)
def test_a_child_forked_after_use_and_its_child(layer):
    code = """
print(fork(right), fork(lambda: right() and fork(right) == 0 and right()), right())
"""
    output = run(CALL + FORK + code, NUMBA_NUM_THREADS="4", **environment_of(layer))
    assert output.split() == ["0", "0", "True"]


@needs_fork
def test_openmp_would_abort_a_child_that_takes_threads():
    code = """
def without():
    threads._forked = False
    return right()

print(fork(without) == -signal.SIGTERM)
"""
    done = finish(CALL + FORK + code, NUMBA_NUM_THREADS="4", **environment_of("omp"))
    assert done.stdout.split() == ["True"]
    assert "fork() called from a process already using GNU OpenMP" in done.stderr


@needs_fork
@pytest.mark.parametrize("layer", LAYERS)
def test_children_forked_while_eight_threads_call(layer):
    code = """
stop, calls = threading.Event(), []

def call():
    while not stop.is_set():
        calls.append(right())

callers = [threading.Thread(target=call) for _ in range(8)]
for caller in callers:
    caller.start()
print([fork(right) for _ in range(5)] == [0] * 5)
stop.set()
for caller in callers:
    caller.join()
print(all(calls), len(calls) >= 8)
"""
    output = run(CALL + FORK + code, NUMBA_NUM_THREADS="4", **environment_of(layer))
    assert output.split()[-3:] == ["True"] * 3  # TBB says that it could not wait for its threads


@needs_fork
def test_a_child_forked_before_threads_start_has_threads_of_its_own():
    code = """
import os
import numba, numpy as np
import numbabn

x = np.random.default_rng(0).standard_normal((20, 2, 65, 67), dtype=np.float32)
with numbabn.threads(1):
    y = numbabn.batch_norm(x, training=True)

def right():
    same = (numbabn.batch_norm(x, training=True) == y).all()
    numba.threading_layer()  # raises if none has started
    return same
"""
    output = run("import signal" + code + FORK + "print(fork(right))", NUMBA_NUM_THREADS="4")
    assert output.split() == ["0"]


@needs_fork
def test_a_child_forked_after_use_of_numba_alone_computes():
    # What a fork needs is there from the import on, not from the first call.
    code = """
import os, signal, warnings
import numba, numpy as np
import numbabn

@numba.njit(parallel=True)
def fill(x):
    for i in numba.prange(len(x)):
        x[i] = i

warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads
fill(np.empty(2))

def work():
    return numbabn.batch_norm(np.ones((20, 2, 65, 67), np.float32), training=True).any() == 0
"""
    assert run(code + FORK + "print(fork(work))").split() == ["0"]


@needs_fork
def test_a_fork_waits_for_a_thread_that_makes_a_kernel():
    # Up to Python 3.11 `functools.cached_property` holds a lock meanwhile.
    code = """
import os, signal, threading, time, warnings
import numpy as np
import numbabn
from numbabn.cpu import compilation

warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads
making, compile_, x = threading.Event(), compilation._compile, np.ones((300, 2), np.float32)

def slowly(*args, **options):
    making.set()
    time.sleep(0.5)
    return compile_(*args, **options)

def work():
    return not numbabn.batch_norm(x, training=True).any()

def work_here():
    with compilation.global_compiler_lock:  # else a thread that may pass for the one that is gone
        return work()

compilation._compile = slowly
threading.Thread(target=work).start()
making.wait()
print(fork(work_here))
"""
    assert run(FORK + code).split() == ["0"]


@needs_fork
def test_a_fork_waits_for_a_thread_that_starts_numbas_threads():
    code = """
import signal
from numba.np.ufunc import parallel

starting, start = threading.Event(), parallel._set_init_process_lock

def slowly():
    starting.set()
    time.sleep(0.5)
    start()

with numbabn.threads(1):
    y = numbabn.batch_norm(x, training=True)
parallel._set_init_process_lock = slowly
threading.Thread(target=numbabn.batch_norm, args=(x,), kwargs={"training": True}).start()
starting.wait()
print(fork(lambda: (numbabn.batch_norm(x, training=True) == y).all()))
"""
    first = CALL[: CALL.index("_, mean")]  # before any call
    assert run(first + FORK + code, NUMBA_NUM_THREADS="4").split() == ["0"]


@needs_fork
def test_a_fork_waits_for_a_thread_that_compiles():
    code = """
from numba.core.compiler_lock import global_compiler_lock

compiling = threading.Event()

def compile_for_a_while():
    with global_compiler_lock:
        compiling.set()
        time.sleep(0.5)

def work():
    with global_compiler_lock:
        return right()

threading.Thread(target=compile_for_a_while).start()
compiling.wait()
print(fork(work))
"""
    assert run(CALL + FORK + code).split() == ["0"]
