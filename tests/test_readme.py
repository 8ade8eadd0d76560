"""The README's commands are ones, and its figures can be drawn."""

import re
import shlex
from pathlib import Path

import pytest

from numbabn.cli import _parser, main

README = Path(__file__).parent.parent / "README.md"


def test_commands_use_extras_that_exist():
    project = (README.parent / "pyproject.toml").read_text()
    for extra in re.findall(r'"\.\[(\w+)\]"', README.read_text()):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def commands():
    """List the arguments of the README's numbabn commands, in text and in shell."""
    text = README.read_text()
    found = re.findall(r"`numbabn\s([^`]+)`", text) + re.findall(r"\.venv/bin/numbabn (.+)", text)
    return [shlex.split(each) for each in found]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_commands_are_taken(arguments, monkeypatch):
    monkeypatch.chdir(README.parent)
    args = ["x" if word.isupper() else word for word in arguments]  # FILE, FOLDER
    assert callable(_parser().parse_args(args).run)


def test_figures_are_drawn_from_results_of_this_format(tmp_path, capsys):
    figures = re.findall(r"\((docs/bench-\w+)\.png\)", README.read_text())
    assert figures == ["docs/bench-cpu"]
    for name in figures:
        drawn, results = tmp_path / "drawn.png", str(README.parent / f"{name}.json")
        assert main(["bench", "--from", results, "--plot", str(drawn)]) == 0
        assert "agree with the float64 oracle" in capsys.readouterr().out
        there = README.parent / f"{name}.png"
        # A PNG of the same width; fonts, and with them the rest, are not the same everywhere.
        assert drawn.read_bytes()[:20] == there.read_bytes()[:20]
