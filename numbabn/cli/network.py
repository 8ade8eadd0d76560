"""The demo's networks: layers with forward and backward passes in plain NumPy.

A layer's `forward` keeps what its `backward` needs; `backward` takes the gradient of the loss by
the layer's output, returns the one by its input and stores those by the parameters.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import BatchNorm

Floats = npt.NDArray[np.floating[Any]]


class Stopwatch:
    """A context manager that adds up the seconds spent inside it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


class Layer:
    """A layer without parameters; the others add theirs."""

    def forward(self, x: Floats) -> Floats:
        """Return the layer's output."""
        raise NotImplementedError

    def backward(self, dy: Floats) -> Floats:
        """Return the gradient by the input, given the one by the output."""
        raise NotImplementedError

    def parameters(self) -> list[tuple[Floats, Floats]]:
        """Pair each parameter with its gradient by the last backward pass."""
        return []


class Flatten(Layer):
    """Make one row of each example."""

    def forward(self, x: Floats) -> Floats:
        """Turn ``[N, ...]`` into ``[N, M]``."""
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Floats) -> Floats:
        """Turn ``[N, M]`` back."""
        return dy.reshape(self.shape)


class Linear(Layer):
    """A matrix product: ``y = x @ weight``."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, std: float) -> None:
        self.weight: Floats = rng.normal(0, std, (inputs, outputs)).astype(np.float32)

    def forward(self, x: Floats) -> Floats:
        """``y = x @ weight``."""
        self.x = x
        y: Floats = x @ self.weight
        return y

    def backward(self, dy: Floats) -> Floats:
        """``dx = dy @ weight.T``."""
        self.grad_weight = self.x.T @ dy
        dx: Floats = dy @ self.weight.T
        return dx

    def parameters(self) -> list[tuple[Floats, Floats]]:
        """Return the weight and its gradient."""
        return [(self.weight, self.grad_weight)]


class Conv3x3(Layer):
    """A 3x3 convolution of stride 2 with one pixel of padding: it halves height and width."""

    def __init__(self, inputs: int, outputs: int, rng: np.random.Generator, std: float) -> None:
        self.weight: Floats = rng.normal(0, std, (outputs, inputs, 3, 3)).astype(np.float32)

    def forward(self, x: Floats) -> Floats:
        """``[N, C, H, W]`` to ``[N, K, H / 2, W / 2]``, both rounded up."""
        self.padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(self.padded, (3, 3), axis=(2, 3))
        windows = windows[:, :, ::2, ::2].transpose(0, 1, 4, 5, 2, 3)  # [N, C, 3, 3, H, W]
        n, _, _, _, h, w = windows.shape
        self.columns = windows.reshape(n, -1, h * w)
        y: Floats = self._matrix() @ self.columns
        return y.reshape(n, -1, h, w)

    def backward(self, dy: Floats) -> Floats:
        """Add each window's gradient to the pixels that the window covers."""
        n, outputs, h, w = dy.shape
        rows = dy.reshape(n, outputs, h * w)
        self.grad_weight = (rows @ self.columns.transpose(0, 2, 1)).sum(axis=0)
        self.grad_weight = self.grad_weight.reshape(self.weight.shape)
        windows = (self._matrix().T @ rows).reshape(n, -1, 3, 3, h, w)
        dx = np.zeros_like(self.padded)
        for i, j in np.ndindex(3, 3):
            dx[:, :, i : i + 2 * h : 2, j : j + 2 * w : 2] += windows[:, :, i, j]
        return dx[:, :, 1:-1, 1:-1]

    def parameters(self) -> list[tuple[Floats, Floats]]:
        """Return the weight and its gradient."""
        return [(self.weight, self.grad_weight)]

    def _matrix(self) -> Floats:
        return self.weight.reshape(len(self.weight), -1)


