"""The instructions that kernels are written in: a GPU's, or their twins in Numba's simulator."""

from importlib.util import find_spec

from ..libraries import CUDA_EXTRA

if find_spec("numba_cuda") is None:
    raise ImportError(f"numbabn.cuda: expected numba-cuda, got none installed: {CUDA_EXTRA}")

from numba.cuda.core import config

SIMULATED = bool(config.ENABLE_CUDASIM)

if SIMULATED:
    from .simulator import *  # noqa: F403
else:
    from .intrinsics import *  # type: ignore[assignment]  # noqa: F403
