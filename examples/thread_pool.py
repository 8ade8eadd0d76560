"""A server: eight threads answer requests at once, sharing the cores or each bound to one of them.

A call by itself takes all cores, so that threads answer about as many requests a second as come of
one at a time, and the slowest of them wait longer. The answers have the same bits either way. ::

    python examples/thread_pool.py
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

import numbabn

CALLERS, ROUNDS, REQUESTS, LAYERS = 8, 10, 80, 4
SHAPE = (4, 64, 56, 56)

random = np.random.default_rng(0)
layers = [numbabn.BatchNorm(SHAPE[1]).eval() for _ in range(LAYERS)]
for layer in layers:
    layer.running_mean += random.standard_normal(SHAPE[1], dtype=np.float32) / 4
    layer.running_var += random.random(SHAPE[1], dtype=np.float32)
images = random.standard_normal((CALLERS, *SHAPE), dtype=np.float32)


def answer(x):
    """Run the network's layers; their parameters are read only, so that all threads may."""
    y = x
    for layer in layers:
        y = numbabn.batch_norm_inference(
            y, layer.running_mean, layer.running_var, layer.weight, layer.bias,
            residual=x, activation="relu",
        )  # fmt: skip
    return y


bounded = numbabn.threads(1)(answer)
WAYS = {
    "one at a time, on all cores": (1, answer),
    f"{CALLERS} threads, sharing cores": (CALLERS, answer),
    f"{CALLERS} threads, of a core each": (CALLERS, bounded),
}


def check(callers, answer, expected):
    """Hold that bits are the same, whoever else calls; compile, or load, the kernels."""
    with ThreadPoolExecutor(callers) as pool:
        for y, wanted in zip(pool.map(answer, images), expected, strict=True):
            assert (y == wanted).all()


def serve(callers, answer):
    """Answer requests; give the milliseconds that each took, and the seconds of all."""

    def request(number):
        begun = time.perf_counter()
        answer(images[number % CALLERS])
        return 1e3 * (time.perf_counter() - begun)

    with ThreadPoolExecutor(callers) as pool:
        begun = time.perf_counter()
        return list(pool.map(request, range(REQUESTS))), time.perf_counter() - begun


if __name__ == "__main__":
    cores = numba.config.NUMBA_NUM_THREADS
    print(f"{LAYERS} layers on {SHAPE}, {ROUNDS} rounds of {REQUESTS} requests, {cores} cores")
    expected = [answer(x) for x in images]
    for way in WAYS.values():
        check(*way, expected)

    times, seconds = {name: [] for name in WAYS}, dict.fromkeys(WAYS, 0.0)
    for _ in range(ROUNDS):  # in turns, so that all find the machine as busy
        for name, way in WAYS.items():
            took, whole = serve(*way)
            times[name] += took
            seconds[name] += whole
    for name in WAYS:
        median, slow = np.percentile(times[name], (50, 99))
        rate = ROUNDS * REQUESTS / seconds[name]
        print(f"{name:<30}{rate:5.0f} requests/s{median:7.1f} ms median{slow:7.1f} 99th percentile")
    # Nothing is left bound behind a call.
    assert numba.get_num_threads() == cores
