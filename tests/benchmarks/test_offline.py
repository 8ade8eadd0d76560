"""The dashboard's page is rewritten to what lies beside it."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "offline.py"


@pytest.fixture(scope="module")
def offline():
    spec = importlib.util.spec_from_file_location("offline", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_library_of_asvs_page_is_known(offline):
    asv = pytest.importorskip("asv")
    page = (Path(asv.__file__).parent / "www" / "index.html").read_text(encoding="utf-8")
    assert "<script src=" in offline.REMOTE.sub(offline.local, page)
    assert 'src="https:' not in offline.REMOTE.sub(offline.local, page)
    assert 'integrity="' not in offline.REMOTE.sub(offline.local, page)


def test_an_unknown_library_is_named(offline):
    with pytest.raises(SystemExit, match=r"asv's page asks for new\.js"):
        offline.REMOTE.sub(offline.local, '<script src="https://example.org/v1/new.js"></script>')


def test_without_a_dashboard(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "HTML", tmp_path)
    with pytest.raises(SystemExit, match="run asv publish first"):
        offline.main()
