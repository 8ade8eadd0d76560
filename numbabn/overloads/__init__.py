"""The public names within functions that numba compiles: importing this makes numba know them."""

from . import functional as functional
from . import stats as stats
