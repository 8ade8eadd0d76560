"""Where the measurement ran: what ``numbabn info`` knows, and what matters to times."""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numba

from .. import info
from ..command import CommandError
from .devices import Device

CPU_INFO = Path("/proc/cpuinfo")


@contextmanager
def threads(wanted: int | None) -> Iterator[int]:
    """Let numba use `wanted` threads, or as many as it does; give their number."""
    before: int = numba.get_num_threads()
    most: int = numba.config.NUMBA_NUM_THREADS
    if wanted is not None and wanted > most:
        raise CommandError(f"--threads: expected at most numba's {most}, got {wanted}")
    numba.set_num_threads(wanted or before)
    try:
        yield wanted or before
    finally:
        numba.set_num_threads(before)


def gather(threads: int, device: Device) -> dict[str, Any]:
    """Collect what the figures depend on beside the code; peers come later."""
    facts, gpu = info.gather(), device.facts()
    del facts["kernel_cache"]  # a folder of one's own, in a file to pass around
    if gpu is not None:
        drivers = [found["driver_version"] for found in facts["cuda_devices"]]
        gpu["driver_version"] = drivers[0] if drivers else None
    return facts | {
        "gpu": gpu,
        "notes": device.notes._asdict(),
        "cpu_model": cpu_model(),
        "threads_used": threads,
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "peers": {},
    }


def cpu_model() -> str:
    """Name the processor as it is sold, where the system tells."""
    try:
        for line in CPU_INFO.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
