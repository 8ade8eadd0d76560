"""Train the demo's networks, and look at them on the way with population statistics."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import population_stats
from . import network
from .command import CommandError
from .digits import Digits, Images, Labels
from .network import Bias, Network, Normalization, Shift, Stopwatch, cross_entropy

MODELS = {"mlp": network.mlp, "conv": network.conv}
PERCENTILES = (15, 50, 85)
GOAL = 0.9  # the test accuracy whose first step is reported
LOOKS = 100  # evaluations on the way
POPULATION_BATCHES = 20  # training batches behind each population statistic
TEST_BATCH = 1000  # bounds the memory of a forward pass over the test set
PERCENTILE_IMAGES = 1000  # test images behind the percentiles: all would take as long as the pass

# Random streams of one seed: what is drawn from one leaves the others as they are.
SPLIT, WEIGHTS, BATCHES, POPULATION = range(4)


@dataclass(frozen=True)
class Settings:
    """What the two trainings have in common."""

    model: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def rng(self, stream: int) -> np.random.Generator:
        """Start one of the seed's random streams."""
        return np.random.default_rng([self.seed, stream])


@dataclass
class History:
    """What was seen of one network: an entry per look, the first before any training."""

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)  # of the test set
    # Of each input of the last sigmoid, over test images: [3, units].
    percentiles: list[npt.NDArray[np.float64]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # an entry per step
    seconds: float = 0.0
    numbabn_seconds: float = 0.0

    def steps_to(self, goal: float) -> int | None:
        """Return the first step seen with a test accuracy of `goal` or more."""
        pairs = zip(self.steps, self.accuracy, strict=True)
        return next((step for step, accuracy in pairs if accuracy >= goal), None)

    def unit_percentiles(self, unit: int) -> npt.NDArray[np.float64]:
        """Return the percentiles of one unit's input: [3, looks]."""
        return np.stack(self.percentiles, axis=-1)[:, unit]


def typical_unit(history: History) -> int:
    """Choose the last sigmoid's unit whose median input wanders neither much nor little."""
    medians = np.array(history.percentiles)[:, PERCENTILES.index(50)]  # [looks, units]
    wandering = np.ptp(medians, axis=0)
    return int(np.argsort(wandering)[len(wandering) // 2])


def build(settings: Settings, digits: Digits, clock: Stopwatch | None) -> Network:
    """Build the network, normalizing where there is a clock to time it; the weights are the same.

    The initial weights are drawn from a stream of their own and normalization takes the place of
    the biases, so that both networks start from the same ones.
    """
    shift: Shift = Bias if clock is None else lambda features: Normalization(features, clock)
    rng = settings.rng(WEIGHTS)
    return MODELS[settings.model](digits.height, digits.width, digits.classes, shift, rng)


def batches(digits: Digits, size: int, rng: np.random.Generator) -> Iterator[tuple[Images, Labels]]:
    """Go through the training set in ever new orders, without end, a batch at a time."""
    while True:
        order = rng.permutation(len(digits.train_images))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield digits.train_images[chosen], digits.train_labels[chosen]


@np.errstate(all="ignore")  # what overflows is told in one line
def train(
    settings: Settings, digits: Digits, *, normalize: bool, on_step: Callable[[], None]
) -> History:
    """Train from the start by plain stochastic gradient descent."""
    history, clock = History(), Stopwatch()
    network = build(settings, digits, clock if normalize else None)
    stream = batches(digits, settings.batch_size, settings.rng(BATCHES))
    population = batches(digits, settings.batch_size, settings.rng(POPULATION))
    every = max(1, settings.steps // LOOKS)
    start = time.perf_counter()
    for step in range(settings.steps + 1):
        if step % every == 0 or step == settings.steps:
            sample = [images for images, _ in islice(population, POPULATION_BATCHES)]
            accuracy, percentiles = look(inference_twin(network, sample), digits)
            _check_finite(percentiles, step)
            history.steps.append(step)
            history.accuracy.append(accuracy)
            history.percentiles.append(percentiles)
        if step < settings.steps:
            loss = _descend(network, *next(stream), settings.learning_rate)
            _check_finite(loss, step)
            history.losses.append(loss)
            on_step()
    history.seconds = time.perf_counter() - start
    history.numbabn_seconds = clock.seconds
    return history


def _descend(network: Network, images: Images, labels: Labels, learning_rate: float) -> float:
    loss, gradient = cross_entropy(network.forward(images), labels)
    network.backward(gradient)
    for parameter, slope in network.parameters():
        parameter -= learning_rate * slope
    return loss


def _check_finite(values: npt.ArrayLike, step: int) -> None:
    if not np.isfinite(values).all():
        raise CommandError(f"overflow at step {step}: try a smaller --learning-rate", code=1)


def inference_twin(network: Network, sample: list[Images]) -> Network:
    """Copy the network and let the copy normalize by population statistics: Algorithm 2.

    With the parameters frozen, a `sample` of training batches runs through the copy in training
    mode. What comes before each normalization then gives it its running statistics.
    """
    clocks = [layer.clock for layer in network.layers if isinstance(layer, Normalization)]
    twin = copy.deepcopy(network, {id(clock): clock for clock in clocks})
    inputs: dict[Normalization, list[Any]] = {}
    for x in sample if clocks else ():
        for layer in twin.layers:
            if isinstance(layer, Normalization):
                inputs.setdefault(layer, []).append(x)
            x = layer.forward(x)
    for layer, seen in inputs.items():
        with layer.clock:
            stats = population_stats(seen, axis=1, method="paper")
        state = layer.norm.state_dict() | {"running_mean": stats.mean, "running_var": stats.var}
        layer.norm.load_state_dict(state)
        layer.norm.eval()
    return twin


def look(network: Network, digits: Digits) -> tuple[float, npt.NDArray[np.float64]]:
    """Return the test accuracy, and the percentiles of each input of the last sigmoid."""
    inputs, right = [], 0
    thin = -(-len(digits.test_images) // PERCENTILE_IMAGES)
    for start in range(0, len(digits.test_images), TEST_BATCH):
        batch = slice(start, start + TEST_BATCH)
        x: Any = digits.test_images[batch]
        for i, layer in enumerate(network.layers):
            if i == network.last_sigmoid:
                inputs.append(np.moveaxis(x[::thin], 1, -1).reshape(-1, x.shape[1]))
            x = layer.forward(x)
        right += int((x.argmax(axis=1) == digits.test_labels[batch]).sum())
    percentiles = np.percentile(np.concatenate(inputs), PERCENTILES, axis=0)
    return right / len(digits.test_images), np.asarray(percentiles, np.float64)
