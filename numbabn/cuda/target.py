"""The instructions that kernels are written in: a GPU's, or their twins in Numba's simulator."""

from numba.cuda.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulator import *  # noqa: F403
else:
    from .intrinsics import *  # type: ignore[assignment]  # noqa: F403
