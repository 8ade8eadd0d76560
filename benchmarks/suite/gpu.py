"""Device time of one call, by events, and how near it comes to a copy on the device."""

from functools import cache, lru_cache

from . import grid
from .yardstick import Budget, Case, Result, find_device, measure

__all__ = ["NC", "NCHW", "NHWC"]

SECONDS = 0.5


@cache
def _is_here() -> bool:
    """Say whether this machine has a device."""
    try:
        find_device("cuda")
    except RuntimeError:
        return False
    return True


@lru_cache(maxsize=1)
def _measured(case: Case) -> Result:
    result = measure(case, Budget(SECONDS), [], find_device("cuda"))
    if result.timing is None:
        raise RuntimeError(result.check.problem)
    return result


class _Device:
    def setup(self, op: str, dtype: str, shape: str) -> None:
        if not _is_here():
            raise NotImplementedError

    def track_device_time(self, op: str, dtype: str, shape: str) -> float:
        return _measured(self.case(op, dtype, shape)).timing.median

    def track_fraction(self, op: str, dtype: str, shape: str) -> float:
        return round(_measured(self.case(op, dtype, shape)).fraction, 4)

    track_device_time.unit = "seconds"
    track_fraction.unit = "of the limit"


class NCHW(_Device, grid.NCHW):
    """Channels first."""


class NHWC(_Device, grid.NHWC):
    """Channels last."""


class NC(_Device, grid.NC):
    """No places."""
