"""Hold numbabn's layers against the float64 oracle on one real batch."""

import numpy as np

from .. import reference
from .digits import Images, Labels
from .network import Floats, Network, Normalization, cross_entropy

TOLERANCE = 1e-5  # of the largest value; float32 resolves 1.2e-7


def worst_errors(network: Network, images: Images, labels: Labels) -> dict[str, float]:
    """Run a batch forward and backward and compare what the normalizations made of it.

    Returns
    -------
    dict
        For the output and each gradient, the largest error that any layer made, as a fraction of
        the largest value that the oracle has there.
    """
    x, trace = images, []
    for layer in network.layers:
        y = layer.forward(x)
        trace.append((layer, x, y))
        x = y
    _, dy = cross_entropy(x, labels)
    worst = dict.fromkeys(("y", "dx", "dweight", "dbias"), 0.0)
    for layer, x, y in reversed(trace):
        dx = layer.backward(dy)
        if isinstance(layer, Normalization):
            norm = layer.norm
            ours = y, dx, norm.grad_weight, norm.grad_bias
            expected, mean, invstd = reference.forward(x, norm.weight, norm.bias)
            gradients = reference.backward(dy, x, norm.weight, mean, invstd)
            for name, a, b in zip(worst, ours, (expected, *gradients[:3]), strict=True):
                # Unlike max(), np.maximum lets NaN through.
                worst[name] = float(np.maximum(worst[name], _error(a, b)))
        dy = dx
    return worst


def _error(a: Floats, b: Floats) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())
