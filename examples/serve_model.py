"""Serve a trained network in plain NumPy, its batch normalization by itself or folded away.

A convolutional network learns scikit-learn's digits with the demo's layers. Then it answers
requests, of one image and of 32, twice: with its normalizations in evaluation mode, and with each
folded into the convolution or linear layer before it by ``numbabn.fold``, which leaves a bias.
Needs ``pip install ".[demo]"``.
"""

import os

# Threads that spin for the next small kernel would take a core from NumPy.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import copy
from collections.abc import Callable
from itertools import islice
from time import perf_counter

import numpy as np
from threadpoolctl import threadpool_limits

import numbabn
from numbabn.cli.digits import Digits, load_digits
from numbabn.cli.network import (
    Bias,
    Conv3x3,
    Flatten,
    Linear,
    Network,
    Normalization,
    Sigmoid,
    Stopwatch,
    cross_entropy,
)
from numbabn.cli.training import batches

STEPS, BATCH, LEARNING_RATE = 300, 64, 0.5
REQUESTS = {1: 400, 32: 150}  # by images of a request


def trained(digits: Digits, rng: np.random.Generator) -> Network:
    """Train convolutions of 32 and 64 channels and a hidden layer of 256 units."""

    def normalized(features: int) -> list:
        return [Normalization(features, Stopwatch()), Sigmoid()]

    network = Network([
        Conv3x3(1, 32, rng, 0.3), *normalized(32),
        Conv3x3(32, 64, rng, 0.1), *normalized(64),
        Flatten(), Linear(64 * 2 * 2, 256, rng, 0.1), *normalized(256),
        Linear(256, 10, rng, 0.1), Bias(10),
    ])  # fmt: skip
    for images, labels in islice(batches(digits, BATCH, rng), STEPS):
        _, gradient = cross_entropy(network.forward(images), labels)
        network.backward(gradient)
        for parameter, slope in network.parameters():
            parameter -= LEARNING_RATE * slope
    return network


def served(network: Network) -> Network:
    """Copy the network and let the copy normalize by its running statistics."""
    network = copy.deepcopy(network)
    for layer in network.layers:
        if isinstance(layer, Normalization):
            layer.norm.eval()
    return network


def folded(network: Network) -> Network:
    """Copy the network without its normalizations: they go into the weights before them."""
    layers = copy.deepcopy(network.layers)
    for i, layer in enumerate(layers):
        if not isinstance(layer, Normalization):
            continue
        before, norm, bias = layers[i - 1], layer.norm, Bias(layer.norm.num_features)
        statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
        # `fold` takes output channels first, which the demo's linear layers have last.
        weight = before.weight if isinstance(before, Conv3x3) else before.weight.T
        weight, bias.bias = numbabn.fold(weight, None, *statistics, eps=norm.eps)
        before.weight = weight if isinstance(before, Conv3x3) else weight.T
        layers[i] = bias
    return Network(layers)


def latencies(
    servers: dict[str, Callable[[np.ndarray], np.ndarray]], images: np.ndarray, size: int
) -> dict[str, np.ndarray]:
    """Time each server on the same requests in turns: milliseconds."""
    rng = np.random.default_rng(1)
    times: dict[str, list[float]] = {name: [] for name in servers}
    names = [*servers]
    for k in range(REQUESTS[size] + 10):
        request = images[rng.choice(len(images), size)]
        answers = []
        for name in names if k % 2 else reversed(names):
            start = perf_counter()
            answers.append(servers[name](request))
            times[name].append(1e3 * (perf_counter() - start))
        assert (answers[0].argmax(axis=1) == answers[1].argmax(axis=1)).all()
    return {name: np.array(each[10:]) for name, each in times.items()}  # without the first ones


# The matrices are small: threads of BLAS would cost more than they save.
with threadpool_limits(1, user_api="blas"):
    rng = np.random.default_rng(0)
    digits = load_digits(rng)
    network = trained(digits, rng)
    unfolded_network, folded_network = served(network), folded(network)
    weights = sum(parameter.size for parameter, _ in network.parameters())

    logits = unfolded_network.forward(digits.test_images)
    folded_logits = folded_network.forward(digits.test_images)
    error = np.abs(folded_logits - logits).max()
    accuracy = (logits.argmax(axis=1) == digits.test_labels).mean()
    assert accuracy > 0.95, accuracy
    assert error < 1e-4, error
    assert (folded_logits.argmax(axis=1) == logits.argmax(axis=1)).all()
    print(f"{weights} parameters, {STEPS} steps: {accuracy:.1%} of {len(logits)} test digits right")
    print(f"Folded: the same digits, logits within {error:.1e} of up to {np.abs(logits).max():.0f}")

    servers = {"unfolded": unfolded_network.forward, "folded": folded_network.forward}
    print("milliseconds     p50    p99")
    for size in REQUESTS:
        for name, times in latencies(servers, digits.test_images, size).items():
            p50, p99 = np.percentile(times, [50, 99])
            print(f"  {size:2} {name:9} {p50:6.3f} {p99:6.3f}")
