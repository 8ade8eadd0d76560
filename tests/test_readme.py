"""The README's examples run as they stand, and its two commands name what the package offers."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 7
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["restored"].running_mean.shape == (64,)
    assert names["dshortcut"].shape == names["x"].shape


def test_commands_use_extras_that_exist():
    project = (README.parent / "pyproject.toml").read_text()
    for extra in re.findall(r'"\.\[(\w+)\]"', README.read_text()):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
