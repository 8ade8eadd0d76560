"""Batch normalization on NumPy arrays, without a framework."""

from . import overloads as overloads
from .fold import fold
from .functional import (
    ForwardResult,
    Gradients,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_norm_inference,
    batch_stats,
    update_running_stats,
)
from .layers import BatchNorm
from .population import population_stats
from .stats import BatchStats

__version__ = "0.1.0.dev0"

__all__ = [
    "BatchNorm",
    "BatchStats",
    "ForwardResult",
    "Gradients",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_norm_inference",
    "batch_stats",
    "fold",
    "population_stats",
    "update_running_stats",
]
