"""numbabn's own call of each operation, with its result preallocated."""

from collections.abc import Callable
from typing import Any

import numbabn

from .arrays import EPS, MOMENTUM, Arrays
from .cases import Case


def call_of(case: Case, arrays: Arrays, library: Any = numbabn) -> Callable[[], Any]:
    """Return the call that is checked and timed, of this numbabn or of another."""
    x, other, weight, bias = arrays.x, arrays.other, arrays.weight, arrays.bias
    running = arrays.running_mean, arrays.running_var
    options: dict[str, Any] = {"axis": case.axis, "out": arrays.out}
    training = options | {"momentum": MOMENTUM, "eps": EPS}
    fused = training | {"residual": other, "activation": "relu"}
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: library.batch_norm_forward(x, weight, bias, *running, **training),
        "inference": lambda: library.batch_norm_inference(
            x, *running, weight, bias, eps=EPS, **options
        ),
        "backward": lambda: library.batch_norm_backward(
            other, x, weight, arrays.mean, arrays.invstd, **options
        ),
        "add_relu": lambda: library.batch_norm_forward(x, weight, bias, *running, **fused),
    }
    return calls[case.op]
