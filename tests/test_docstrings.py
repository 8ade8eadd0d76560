"""Every example in a docstring gives what it says."""

import doctest
from pathlib import Path

import pytest

import numbabn

PACKAGE = Path(numbabn.__file__).parent
MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>>" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name.startswith("numbabn.cuda."):
        pytest.skip("its examples are kernels, which take a GPU; tests/cuda has them")
    module = pytest.importorskip(name, exc_type=ImportError)
    failed, attempted = doctest.testmod(module)
    assert attempted
    assert not failed
