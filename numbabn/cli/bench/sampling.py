"""How one thing is timed: samples of many calls each, by the median of the undisturbed."""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from statistics import median, quantiles
from time import perf_counter
from typing import NamedTuple, Protocol

try:
    from resource import RUSAGE_SELF, getrusage
except ImportError:  # Windows: no sample counts as disturbed there

    def _preemptions() -> int:
        return 0

else:

    def _preemptions() -> int:
        """How often the system took a core from a thread of this process."""
        return getrusage(RUSAGE_SELF).ru_nivcsw


SAMPLE = 1e-3  # seconds of a sample on the CPU at least
TURN = 5e-2  # seconds, about, that one process works before the next has its turn
SAMPLES_PER_TURN = 20
LEAST = 5  # samples that a median can be relied on for

Call = Callable[[], object]


class Sample(NamedTuple):
    """Seconds of one call, and whether something else is in them."""

    seconds: float
    disturbed: bool


class Clock(Protocol):
    """How calls are timed on a device.

    Attributes
    ----------
    least : float
        Seconds of a sample at least, by as many calls as that takes.
    most : int
        Calls of a sample at most.
    """

    least: float
    most: int

    def time(self, call: Call, calls: int) -> Sample:
        """Time calls in a row; give the seconds of one."""


class WallClock:
    """Time on the CPU; a sample is disturbed if another program took a core meanwhile."""

    least = SAMPLE
    most = sys.maxsize

    def time(self, call: Call, calls: int) -> Sample:
        """Time calls in a row; give the seconds of one."""
        before = _preemptions()
        start = perf_counter()
        for _ in range(calls):
            call()
        seconds = (perf_counter() - start) / calls
        return Sample(seconds, _preemptions() > before)


def in_turn(calls: list[Call]) -> Call:
    """Make one call of several, which does the next of them each time, round and round."""
    if len(calls) == 1:
        return calls[0]
    following = cycle(calls).__next__
    return lambda: following()()


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

    def __init__(self, call: Call, clock: Clock) -> None:
        self.samples: list[Sample] = []
        self._call, self._clock = call, clock
        call()  # compiles, loads, touches
        self.calls = 1
        while (spent := self._spent()) < clock.least and self.calls < clock.most:
            times = max(2, math.ceil(min(clock.least / max(spent, 1e-9), 10)))
            self.calls = min(clock.most, self.calls * times)
        self.per_turn = max(1, min(SAMPLES_PER_TURN, round(TURN / max(spent, 1e-9))))

    def _spent(self) -> float:
        """Try what a sample takes."""
        return self.calls * min(self._clock.time(self._call, self.calls).seconds for _ in range(2))

    def sample(self) -> Sample:
        """Take one sample, behind one call that finds the caches as the last subject left them."""
        self._call()
        self.samples.append(self._clock.time(self._call, self.calls))
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
