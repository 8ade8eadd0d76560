"""Kernels for one number per channel: they put together what blocks have summed of its pieces."""

import numpy as np

from .target import block, blocks, put, shared_sums, thread
from .vector import (
    Partials,
    about_mean,
    merged_moments,
    merged_products,
    save_moments,
    save_products,
)


def statistics_channels(parameters, settings, memory, shape):
    """Save the statistics of each channel, some of them at a time."""
    sums, side = shared_sums(), 1 << shape.beside
    for first in range(block() * side, shape.C, blocks() * side):
        c = first + (thread() & (side - 1))
        mean, m2 = merged_moments(memory, shape, Partials(c, c < shape.C, shape.beside), sums)
        if thread() < side and c < shape.C:
            save_moments(c, np.float64(shape.N * shape.S), mean, m2, parameters, settings)


def products_channels(x, gradients, memory, shape):
    """Save the gradients by weight and bias, and for dx what they are made of."""
    sums, side = shared_sums(), 1 << shape.beside
    for first in range(block() * side, shape.C, blocks() * side):
        c = first + (thread() & (side - 1))
        dy, dy_x = merged_products(memory, shape, Partials(c, c < shape.C, shape.beside), sums)
        if thread() < side and c < shape.C:
            dy_x = about_mean(x.at, c, dy, dy_x, gradients)
            put(memory.sums, c, dy)
            put(memory.sums, shape.C + c, dy_x)
            save_products(c, dy, dy_x, gradients)
