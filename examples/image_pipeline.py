"""Standardize photographs channel by channel, as a stream of batches that nobody holds as a whole.

Crops of two photographs come as uint8, 32 at a time, as a camera or a loader would bring them. A
first pass keeps running statistics, a second one takes those of the whole stream exactly, and a
third one standardizes in place. Both are held against the exact statistics, which bytes allow: from
how often each of the 256 values comes. Needs ``pip install ".[demo]"``.
"""

import os

# Threads that spin for the next kernel would take a core from what NumPy does in between.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import numpy as np
from sklearn.datasets import load_sample_images

import numbabn

BATCH, SIDE, BATCHES = 32, 224, 32
PHOTOGRAPHS = load_sample_images().images  # uint8 [427, 640, 3] each


def stream() -> Iterator[np.ndarray]:
    """Cut crops anywhere, the same ones in each pass: uint8 [32, 224, 224, 3] at a time."""
    rng = np.random.default_rng(0)
    for _ in range(BATCHES):
        batch = np.empty((BATCH, SIDE, SIDE, 3), np.uint8)
        for crop in batch:
            photograph = PHOTOGRAPHS[rng.integers(len(PHOTOGRAPHS))]
            top, left = (rng.integers(size - SIDE + 1) for size in photograph.shape[:2])
            crop[...] = photograph[top : top + SIDE, left : left + SIDE]
        yield batch


def exact() -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all values of each channel, in float64, from counts of integers."""
    counts = np.zeros((3, 256), np.int64)
    for batch in stream():
        for c in range(3):
            counts[c] += np.bincount(batch[..., c].ravel(), minlength=256)
    values = np.arange(256.0)
    total = counts.sum(axis=1)
    mean = counts @ values / total
    return mean, (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total


true_mean, true_var = exact()
true_std = np.sqrt(true_var)

# 1. Running statistics, in one pass: what a pipeline knows that has to start at once. Each batch
#    leaves 0.9 of what was there before: of the first values, 0 and 1, 3% stay to the end.
running_mean, running_var = np.zeros(3, np.float32), np.ones(3, np.float32)
x = np.empty((BATCH, SIDE, SIDE, 3), np.float32)
for batch in stream():
    x[...] = batch
    numbabn.batch_norm(x, running_mean, running_var, training=True, momentum=0.1, axis=-1, out=x)

# 2. Those of the whole stream, in another pass that holds one batch at a time.
population = numbabn.population_stats((b.astype(np.float32) for b in stream()), axis=-1)

print(f"{BATCH * BATCHES} crops, {population.count * 3 / 1e6:.0f} MB; red, green, blue")
for name, mean, std in (
    ("exact", true_mean, true_std),
    ("population_stats", population.mean, np.sqrt(population.var)),
    ("running statistics", running_mean, np.sqrt(running_var)),
):
    means, stds = (" ".join(f"{number:9.5f}" for number in each) for each in (mean, std))
    print(f"  {name:18}  mean {means}   std {stds}")
np.testing.assert_allclose(population.mean, true_mean, rtol=1e-13)
np.testing.assert_allclose(population.var, true_var, rtol=1e-13)
# Mostly of the last ten batches or so, of 32 crops each.
assert (np.abs(running_mean - true_mean) < 0.1 * true_std).all()
np.testing.assert_allclose(running_var, true_var, rtol=0.1)

# 3. Standardize, in place, and beside it what NumPy offers, on the same batches and in turns.
mean, var = population.mean.astype(np.float32), population.var.astype(np.float32)
std = np.sqrt(var)
# A line of pixels is 672 numbers without a gap, for which three constants repeat.
line_mean, line_std = np.tile(mean, SIDE), np.tile(std, SIDE)


def numbabn_in_place(x: np.ndarray) -> np.ndarray:
    """Read x once, write it once."""
    return numbabn.batch_norm_inference(x, mean, var, eps=0.0, axis=-1, out=x)


def numpy_as_written(x: np.ndarray) -> np.ndarray:
    """Take memory for each step."""
    return (x - mean) / std


def numpy_in_place(x: np.ndarray) -> np.ndarray:
    """Take none."""
    x -= mean
    x /= std
    return x


def numpy_by_lines(x: np.ndarray) -> np.ndarray:
    """NumPy's best: its loops want long runs."""
    lines = x.reshape(-1, SIDE * 3)
    lines -= line_mean
    lines /= line_std
    return x


WAYS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    numbabn_in_place, numpy_as_written, numpy_in_place, numpy_by_lines,
)  # fmt: skip
times: dict[str, list[float]] = {way.__name__: [] for way in WAYS}
conversion: list[float] = []
error = 0.0  # beside float64
left = numbabn.BatchStats()  # of what is standardized
for k, batch in enumerate(stream()):
    ideal = (batch[0].astype(np.float64) - true_mean) / true_std
    first = k % len(WAYS)
    for way in WAYS[first:] + WAYS[:first]:
        start = perf_counter()
        x[...] = batch  # uint8 to float32
        converted = perf_counter()
        y = way(x)
        times[way.__name__].append(perf_counter() - converted)
        conversion.append(converted - start)
        error = max(error, np.abs(y[0] - ideal).max())
        if way is numbabn_in_place:
            left += numbabn.batch_stats(y, axis=-1)
assert error < 1e-6
np.testing.assert_allclose(left.mean, 0, atol=1e-6)
np.testing.assert_allclose(left.var, 1, atol=1e-6)
print(f"Standardized, every way within {error:.1e} of float64; MB of float32 a second, medians:")
for name, seconds in times.items():
    print(f"  {name:18} {x.nbytes / median(seconds) / 1e6:7.0f}")
print(f"  uint8 to float32   {x.nbytes / median(conversion) / 1e6:7.0f}  before each of them")
