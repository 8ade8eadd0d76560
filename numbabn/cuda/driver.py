"""The few calls of CUDA's driver that are made directly, and how they fail."""

from functools import cache
from types import TracebackType
from typing import Any

from cuda.bindings import driver

from .formats import LEGACY

SUCCESS = driver.CUresult.CUDA_SUCCESS
_IDLE = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE


def checked(result: tuple[Any, ...]) -> Any:
    """Give what a call of the driver gives.

    Raises
    ------
    RuntimeError
        If it failed, by the name of CUDA's error.
    """
    error, *values = result
    if error != SUCCESS:
        raise RuntimeError(f"CUDA: expected success, got {error.name}")
    return values[0] if values else None


@cache
def _primary(ordinal: int) -> tuple[Any, int]:
    """Give a device's context, which all libraries share, and its handle; kept for good."""
    checked(driver.cuInit(0))
    context = checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(ordinal))))
    return context, int(context)


class on_device:  # noqa: N801
    """Make a device's context current in this thread, and then the caller's again, if any."""

    __slots__ = ("_ordinal", "_pushed")

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal

    def __enter__(self) -> None:
        context, handle = _primary(self._ordinal)
        self._pushed = int(driver.cuCtxGetCurrent()[1]) != handle
        if self._pushed:
            checked(driver.cuCtxPushCurrent(context))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pushed:
            checked(driver.cuCtxPopCurrent())


def is_capturing(stream: int) -> bool:
    """Whether work put on a stream goes into a CUDA graph; the default stream's never does."""
    if stream <= LEGACY:
        return False
    return bool(checked(driver.cuStreamIsCapturing(stream)) != _IDLE)


def refuse_to_capture(stream: int, what: str) -> None:
    """Refuse what must not be done while a stream is captured into a CUDA graph.

    Raises
    ------
    RuntimeError
        If it is.
    """
    if is_capturing(stream):
        raise RuntimeError(
            f"capture into a CUDA graph: expected {what} by an earlier call, got none: call once "
            "with arrays of the same shapes, dtypes and strides before capturing"
        )
