"""Who may import whom: from lower levels only, and nothing heavy or foreign at import."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import numbabn

PACKAGE = Path(numbabn.__file__).parent
LEVELS = {
    "reference": 0,
    "xla": 0,
    "extras": 0,
    "libraries": 0,
    "checks": 1,
    "host": 1,
    "layout": 1,
    "results": 1,
    "stats": 1,
    "threads": 1,
    "fold": 1,
    "cpu": 2,
    "cuda": 2,
    "backends": 3,
    "conventions": 4,
    "functional": 4,
    "population": 5,
    "layers": 5,
    "c": 5,
    "overloads": 5,
    "jax": 5,
    "sklearn": 5,
    "": 6,
    "onnx": 6,
    "cli": 6,
}


def level_of(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return part if part != "__init__" else ""


def imported(path):
    """Parts of the package that a file imports, its own part left out."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = list(parts[: len(parts) - node.level]) if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            names = [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        for name in names:
            if name[0] == "numbabn":
                part = name[1] if len(name) > 1 else ""
                part = part if part in LEVELS else ""
                if part != level_of(path):
                    yield part


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_go_down(path):
    own = LEVELS[level_of(path)]
    for part in imported(path):
        if level_of(path) == "cli":
            continue  # the command line uses the package as any program does
        # Those of one level stand side by side, but fold checks its arguments.
        below = LEVELS[part] < own or (level_of(path), part) == ("fold", "checks")
        assert below or own == 6, f"{path.name} imports {part or 'numbabn'}"


def test_the_oracle_imports_numpy_alone():
    tree = ast.parse((PACKAGE / "reference.py").read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [node.module or "numbabn"]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert modules <= {"numpy", "collections"}


def test_importing_loads_no_extra():
    code = (
        "import sys, numbabn\n"
        "assert callable(numbabn.batch_norm)\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "extras = {'matplotlib', 'rich', 'sklearn', 'torch', 'cupy', 'numba_cuda', 'jax', 'onnx'}\n"
        "extras |= {'array_api_strict', 'dask', 'xarray'}\n"
        "assert not loaded & extras, loaded & extras\n"
        "assert 'numba.cuda' not in sys.modules\n"
        "assert 'numbabn.cli' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_what_computes_on_devices_says_what_it_needs():
    code = (
        "from importlib import util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name: None if name == 'numba_cuda' else find(name)\n"
        "import numbabn.cuda.device\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    expected = "ImportError: numbabn.cuda: expected numba-cuda, got none installed: pip install "
    assert done.stderr.splitlines()[-1].startswith(expected)


@pytest.mark.parametrize(
    ("part", "library"), [("jax", "JAX"), ("onnx", "onnx"), ("sklearn", "scikit-learn")]
)
def test_what_a_part_lacks(part, library, monkeypatch):
    own = f"numbabn.{part}"
    for name in [name for name in sys.modules if name.startswith((f"{part}.", own))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, part, None)
    message = (
        f'numbabn.{part}: expected {library}, got none installed: pip install "numbabn[{part}]"'
    )
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        import_module(own)


def test_public_names():
    for name in numbabn.__all__:
        assert getattr(numbabn, name).__doc__
