"""Device time of one call, by events, and how near it comes to a copy on the device."""

from . import grid
from .grid import OPS, Case

SECONDS = 0.5

Found = dict[Case, tuple[float, float]]  # seconds, and the fraction


def setup_cache() -> Found:
    """Measure all, or nothing where there is no device or the commit takes no device's arrays."""
    from yardstick.cli.bench.devices import find
    from yardstick.cli.bench.measurement import Budget, measure

    try:
        device = find("cuda")
    except RuntimeError:
        return {}
    found = {}
    for layout in (NCHW, NHWC, NC):
        for case in layout().cases():
            result = measure(case, Budget(SECONDS), [], device)
            if result.timing is not None:
                found[case] = result.timing.median, round(result.fraction, 4)
    return found


class _Device:
    def setup(self, found: Found, op: str, dtype: str, shape: str) -> None:
        if self.case(op, dtype, shape) not in found:
            raise NotImplementedError

    def track_device_time(self, found: Found, op: str, dtype: str, shape: str) -> float:
        return found[self.case(op, dtype, shape)][0]

    def track_fraction(self, found: Found, op: str, dtype: str, shape: str) -> float:
        return found[self.case(op, dtype, shape)][1]

    track_device_time.unit = "seconds"
    track_fraction.unit = "of the limit"


class NCHW(_Device, grid.NCHW):
    """Channels first."""

    params = (OPS, ["float32"], grid.IMAGES[:1])


class NHWC(_Device, grid.NHWC):
    """Channels last."""

    params = (OPS, ["float16"], grid.IMAGES[:1])


class NC(_Device, grid.NC):
    """No places."""

    params = (OPS, ["float32"], grid.ROWS)
