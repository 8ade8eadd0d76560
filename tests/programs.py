"""Programs that tests run in processes of their own, with each of numba's threading layers."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest

LAYERS = ["omp", "tbb", "workqueue"]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def finish(code, *arguments, **environment):
    """Run a program, or a file, to its end, warnings being errors."""
    what = [str(code)] if isinstance(code, os.PathLike) else ["-c", textwrap.dedent(code)]
    return subprocess.run(
        [sys.executable, "-W", "error", *what, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run(code, *arguments, **environment):
    """Give the output of a program, which must not fail."""
    done = finish(code, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment_of(layer):
    """Give what makes numba choose a layer, or skip the test if it is not to be had here."""
    environment = {"NUMBA_THREADING_LAYER": layer}
    module = {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}[layer]
    if importlib.util.find_spec(f"numba.np.ufunc.{module}") is None:
        pytest.skip(f"numba has no {layer} on this system")
    if layer == "tbb":
        try:
            files = importlib.metadata.files("tbb") or []
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("tbb is not installed")
        # Where pip puts it, no loader looks.
        folders = {str(f.locate().resolve().parent) for f in files if f.name == "libtbb.so.12"}
        if not folders:
            pytest.skip("tbb has no library for Linux here")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(
            [*folders, os.environ.get("LD_LIBRARY_PATH", "")]
        )
    return environment


# What a program begins with.
CALL = """
import importlib, os, signal, sys, threading, time, warnings
import numba, numpy as np
import numbabn

threads = importlib.import_module("numbabn.threads")
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of forking beside threads
x = np.random.default_rng(0).standard_normal((20, 2, 65, 67), dtype=np.float32)
_, mean, invstd, _ = expected = numbabn.batch_norm_forward(x)
gradients = numbabn.batch_norm_backward(x, x, None, mean, invstd)

def right():
    forward = numbabn.batch_norm_forward(x)
    backward = numbabn.batch_norm_backward(x, x, None, mean, invstd)
    found, wanted = (*forward, *backward), (*expected, *gradients)
    return all(a is b or (a == b).all() for a, b in zip(found, wanted, strict=True))
"""
