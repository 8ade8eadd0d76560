"""Machine code is found on disk if it is all there and what would be compiled now."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":
    pytest.skip("numba simulates a GPU", allow_module_level=True)
pytest.importorskip("cuda.core", reason="numba-cuda is not installed")
pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

import numbabn
from numbabn.cuda import compilation, disk
from numbabn.cuda.compilation import Code, Variant

VARIANT = Variant("normalize", "rows", "float32", 1)
NAME = "normalize-rows-float32-x1.sm_90.cubin"
FACTS, CODE = {"name": "kernel", "resident": 2}, b"\x7fELF\n\n machine code" * 100


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    disk._stamp.cache_clear()
    yield disk.folder()
    disk._stamp.cache_clear()


@pytest.fixture
def assembled(monkeypatch):
    """Give what has been compiled, without compiling it."""
    made = []

    def assemble(function, signature, capability, *, resident):
        made.append(resident)
        report = "64 bytes stack frame" if resident == 2 else "0 bytes stack frame"
        return Code(CODE, function.__name__, report, resident)

    monkeypatch.setattr(compilation, "assemble", assemble)
    return made


def compiled(capability=(9, 0)):
    """As in a new process."""
    return compilation.compiled.__wrapped__(VARIANT, capability)


def test_what_was_saved_is_loaded(folder):
    assert disk.load("a", 1) is None
    disk.save("a", FACTS, CODE, 1)
    assert disk.load("a", 1) == (FACTS, CODE)
    assert disk.load("b", 1) is None
    assert disk.load("a", 2) is None
    assert [*folder.iterdir()] == [folder / "a"]


def test_a_variant_is_compiled_once_for_all_processes(folder, assembled):
    first = compiled()
    assert assembled == [2, 1]
    assert (first.resident, first.name) == (1, "normalize_rows")
    assert compiled() == first
    assert assembled == [2, 1]
    assert [*folder.iterdir()] == [folder / NAME]
    compiled((8, 0))
    assert len(assembled) == 4


def test_another_process_finds_it(folder):
    code = compiled()
    program = (
        "from numbabn.cuda import compilation\n"
        "compilation.assemble = None\n"
        f"code = compilation.compiled(compilation.Variant{tuple(VARIANT)}, (9, 0))\n"
        "print(code.name, len(code.cubin), code.resident, code.spills)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ
        | {
            "NUMBA_CACHE_DIR": numba.config.CACHE_DIR,
            "PYTHONPATH": str(Path(numbabn.__file__).parents[1]),
        },
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [
        code.name, str(len(code.cubin)), str(code.resident), str(code.spills),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:40] + b"}" + content[41:],
        lambda content: content + b"\0",
    ],
    ids=["empty", "no digest", "truncated", "a bit", "the facts", "longer"],
)
def test_a_damaged_file_is_compiled_anew(folder, assembled, damage):
    code = compiled()
    path = folder / NAME
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert compiled() == code
    assert len(assembled) == 4
    assert path.read_bytes() == whole


@pytest.mark.parametrize("what", ["source", "compiler", "residents", "threads"])
def test_what_would_be_compiled_otherwise_is_compiled_anew(
    folder, assembled, monkeypatch, what, tmp_path
):
    compiled()
    if what == "source":
        monkeypatch.setattr(disk, "__file__", str(tmp_path / "disk.py"))
        (tmp_path / "planes.py").write_text("# another kernel")
    elif what == "compiler":
        monkeypatch.setattr(disk, "version", lambda name: "0")
    elif what == "residents":
        monkeypatch.setattr(compilation, "RESIDENT", (1,))
    else:
        monkeypatch.setattr(disk, "THREADS", 512)
    disk._stamp.cache_clear()
    compiled()
    assert len(assembled) > 2
    assert [each.name for each in folder.iterdir()] == [NAME]  # in the place of what was there


def test_without_a_folder_nothing_is_kept(folder, assembled, monkeypatch):
    def nowhere(function):
        raise RuntimeError("no locator available")

    monkeypatch.setattr(disk, "FunctionCache", nowhere)
    assert disk.folder() is None
    assert compiled() == compiled()
    assert len(assembled) == 4


def test_a_folder_that_becomes_read_only(folder, assembled, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert compiled() == compiled()
    assert len(assembled) == 4


def test_a_full_disk_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    disk.save("a", FACTS, CODE)
    assert [*folder.iterdir()] == []


def test_others_find_all_or_nothing(folder):
    """While many write, each load gives the whole of what one of them wrote."""
    codes = [bytes([k]) * 100_000 for k in range(8)]

    def work(k):
        disk.save("a", {"name": k}, codes[k])
        facts, code = disk.load("a")
        return code == codes[facts["name"]]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, [*range(8)] * 10))
    assert [*folder.iterdir()] == [folder / "a"]
