import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

import numbabn
from numbabn.cli import info, main

ROOT = Path(numbabn.__file__).parents[1]


def gathered(capsys):
    assert main(["info", "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_table_aligns_every_fact(capsys):
    assert main(["info"]) == 0
    rows = dict(
        re.fullmatch(r"(.{16}) (.+)", r).groups() for r in capsys.readouterr().out.splitlines()
    )
    rows = {label.strip(): value for label, value in rows.items()}
    assert rows["numbabn"] == numbabn.__version__
    assert rows["numpy"] == np.__version__
    assert rows["numba"] == numba.__version__
    assert rows["logical cores"] == str(os.cpu_count())
    assert {
        "python", "llvmlite", "ml_dtypes", "platform", "CPU", "SIMD", "caches", "numba threads",
        "threading layer", "kernel cache", "CUDA devices",
    } <= rows.keys()  # fmt: skip


def test_json_has_the_same_facts(capsys, tmp_path):
    facts = gathered(capsys)
    assert facts["threading_layer"] in ("omp", "tbb", "workqueue", None)
    assert facts["threads"] >= 1
    simd = facts["cpu"]["features"]
    assert simd == sorted(simd)
    assert all(re.match("s?sse|avx|fma|neon|sve", name) for name in simd)
    path = tmp_path / "info.json"
    assert main(["info", "--json", str(path)]) == 0
    assert capsys.readouterr().out.startswith("numbabn ")
    assert json.loads(path.read_text()) == facts


def test_caches_as_linux_tells_them(capsys, monkeypatch, tmp_path):
    for index, (level, kind, size) in enumerate(
        [(1, "Data", "32K"), (1, "Instruction", "64K"), (2, "Unified", "1024K")]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for field, value in ("level", level), ("type", kind), ("size", size):
            (folder / field).write_text(f"{value}\n")
    (tmp_path / "index3").mkdir()  # one that tells nothing
    monkeypatch.setattr(info, "CACHES", tmp_path)
    assert gathered(capsys)["cpu"]["caches"] == {"L1d": "32K", "L1i": "64K", "L2": "1024K"}


def test_no_cache_folder_is_off(capsys, monkeypatch):
    monkeypatch.setattr(numbabn.cpu, "cache_folder", lambda: None)
    assert main(["info"]) == 0
    assert re.search(r"^kernel cache +off$", capsys.readouterr().out, re.M)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_cuda_devices_come_from_nvidia_smi(capsys, monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'echo "NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 550.54.15"\n'
        'echo "NVIDIA T4, 7.5, 15360 MiB, 550.54.15"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(info, "NVIDIA_SMI", str(program))
    assert gathered(capsys)["cuda_devices"][1] == {
        "name": "NVIDIA T4",
        "compute_cap": "7.5",
        "memory.total": "15360 MiB",
        "driver_version": "550.54.15",
    }
    assert main(["info"]) == 0
    assert "NVIDIA H100 80GB HBM3, 9.0, 81559 MiB, 550.54.15" in capsys.readouterr().out
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gathered(capsys)["cuda_devices"] == []
    monkeypatch.setattr(info, "NVIDIA_SMI", str(tmp_path / "no such program"))
    assert main(["info"]) == 0
    assert re.search(r"^CUDA devices +none found$", capsys.readouterr().out, re.M)


def test_no_threading_layer(capsys, monkeypatch):
    def none():
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setattr(numba, "threading_layer", none)
    assert main(["info"]) == 0
    assert re.search(r"^threading layer +none can start$", capsys.readouterr().out, re.M)


def test_import_is_cheap():
    code = (
        "import sys, numbabn.cli as cli; cli.main(['info', '--json', '-']);"
        "sys.exit(bool({'matplotlib', 'rich', 'sklearn', 'threadpoolctl'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["info", "--yaml"], "unrecognized arguments: --yaml"),
        (["info", "--json", "no/such/folder.json"], "the folder of 'no/such/folder.json' does not"),
    ],
)
def test_wrong_use_takes_one_line(capsys, argv, message):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("numbabn: ")
    assert message in err


def test_a_file_that_cannot_be_written_takes_one_line(capsys, monkeypatch, tmp_path):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 1
    assert capsys.readouterr().err == "numbabn: [Errno 28] No space left on device\n"


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"numbabn {numbabn.__version__}\n"
