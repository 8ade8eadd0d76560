"""PyTorch on a CUDA device: through cuDNN and by its own kernels, without autograd.

It sees the same arrays of Numba's that numbabn is timed on, and works on the same stream. Results
are fresh: neither way writes into given ones for every operation.
"""

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..arrays import EPS, MOMENTUM, Arrays
from ..cases import Case
from .worker import Unable

torch: Any = None  # loaded in the peer's own process alone


def load(threads: int) -> str:
    """Import it, return its version."""
    global torch
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise RuntimeError(f"PyTorch {torch.__version__} sees no CUDA device")
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return str(torch.__version__)


def calls_of(case: Case, arrays: Arrays) -> dict[str, Callable[[], Any]]:
    """Return the ways to do a case."""
    if case.op not in ("forward", "inference", "backward"):
        raise Unable(f"no {case.op} in one operator")
    x = _tensor(case, arrays.x)
    weight, bias, *running = (
        torch.as_tensor(a, device="cuda")
        for a in (arrays.weight, arrays.bias, arrays.running_mean, arrays.running_var)
    )
    if case.op == "backward":
        saved = [
            torch.as_tensor(a, device="cuda").to(weight.dtype) for a in (arrays.mean, arrays.invstd)
        ]
        return _backward(_tensor(case, arrays.other), x, weight, bias, running, saved)
    training = case.op == "forward"

    def forward(cudnn: bool) -> Callable[[], Any]:
        given = x, weight, bias, *running, training, MOMENTUM, EPS, cudnn
        return lambda: torch.batch_norm(*given)

    return {"cuDNN": forward(True), "native": forward(False)}


def _backward(
    dy: Any, x: Any, weight: Any, bias: Any, running: list[Any], saved: list[Any]
) -> dict[str, Callable[[], Any]]:
    aten = torch.ops.aten
    given = dy, x, weight, *running, *saved, True, EPS, [True] * 3
    ways = {"native": lambda: aten.native_batch_norm_backward(*given)}
    # cuDNN's backward takes what its own forward has left, and not every dtype and shape.
    with suppress(RuntimeError):
        _, *left, reserve = aten.cudnn_batch_norm(x, weight, bias, *running, True, MOMENTUM, EPS)
        ours = x, dy, weight, *running, *left, EPS, reserve
        aten.cudnn_batch_norm_backward(*ours)
        ways["cuDNN"] = lambda: aten.cudnn_batch_norm_backward(*ours)
    return ways


def _tensor(case: Case, array: Any) -> Any:
    """View an array as a tensor ``(N, C, ...)``; channels last is then PyTorch's channels_last."""
    if array.dtype.name == "bfloat16":  # which the CUDA Array Interface does not know
        tensor = torch.as_tensor(array.view("i2"), device="cuda").view(torch.bfloat16)
    else:
        tensor = torch.as_tensor(array, device="cuda")
    return tensor.movedim(-1, 1) if case.layout == "nhwc" else tensor
