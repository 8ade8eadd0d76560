"""``numbabn info``: what this machine offers and what numbabn makes of it."""

import argparse
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import binding as llvm

from .. import __version__, cpu
from .command import add_json_option, write_json

PACKAGES = ("numpy", "numba", "llvmlite", "ml_dtypes", "numba-cuda", "cuda-core")
SIMD = re.compile(r"s?sse|avx|fma|neon|sve")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
NVIDIA_SMI = "nvidia-smi"
CUDA_FIELDS = ("name", "compute_cap", "memory.total", "driver_version")


def add_parser(subparsers: "argparse._SubParsersAction[Any]") -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "info",
        help="show versions, processor, threads, kernel cache and CUDA devices",
        description="Show versions, processor, threads, kernel cache and CUDA devices.",
    )
    add_json_option(parser, "the same")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table, or its JSON where that goes to standard output."""
    facts = gather()
    if args.json != Path("-"):
        print(table(facts))
    if args.json is not None:
        write_json(args.json, facts)
    return 0


def gather() -> dict[str, Any]:
    """Collect everything that the command shows."""
    return {
        "versions": {"numbabn": __version__, "python": platform.python_version()}
        | {package: _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu": {
            "name": llvm.get_host_cpu_name(),
            "features": _simd_features(),
            "logical_cores": os.cpu_count(),
            "caches": _cache_sizes(CACHES),
        },
        "threads": numba.config.NUMBA_NUM_THREADS,
        "threading_layer": _threading_layer(),
        "kernel_cache": cpu.cache_folder(),
        "cuda_devices": _cuda_devices(),
    }


def table(facts: dict[str, Any]) -> str:
    """Lay the facts out in two columns."""
    processor = facts["cpu"]
    rows = [
        *facts["versions"].items(),
        ("platform", facts["platform"]),
        ("CPU", processor["name"]),
        ("SIMD", " ".join(processor["features"]) or "none known"),
        ("logical cores", processor["logical_cores"]),
        ("caches", ", ".join(f"{k} {v}" for k, v in processor["caches"].items()) or "unknown"),
        ("numba threads", facts["threads"]),
        ("threading layer", facts["threading_layer"] or "none can start"),
        ("kernel cache", facts["kernel_cache"] or "off"),
    ]
    devices = [", ".join(device.values()) for device in facts["cuda_devices"]] or ["none found"]
    rows += [("CUDA devices" if i == 0 else "", device) for i, device in enumerate(devices)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # of the extras
        return "not installed"


def _simd_features() -> list[str]:
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM cannot tell on every platform
        return []
    return sorted(name for name, there in features.items() if there and SIMD.match(name))


def _fill(x: Any) -> None:
    for i in numba.prange(len(x)):
        x[i] = i


def _threading_layer() -> str | None:
    """Name the layer that parallel functions run on: numba picks it when the first one starts."""
    try:
        numba.njit(parallel=True)(_fill)(np.empty(2))
        name: str = numba.threading_layer()
    except ValueError:
        return None
    return name


def _cache_sizes(folder: Path) -> dict[str, str]:
    """Read, as Linux tells them, the sizes of one core's caches: ``{"L1d": "32K", ...}``."""
    sizes = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = (
                (index / field).read_text(encoding="ascii").strip()
                for field in ("level", "type", "size")
            )
        except OSError:
            continue
        sizes[f"L{level}" + {"Data": "d", "Instruction": "i"}.get(kind, "")] = size
    return sizes


def _cuda_devices() -> list[dict[str, str]]:
    """Ask the driver's own program: importing a CUDA package would cost seconds and memory."""
    query = [NVIDIA_SMI, f"--query-gpu={','.join(CUDA_FIELDS)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(CUDA_FIELDS, map(str.strip, line.split(",")), strict=False))
        for line in answer.stdout.splitlines()
        if line.strip()
    ]
