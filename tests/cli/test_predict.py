"""``numbabn predict``."""

import json
import os
from importlib.util import find_spec

import pytest

from numbabn.cli import main, predict

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
for module in ("cuda.core", "numba_cuda"):
    pytest.importorskip(module, reason="numba-cuda is not installed")

SHAPE = "8x64x32x32"


def predicted(tmp_path, *arguments):
    path = tmp_path / "predicted.json"
    assert main(["predict", *arguments, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_table_with_every_case(tmp_path, capsys):
    found = predicted(tmp_path, SHAPE, "4x16x7x7", "--layout", "nchw,nhwc", "--op", "forward")
    cases = [(each["layout"], each["shape"]) for each in found["cases"]]
    shapes = [8, 64, 32, 32], [4, 16, 7, 7]
    assert cases == [(layout, shape) for layout in ("nchw", "nhwc") for shape in shapes]
    assert found["gpu"]["name"] == "H200"
    for each in found["cases"]:
        assert each["bound"] in (*each["bounds"], "launch")
        assert each["seconds"] > max(each["bounds"].values()) > 0
        assert each["tasks"] == each["cut"]["groups"] * each["cut"]["pieces"]
    output = capsys.readouterr().out
    for text in ("forward nchw float16", SHAPE, "short, held", "no measurement has corrected yet"):
        assert text in output


def test_against_what_was_measured(tmp_path, capsys):
    row = {"op": "forward", "layout": "nchw", "dtype": "float16", "shape": [8, 64, 32, 32]}
    failed = row | {"op": "backward", "failed": "no answer"}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"cases": [row | {"times": {"numbabn": {"ms": 0.0071}}}, failed]}))
    found = predicted(tmp_path, "--against", str(report))
    assert [each["op"] for each in found["cases"]] == ["forward"]
    ratio = 7.1e-6 / found["cases"][0]["seconds"]
    assert f"7.1   {ratio:.2f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "B52"], "--gpu: expected one of A100, H100, H200, got 'B52'"),
        (["7y7"], "got '7y7'"),
        (["--against", "nowhere.json"], "nowhere.json"),
        (["--op", "add_relu"], "--op: expected some of forward, inference, backward"),
    ],
)
def test_what_is_refused(arguments, message, capsys):
    assert main(["predict", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"cases": [{"times": {"numbabn": {}}}]}', "no JSON"])
def test_no_report(text, tmp_path, capsys):
    path = tmp_path / "report.json"
    path.write_text(text)
    assert main(["predict", "--against", str(path)]) == 2
    assert "--against: expected a report.json of gpu_report" in capsys.readouterr().err


def test_without_what_compiles(monkeypatch, capsys):
    def missing(name):
        return None if name == "numba_cuda" else find_spec(name)

    monkeypatch.setattr(predict, "find_spec", missing)
    assert main(["predict"]) == 2
    assert "numba-cuda not found" in capsys.readouterr().err


def test_in_the_simulator(monkeypatch, capsys):
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    assert main(["predict"]) == 2
    assert "nothing is compiled while numba simulates" in capsys.readouterr().err
