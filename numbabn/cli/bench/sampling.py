"""How one thing is timed: samples of a millisecond or more, by the median of the undisturbed."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # Windows: no sample counts as disturbed there

    def _preemptions() -> int:
        return 0

else:

    def _preemptions() -> int:
        """How often the system took a core from a thread of this process."""
        return getrusage(RUSAGE_SELF).ru_nivcsw


SAMPLE = 1e-3  # seconds of a sample at least, by as many calls as that takes
TURN = 5e-2  # seconds, about, that one process works before the next has its turn
SAMPLES_PER_TURN = 20
LEAST = 5  # samples that a median can be relied on for

Call = Callable[[], object]


class Sample(NamedTuple):
    """Seconds of one call, and whether another program took a core meanwhile."""

    seconds: float
    disturbed: bool


def time_calls(call: Call, calls: int) -> float:
    """Return the seconds that `calls` calls in a row take."""
    start = perf_counter()
    for _ in range(calls):
        call()
    return perf_counter() - start


class Sampler:
    """Takes samples of one call.

    Attributes
    ----------
    calls : int
        Calls per sample.
    per_turn : int
        Samples that make up a turn.
    samples : list of Sample
    """

    def __init__(self, call: Call) -> None:
        self.samples: list[Sample] = []
        self._call = call
        call()  # compiles, loads, touches
        self.calls = 1
        while (spent := min(time_calls(call, self.calls) for _ in range(2))) < SAMPLE:
            self.calls *= max(2, math.ceil(min(SAMPLE / max(spent, 1e-9), 10)))
        self.per_turn = max(1, min(SAMPLES_PER_TURN, round(TURN / spent)))

    def sample(self) -> Sample:
        """Take one sample, behind one call that finds the caches as the last subject left them."""
        self._call()
        before = _preemptions()
        seconds = time_calls(self._call, self.calls) / self.calls
        self.samples.append(Sample(seconds, _preemptions() > before))
        return self.samples[-1]

    @property
    def undisturbed(self) -> int:
        """How many samples are."""
        return sum(not sample.disturbed for sample in self.samples)


@dataclass(frozen=True)
class Timing:
    """Quantiles of the seconds of one call.

    Attributes
    ----------
    samples, disturbed : int
        How many there were, and how many of them were disturbed. These are left out, unless all
        were.
    """

    samples: int
    disturbed: int
    least: float
    lower_quartile: float
    median: float
    upper_quartile: float
    most: float

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> "Timing":
        """Summarize samples."""
        samples = list(samples)
        kept = [sample.seconds for sample in samples if not sample.disturbed]
        if not kept:
            kept = [sample.seconds for sample in samples]
        quartiles = quantiles(kept, method="inclusive") if len(kept) > 1 else kept * 3
        return cls(
            samples=len(samples),
            disturbed=sum(sample.disturbed for sample in samples),
            least=min(kept),
            lower_quartile=quartiles[0],
            median=median(kept),
            upper_quartile=quartiles[2],
            most=max(kept),
        )

    @property
    def left_out(self) -> int:
        """How many samples were left out."""
        return self.disturbed if self.disturbed < self.samples else 0

    @property
    def noisy(self) -> bool:
        """Whether disturbances left too few samples to rely on, or none."""
        return self.disturbed > 0 and self.samples - self.disturbed < LEAST

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a fraction of the median."""
        return (self.upper_quartile - self.lower_quartile) / 2 / self.median
