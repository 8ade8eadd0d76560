"""What every test runs under."""

import numpy as np
import pytest

from numbabn import cpu
from numbabn.cpu import schedule

pytest.register_assert_rewrite("problem")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With ``-n``: a file's tests share what they compile, and the longest file is not the last."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


class _PoisonedNumPy:
    """NumPy, but fresh memory holds NaN, so that an element left unwritten shows."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(*args, **kwargs):
        array = np.empty(*args, **kwargs)
        array.fill(np.nan)
        return array


def _poisoned_empty_like(x, empty_like=cpu.empty_like):
    array = empty_like(x)
    array.fill(np.nan)
    return array


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    monkeypatch.setattr(cpu, "empty_like", _poisoned_empty_like)
    monkeypatch.setattr(cpu, "np", _PoisonedNumPy())
    schedule._pool.buffer[: 1 << 20].fill(0xFF)  # not a number, as any float
