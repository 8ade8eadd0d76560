"""PyTorch: its own operators without autograd, into fresh and into given results."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays import EPS, MOMENTUM, Arrays
from ..cases import Case
from .worker import Unable

torch: Any = None  # loaded in the peer's own process alone


def load(threads: int) -> str:
    """Import it, set its threads, return its version."""
    global torch
    torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return str(torch.__version__)


def calls_of(case: Case, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the ways to do a case."""
    x, out = _tensor(case, arrays.x), _tensor(case, arrays.out)
    weight, bias, running_mean, running_var = (
        torch.from_numpy(a)
        for a in (arrays.weight, arrays.bias, arrays.running_mean, arrays.running_var)
    )
    forward = torch.ops.aten.native_batch_norm
    backward = torch.ops.aten.native_batch_norm_backward
    given: Any
    results: Any
    if case.op in ("forward", "inference"):
        training = case.op == "forward"
        given = x, weight, bias, running_mean, running_var, training, MOMENTUM, EPS
        save_mean, save_invstd = (weight.new_empty(case.channels * training) for _ in range(2))
        results = {"out": out, "save_mean": save_mean, "save_invstd": save_invstd}
        return {
            "fresh": lambda: forward(*given),
            "out=": lambda: forward.out(*given, **results),
        }
    if case.op == "backward":
        dy = _tensor(case, arrays.other)
        mean, invstd = (torch.from_numpy(a).to(weight.dtype) for a in (arrays.mean, arrays.invstd))
        given = dy, x, weight, running_mean, running_var, mean, invstd, True, EPS, [True] * 3
        results = {
            "out0": out, "out1": torch.empty_like(weight), "out2": torch.empty_like(weight)
        }  # fmt: skip
        return {
            "fresh": lambda: backward(*given),
            "out=": lambda: backward.out(*given, **results),
        }
    raise Unable(f"no {case.op} in one operator")


def _tensor(case: Case, array: Any) -> Any:
    """View an array as a tensor ``(N, C, ...)``; channels last is then PyTorch's channels_last."""
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    else:
        tensor = torch.from_numpy(array)
    return tensor.movedim(-1, 1) if case.layout == "nhwc" else tensor