class Bias(Layer):
    """One number per channel, added: what batch normalization takes the place of."""

    def __init__(self, features: int) -> None:
        self.bias: Floats = np.zeros(features, np.float32)

    def forward(self, x: Floats) -> Floats:
        """``y = x + bias``."""
        return x + self.bias.reshape(-1, *[1] * (x.ndim - 2))

    def backward(self, dy: Floats) -> Floats:
        """``dx = dy``."""
        self.grad_bias: Floats = dy.sum(axis=(0, *range(2, dy.ndim)))
        return dy

    def parameters(self) -> list[tuple[Floats, Floats]]:
        """Return the bias and its gradient."""
        return [(self.bias, self.grad_bias)]


class Normalization(Layer):
    """`numbabn.BatchNorm` over axis 1, timed."""

    def __init__(self, features: int, clock: Stopwatch) -> None:
        self.norm: Any = BatchNorm(features)
        self.clock = clock

    def forward(self, x: Floats) -> Floats:
        """Normalize, by the batch in training mode."""
        with self.clock:
            y: Floats = self.norm(x)
        return y

    def backward(self, dy: Floats) -> Floats:
        """Go back through the batch's statistics too."""
        with self.clock:
            dx: Floats = self.norm.backward(dy)
        return dx

    def parameters(self) -> list[tuple[Floats, Floats]]:
        """Return weight and bias with their gradients."""
        return [
            (self.norm.weight, self.norm.grad_weight),
            (self.norm.bias, self.norm.grad_bias),
        ]


class Sigmoid(Layer):
    """``1 / (1 + exp(-x))``."""

    def forward(self, x: Floats) -> Floats:
        """``y = sigmoid(x)``, by tanh, which nothing can overflow."""
        y: Floats = np.tanh(x * 0.5) * 0.5 + 0.5
        self.y = y
        return y

    def backward(self, dy: Floats) -> Floats:
        """``dx = dy * y * (1 - y)``."""
        dx: Floats = dy * self.y * (1 - self.y)
        return dx


class Network:
    """Layers one after another, the last sigmoid's input being what the demo looks at."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers
        self.last_sigmoid = max(i for i, layer in enumerate(layers) if isinstance(layer, Sigmoid))

    def forward(self, x: Floats) -> Floats:
        """Return the logits of a batch."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy: Floats) -> None:
        """Store in the layers the gradients by their parameters."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)

    def parameters(self) -> Iterator[tuple[Floats, Floats]]:
        """Pair each parameter with its gradient."""
        for layer in self.layers:
            yield from layer.parameters()


def cross_entropy(logits: Floats, labels: npt.NDArray[np.intp]) -> tuple[float, Floats]:
    """Return the batch's mean loss and its gradient by the logits."""
    n = np.arange(len(labels))
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    gradient: Floats = np.exp(shifted - log_sum)
    gradient[n, labels] -= 1
    gradient /= len(labels)
    return float((log_sum[:, 0] - shifted[n, labels]).mean()), gradient


# Makes, for a number of channels, the layer that shifts them: a bias or a normalization.
Shift = Callable[[int], Layer]

# The paper says "small random Gaussian values"; this is 1 / sqrt(100), so that a sum over the
# hundred units of a hidden layer is of the order of one of them.
STD = 0.1


def mlp(height: int, width: int, classes: int, shift: Shift, rng: np.random.Generator) -> Network:
    """Three fully connected hidden layers of 100 sigmoid units: section 4.1 of the paper."""
    layers: list[Layer] = [Flatten()]
    inputs = height * width
    for _ in range(3):
        layers += [Linear(inputs, 100, rng, STD), shift(100), Sigmoid()]
        inputs = 100
    return Network([*layers, Linear(inputs, classes, rng, STD), Bias(classes)])


def conv(height: int, width: int, classes: int, shift: Shift, rng: np.random.Generator) -> Network:
    """Two convolutions of 16 and 32 channels with sigmoids, each halving the image."""
    layers: list[Layer] = []
    inputs = 1
    for channels in (16, 32):
        layers += [Conv3x3(inputs, channels, rng, STD), shift(channels), Sigmoid()]
        inputs, height, width = channels, -(-height // 2), -(-width // 2)
    head = [Flatten(), Linear(inputs * height * width, classes, rng, STD), Bias(classes)]
    return Network([*layers, *head])
