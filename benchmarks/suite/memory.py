"""Memory that a call takes beside its arrays."""

from itertools import product
from pathlib import Path
from typing import Any

from .calls import arrays_of, call_of
from .compilation import compile_kernels
from .grid import IMAGES, Case, parse_shape
from .parallel import in_parallel

OPS = ["forward", "inference", "backward"]
CASES = [f"nchw {IMAGES[0]}", f"nhwc {IMAGES[0]}"]
SMALL = "32x64x7x7"  # large enough for the same kernels

Found = dict[tuple[str, str], float]


def _case(op: str, case: str) -> Case:
    layout, shape = case.split()
    return Case(op, layout, "float32", parse_shape(shape))


def _loaded(op: str, case: str) -> Any:
    """Make a case's arrays, the library and a kernel of the op having been loaded."""
    small = _case(op, f"{case.split()[0]} {SMALL}")
    call_of(small, arrays_of(small))()
    return arrays_of(_case(op, case))


class Peak:
    """Of a process that makes a call, and of one that does not, each with all that it loads.

    How much of a library is counted depends on what the system holds in memory anyway: tens of
    megabytes from one installation to the next. Their difference is the call's.
    """

    param_names = ("op",)
    params = (OPS,)

    def setup_cache(self) -> Any:
        return compile_kernels()

    def setup(self, compiled: Any, op: str) -> None:
        if op not in compiled["seconds"]:
            raise NotImplementedError
        self.arrays = _loaded(op, CASES[0])

    def peakmem_baseline(self, compiled: Any, op: str) -> Any:
        return self.arrays

    def peakmem_call(self, compiled: Any, op: str) -> Any:
        return call_of(_case(op, CASES[0]), self.arrays)()


class Added:
    """How far a call raises the peak of its process."""

    param_names = ("op", "case")
    params = (OPS, CASES)
    unit = "of its arrays' memory"

    def setup_cache(self) -> Found:
        able = compile_kernels()["seconds"]
        places = [each for each in product(*self.params) if each[0] in able]
        return dict(zip(places, in_parallel(_added, places, fresh=True), strict=True))

    def setup(self, found: Found, op: str, case: str) -> None:
        if (op, case) not in found:
            raise NotImplementedError

    def track_added(self, found: Found, op: str, case: str) -> float:
        """1 is a call that takes no other memory."""
        return found[op, case]


def _added(place: tuple[str, str]) -> float:
    arrays = _loaded(*place)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it is now
    before = _peak()
    call_of(_case(*place), arrays)()
    large = (arrays.x, arrays.out, arrays.other)
    nbytes = sum(each.nbytes for each in large if each is not None)
    return round(1 + (_peak() - before) / nbytes, 3)


def _peak() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = status.partition("VmHWM:")[2].split()[0]
    return int(kilobytes) << 10
