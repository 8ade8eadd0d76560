"""A server: eight threads answer requests at once, each within a bound on the cores it takes.

Without a bound a call shares the cores with those that run when it begins, and the first takes all
of them. With one, requests disturb each other less, whatever else the machine does. ::

    python examples/thread_pool.py
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

import numbabn

CALLERS, REQUESTS, LAYERS = 8, 400, 4
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


expected = [answer(x) for x in images]
bounded = numbabn.threads(1)(answer)
bounded(images[0])  # compiles, or loads, the kernels for one thread


def serve(name, answer):
    """Answer all requests, and tell how long each took."""

    def request(number):
        begun = time.perf_counter()
        y = answer(images[number % CALLERS])
        took = time.perf_counter() - begun
        assert (y == expected[number % CALLERS]).all()  # the same bits, on any number of threads
        return took * 1e3

    begun = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        times = list(pool.map(request, range(REQUESTS)))
    rate = REQUESTS / (time.perf_counter() - begun)
    median, slow = np.percentile(times, (50, 99))
    print(f"{name:<22}{median:6.1f} ms median{slow:8.1f} ms of 99%{rate:8.0f} requests/s")


if __name__ == "__main__":
    cores = numba.config.NUMBA_NUM_THREADS
    print(f"{CALLERS} threads on {cores} cores, {LAYERS} layers on {SHAPE}")
    serve("as many as are free", answer)
    serve("bound to one each", bounded)
    # Nothing is left bound behind a call.
    assert numba.get_num_threads() == cores
