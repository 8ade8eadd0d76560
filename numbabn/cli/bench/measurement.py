"""One case: checked, then timed together with its limit and its peers, in turns."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from .arrays import make
from .calls import call_of
from .cases import Case
from .devices import Device
from .oracle import Check, check
from .peers import Peer, PeerError
from .sampling import LEAST, SAMPLES_PER_TURN, Sampler, Timing, in_turn

PATIENCE = 3  # times the budget, while too few samples of numbabn and the limit are undisturbed
OWN_PER_TURN = 3  # numbabn's and the limit's share of these, at least, in every turn of theirs
# Seconds until the threads of the last turn, which spin for more work, have gone to sleep: seen
# were up to 8 ms in PyTorch, 10 in numba's OpenMP, 30 in ONNX Runtime.
PAUSE = 4e-2


@dataclass(frozen=True)
class Budget:
    """How long a case is measured: for some seconds, or a number of samples of each subject."""

    seconds: float = 1.0
    repeats: int | None = None


@dataclass(frozen=True)
class PeerResult:
    """A peer's times for a case, by the way it was done, or why there are none."""

    timings: dict[str, Timing] = field(default_factory=dict)
    reason: str | None = None

    @property
    def best(self) -> Timing | None:
        """Times of its fastest way."""
        return min(self.timings.values(), key=lambda timing: timing.median, default=None)


@dataclass(frozen=True)
class Result:
    """What was found out about a case; times are there only if it passed its check."""

    case: Case
    check: Check
    timing: Timing | None = None
    limits: dict[str, Timing] = field(default_factory=dict)
    peers: dict[str, PeerResult] = field(default_factory=dict)

    @property
    def gigabytes_per_second(self) -> float | None:
        """The traffic at the limit, over the time that it took."""
        return None if self.timing is None else self.case.traffic / self.timing.median / 1e9

    @property
    def limit(self) -> str | None:
        """The fastest way to sweep as much memory."""
        return min(self.limits, key=lambda way: self.limits[way].median, default=None)

    @property
    def fraction(self) -> float | None:
        """The limit's time as a fraction of numbabn's: 1 is as fast as memory."""
        if self.timing is None or self.limit is None:
            return None
        return self.limits[self.limit].median / self.timing.median

    def ratio(self, peer: str) -> float | None:
        """How many times numbabn's time a peer took."""
        best = self.peers[peer].best if peer in self.peers else None
        return None if self.timing is None or best is None else best.median / self.timing.median

    @property
    def failure(self) -> str | None:
        """Why there are no times, in a word."""
        return None if self.check.problem is None else self.check.problem.split(":")[0]

    @classmethod
    def of(cls, document: dict[str, Any]) -> "Result":
        """Rebuild it from its document."""
        op, layout, dtype, shape = (document[key] for key in ("op", "layout", "dtype", "shape"))
        seconds = document["seconds"]
        return cls(
            case=Case(op, layout, dtype, tuple(shape)),
            check=Check(**document["check"]),
            timing=None if seconds is None else Timing(**seconds),
            limits=_timings(document["limits"]),
            peers={
                name: PeerResult(_timings(peer["seconds"]), peer["reason"])
                for name, peer in document["peers"].items()
            },
        )

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            **asdict(self.case),
            "bytes_of_x": self.case.nbytes,
            "traffic_bytes": self.case.traffic,
            "check": asdict(self.check),
            "seconds": None if self.timing is None else asdict(self.timing),
            "gigabytes_per_second": self.gigabytes_per_second,
            "fraction_of_limit": self.fraction,
            "limit": self.limit,
            "limits": {way: asdict(timing) for way, timing in self.limits.items()},
            "peers": {
                name: {
                    "seconds": {way: asdict(timing) for way, timing in peer.timings.items()},
                    "ratio": self.ratio(name),
                    "reason": peer.reason,
                }
                for name, peer in self.peers.items()
            },
        }


def _timings(document: dict[str, Any]) -> dict[str, Timing]:
    return {way: Timing(**seconds) for way, seconds in document.items()}


def geometric_mean(numbers: Iterable[float | None]) -> float | None:
    """Return the geometric mean of those that are there."""
    logarithms = [math.log(number) for number in numbers if number is not None]
    return math.exp(math.fsum(logarithms) / len(logarithms)) if logarithms else None


def group_of(result: Result) -> str:
    """Name what a result is compared and averaged with."""
    return f"{result.case.op} {result.case.layout} {result.case.dtype}"


def means(found: list[Result], peers: list[str]) -> dict[str, dict[str, Any]]:
    """Take geometric means over each op, layout and dtype."""
    return {
        name: {
            "fraction_of_limit": geometric_mean(result.fraction for result in group),
            "ratios": {
                peer: geometric_mean(result.ratio(peer) for result in group) for peer in peers
            },
        }
        for name, members in groupby(found, group_of)
        for group in [list(members)]
    }


def measure(case: Case, budget: Budget, peers: list[Peer], device: Device) -> Result:
    """Check a case and, if it is right, time it."""
    arrays = make(case)
    placed = device.place(arrays)
    calls = [call_of(case, each) for each in placed]
    checked = check(case, arrays, device.fetched(calls[0], placed[0], arrays))
    if checked.problem is not None:
        return Result(case, checked)
    ways = device.sweeps(placed)
    subjects = {"": in_turn(calls), **ways}
    own = [Sampler(subject, device.clock) for subject in subjects.values()]
    results: dict[str, PeerResult] = {}
    able = [peer for peer in peers if _does(peer, lambda peer: peer.prepare(case), results)]
    _take_turns(own, able, budget, results)
    for peer in able:
        if _does(peer, Peer.release, results):
            results[peer.name] = PeerResult(peer.timings())
    timing, *limits = (Timing.of(sampler.samples) for sampler in own)
    in_order = {peer.name: results[peer.name] for peer in peers}
    return Result(case, checked, timing, dict(zip(ways, limits, strict=True)), in_order)


def _take_turns(
    own: list[Sampler], peers: list[Peer], budget: Budget, results: dict[str, PeerResult]
) -> None:
    """Sample numbabn and the limit alternately, then each peer, and so on."""
    most = 1 if budget.repeats else SAMPLES_PER_TURN
    per_turn = min(most, max(OWN_PER_TURN, *(sampler.per_turn for sampler in own)))
    start, turns = time.perf_counter(), 0

    def enough() -> bool:
        if budget.repeats or turns < LEAST:
            return turns >= (budget.repeats or LEAST)
        spent = (time.perf_counter() - start) / budget.seconds
        return spent > PATIENCE or (
            spent > 1 and all(sampler.undisturbed >= LEAST for sampler in own)
        )

    while not enough():
        turns += 1
        for _ in range(per_turn):
            for sampler in own:
                sampler.sample()
        for peer in [peer for peer in peers if peer.name not in results]:
            time.sleep(PAUSE)
            _does(peer, lambda peer: peer.sample(most), results)
        if peers:
            time.sleep(PAUSE)


def _does(peer: Peer, step: Callable[[Peer], None], results: dict[str, PeerResult]) -> bool:
    """Let a peer take a step; note why where it cannot."""
    if peer.name in results:
        return False
    try:
        step(peer)
    except PeerError as error:
        results[peer.name] = PeerResult(reason=str(error))
        return False
    return True
