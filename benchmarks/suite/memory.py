"""Peak memory of a process that makes a call, and of one that makes none."""

from typing import Any

from .calls import arrays_of, call_of
from .compilation import compile_kernels as setup_cache
from .grid import Case, parse_shape

__all__ = ["Memory", "setup_cache"]


class Memory:
    """What a call adds to its arrays: the library's code, compiled kernels, scratch memory."""

    param_names = ("op", "case")
    params = (
        ["forward", "inference", "backward"],
        ["nchw 32x64x56x56", "nhwc 32x64x56x56"],
    )

    def setup(self, compiled: Any, op: str, case: str) -> None:
        if op not in compiled["seconds"]:
            raise NotImplementedError
        layout, shape = case.split()
        self.case = Case(op, layout, "float32", parse_shape(shape))
        self.arrays = arrays_of(self.case)

    def peakmem_baseline(self, compiled: Any, op: str, case: str) -> Any:
        return self.arrays

    def peakmem_call(self, compiled: Any, op: str, case: str) -> Any:
        return call_of(self.case, self.arrays)()
