"""A data loader: worker processes standardise batches while the parent trains on them.

The parent has used numbabn's threads before the workers are forked, as happens in a notebook. They
compute on one thread each, and the same bits. ::

    python examples/data_loader.py [fork | spawn | forkserver]
"""

import argparse
import multiprocessing
import time
import warnings

import numba
import numpy as np

import numbabn

BATCHES, IMAGES, WORKERS = 24, 128, 2
SHAPE = (IMAGES, 3, 96, 96)


def read(number):
    """Stand for a file of images: bytes, whose channels differ in mean and contrast."""
    random = np.random.default_rng(number)
    noise = random.integers(0, 128, SHAPE, dtype=np.uint8)
    return noise + np.array([20, 60, 100], np.uint8).reshape(3, 1, 1)


def standardise(number, mean, var):
    """Give a batch with the whole data set's mean 0 and variance 1 in each channel."""
    return numbabn.batch_norm_inference(read(number).astype(np.float32), mean, var)


def bound():
    """Leave the cores to the other workers: one that was not forked would take all of them."""
    numba.set_num_threads(1)


def main(method):
    """Train a layer on batches from workers that begin by a method."""
    # In the parent, on all threads: the statistics of the data set, in one pass.
    population, took = numbabn.BatchStats(), 0.0
    for number in range(BATCHES):
        batch = read(number).astype(np.float32)
        begun = time.perf_counter()
        population += numbabn.batch_stats(batch)
        took += time.perf_counter() - begun
    mean, var = population.mean.astype(np.float32), population.var.astype(np.float32)
    print(f"Data set: {population.count / SHAPE[2] / SHAPE[3]:.0f} images, mean {mean.round(1)}")
    print(f"Statistics on {numba.get_num_threads()} threads: {took:.2f} s")

    layer, seen = numbabn.BatchNorm(3), numbabn.BatchStats()
    with warnings.catch_warnings():
        # From Python 3.12 on, of any fork beside threads; numbabn's part of it is safe.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pool = multiprocessing.get_context(method).Pool(WORKERS, bound)
    begun = time.perf_counter()
    with pool:
        tasks = [pool.apply_async(standardise, (number, mean, var)) for number in range(BATCHES)]
        for number, task in enumerate(tasks):
            x = task.get()
            seen += numbabn.batch_stats(x)
            y = layer(x)
            dx = layer.backward(y)  # of the loss sum(y**2) / 2
            layer.weight -= 1e-7 * layer.grad_weight
            layer.bias -= 1e-7 * layer.grad_bias
            if number % 8 == 0:  # every bit as the parent, on all its threads, has it
                assert x.tobytes() == standardise(number, mean, var).tobytes()
                assert np.isfinite(dx).all()
        pool.close()
        pool.join()
    print(f"{BATCHES} steps, batches by {WORKERS} workers ({method}): ", end="")
    print(f"{time.perf_counter() - begun:.2f} s")

    np.testing.assert_allclose(seen.mean, 0, atol=1e-5)
    np.testing.assert_allclose(seen.var, 1, rtol=1e-4)
    assert (layer.weight < 1).all()  # the loss wants smaller results
    print(f"Standardised: mean {np.abs(seen.mean).max():.1e} at most, variance {seen.var.round(4)}")


if __name__ == "__main__":
    methods = multiprocessing.get_all_start_methods()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = "fork" if "fork" in methods else "spawn"
    parser.add_argument("method", nargs="?", choices=methods, default=default)
    main(parser.parse_args().method)
