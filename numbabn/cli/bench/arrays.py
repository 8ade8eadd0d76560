"""The data of a case, the same in every process."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import DTYPES, TRAFFIC, Case

EPS = 1e-5
MOMENTUM = 0.1
PERIOD = 1_000_003  # prime, so that no row and no plane repeats within a channel


@dataclass
class Arrays:
    """What an operation reads and writes, its pages touched.

    `mean` and `invstd`, float64, are those of the distribution that x was drawn from, not x's own:
    the backward formulas hold for any. `other` is dy, the residual, or None.
    """

    x: Any
    other: Any
    out: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    mean: Any
    invstd: Any

    @property
    def sources(self) -> list[Any]:
        """The arrays of x's size that are read."""
        return [self.x] if self.other is None else [self.x, self.other]


def make(case: Case) -> Arrays:
    """Draw the data of a case; parameters are float32 beside a 16-bit x."""
    dtype = DTYPES[case.dtype]
    rng = np.random.default_rng(0)
    C = case.channels
    mean, std = rng.normal(0, 0.5, C), rng.uniform(0.5, 2, C)
    weight, bias = rng.uniform(0.5, 2, C), rng.normal(0, 1, C)
    narrow = np.dtype(np.float32) if dtype.itemsize == 2 else dtype
    x = _noise(rng, case, dtype)
    x *= case.per_channel(std.astype(dtype))
    x += case.per_channel(mean.astype(dtype))
    other = _noise(rng, case, dtype) if TRAFFIC[case.op].reads > 1 else None
    return Arrays(
        x=x,
        other=other,
        out=np.full_like(x, 0),
        weight=weight.astype(narrow),
        bias=bias.astype(narrow),
        running_mean=mean.astype(narrow),
        running_var=(std**2).astype(narrow),
        mean=mean,
        invstd=1 / np.sqrt(std**2 + EPS),
    )


def _noise(rng: np.random.Generator, case: Case, dtype: Any) -> Any:
    size = int(np.prod(case.shape))
    draws = rng.standard_normal(min(size, PERIOD)).astype(dtype)
    noise = np.empty(size, dtype)
    for start in range(0, size, PERIOD):
        noise[start : start + PERIOD] = draws[: size - start]
    return noise.reshape(case.array_shape)
