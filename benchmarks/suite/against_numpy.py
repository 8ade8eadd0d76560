"""How far a call leaves NumPy behind."""

from itertools import product
from time import sleep

from .grid import Case, parse_shape

TURNS = 7
OWN_PER_TURN = 3

Ratios = dict[tuple[str, str], float]


class NumPy:
    """How many times a call's time NumPy takes, done in as few sweeps as it can.

    A ratio of medians of samples taken in turns in one process.
    """

    param_names = ("op", "case")
    params = (
        ["forward", "inference", "backward"],
        ["nchw 32x256x14x14", "nhwc 32x256x14x14", "nc 4096x1024"],
    )
    unit = "times faster"

    def setup_cache(self) -> Ratios:
        from .compilation import compile_kernels

        able = compile_kernels()["seconds"]
        return {each: _ratio(*each) for each in product(*self.params) if each[0] in able}

    def setup(self, ratios: Ratios, op: str, case: str) -> None:
        if (op, case) not in ratios:
            raise NotImplementedError

    def track_ratio(self, ratios: Ratios, op: str, case: str) -> float:
        return ratios[op, case]


def _ratio(op: str, case: str) -> float:
    from yardstick.cli.bench.devices.cpu import CPU
    from yardstick.cli.bench.measurement import PAUSE
    from yardstick.cli.bench.peers import numpy_peer
    from yardstick.cli.bench.sampling import Sampler, Timing

    from .calls import arrays_of, call_of

    layout, _, shape = case.partition(" ")
    of = Case(op, layout, "float32", parse_shape(shape))
    arrays = arrays_of(of)
    (numpy,) = numpy_peer.calls_of(of, arrays).values()
    ours, theirs = (Sampler(call, CPU().clock) for call in (call_of(of, arrays), numpy))
    for _ in range(TURNS):
        theirs.sample()
        # Its BLAS's threads spin for more work; beside them a call took up to 10 times as long.
        sleep(PAUSE)
        for _ in range(OWN_PER_TURN):
            ours.sample()
    return round(Timing.of(theirs.samples).median / Timing.of(ours.samples).median, 4)
