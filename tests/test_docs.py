"""The pages' Python runs as it stands, each page's in one file, from top to bottom."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from programs import run

ROOT = Path(__file__).parents[1]
NAMES = "arrays", "compiled", "jax", "onnx", "pipelines", "scikit-learn", "threads", "weights"
PAGES = ["README", *(f"docs/{name}" for name in NAMES)]
# What must hold at the end, of the names that a page has made.
HOLDS = {
    "README": """
assert restored.running_mean.shape == (64,)
assert dshortcut.shape == x.shape
""",
    "docs/arrays": """
plain = numbabn.batch_norm_inference(np.array(x), mean, var)
np.testing.assert_array_equal(few, plain[:4])
np.testing.assert_array_equal(y.compute(), plain)
np.testing.assert_array_equal(normalized, plain)
folder.cleanup()
""",
    "docs/compiled": """
expected = np.random.default_rng(0).standard_normal(batches.shape)
np.testing.assert_allclose(batches, expected, atol=1e-5)
""",
    "docs/pipelines": """
pixels = np.stack([*stream()]).reshape(-1, 3).astype(float)
np.testing.assert_allclose([mean, var], [pixels.mean(0), pixels.var(0)], rtol=1e-6)
np.testing.assert_allclose(x, (batch - mean) / np.sqrt(var), atol=1e-6)
""",
    "docs/threads": """
np.testing.assert_array_equal(y, z)
if __name__ == "__main__":
    np.testing.assert_array_equal(answers, [answer(part) for part in np.split(x, 4)])
""",
}


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / f"{page}.md").read_text(), re.DOTALL)
    code = "\n".join(blocks)
    for library in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
        if find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    Path("page.py").write_text(code + HOLDS.get(page, ""))
    run(Path("page.py"), PYTHONPATH=str(ROOT), NUMBA_NUM_THREADS="2")
