"""What every test runs under."""

import numpy as np
import pytest

import numbabn
from numbabn import cpu, functional, layout


class _PoisonedNumPy:
    """NumPy, but fresh memory holds NaN, so that an element left unwritten shows."""

    def __getattr__(self, name):
        return getattr(np, name)

    @staticmethod
    def empty(*args, **kwargs):
        array = np.empty(*args, **kwargs)
        array.fill(np.nan)
        return array

    @staticmethod
    def empty_like(*args, **kwargs):
        array = np.empty_like(*args, **kwargs)
        array.fill(np.nan)
        return array


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    for module in (functional, layout, cpu):
        monkeypatch.setattr(module, "np", _PoisonedNumPy())


@pytest.fixture(autouse=True)
def doctest_names(doctest_namespace):
    doctest_namespace["np"] = np
    doctest_namespace["numbabn"] = numbabn
