"""A training loop that numba compiles, batch norm included.

A network of one hidden layer learns to tell handwritten digits: all its steps, forward and
backward, are one compiled function, which calls numbabn's functions under their own names. A second
function normalizes many recordings in the caller's own parallel loop. Needs
``pip install ".[sklearn]"``, for the digits.
"""

from time import perf_counter

import numpy as np
from numba import njit, prange
from sklearn.datasets import load_digits

import numbabn


@njit
def train(x, labels, w1, weight, bias, running_mean, running_var, w2, rate, batch):
    """One pass over the data: linear, batch norm and ReLU, linear, softmax."""
    loss = 0.0
    for start in range(0, len(x) - batch + 1, batch):
        a = x[start : start + batch]
        z = a @ w1
        h, mean, invstd, mask = numbabn.batch_norm_forward(
            z, weight, bias, running_mean, running_var, activation="relu"
        )
        scores = h @ w2
        for i in range(batch):
            scores[i] -= scores[i].max()
            scores[i] = np.exp(scores[i])
            scores[i] /= scores[i].sum()
            right = labels[start + i]
            loss -= np.log(scores[i, right])
            scores[i, right] -= 1
        scores /= batch
        dh = scores @ w2.T
        dz, dweight, dbias, _ = numbabn.batch_norm_backward(dh, z, weight, mean, invstd, mask=mask)
        w2 -= rate * (h.T @ scores)
        w1 -= rate * (a.T @ dz)
        weight -= rate * dweight
        bias -= rate * dbias
    return loss / len(x)


@njit(parallel=True)
def standardize(recordings, running_mean, running_var):
    """Normalize each recording in place; the loop's threads are all the threads there are."""
    for i in prange(len(recordings)):
        numbabn.batch_norm_inference(recordings[i], running_mean, running_var, out=recordings[i])


def main() -> None:
    """Train, and check against the same steps outside of compiled code."""
    x, labels = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    x, labels = x[order], labels[order]
    w1 = rng.normal(0, 0.1, (64, 96)).astype(np.float32)
    w2 = rng.normal(0, 0.1, (96, 10)).astype(np.float32)
    weight, bias = np.ones(96, np.float32), np.zeros(96, np.float32)
    running = np.zeros(96, np.float32), np.ones(96, np.float32)
    parameters = w1, weight, bias, *running, w2

    start = perf_counter()
    for epoch in range(12):
        loss = train(x[:1500], labels[:1500], *parameters, np.float32(0.5), 50)
        if epoch == 0:
            print(f"compiled, and one pass made, in {perf_counter() - start:.1f} s")
            start = perf_counter()
    print(f"11 more passes in {perf_counter() - start:.2f} s, loss {loss:.3f}")
    h = numbabn.batch_norm_inference(x[1500:] @ w1, *running, weight, bias, activation="relu")
    right = ((h @ w2).argmax(1) == labels[1500:]).mean()
    print(f"{right:.1%} of {len(x) - 1500} test digits right")
    assert right > 0.93

    recordings = rng.normal(3, 2, (64, 16, 96, 500)).astype(np.float32)
    mean, var = np.full(96, 3, np.float32), np.full(96, 4, np.float32)
    wanted = np.stack([numbabn.batch_norm_inference(each, mean, var) for each in recordings])
    standardize(recordings, mean, var)
    assert (recordings == wanted).all()
    print(f"{recordings.nbytes >> 20} MiB normalized in a parallel loop, the same bits as outside")


if __name__ == "__main__":
    main()
