"""Whether the test bed takes minutes or most of an hour to build is known before it is begun."""

from argparse import Namespace
from pathlib import Path

import pytest

from images.tuned import kernel as tuned
from tests.testbed import cache, debian, kernel
from tests.testbed.__main__ import kept


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "HOME", tmp_path)
    monkeypatch.setenv("CASEMATE_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_what_is_missing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert kept(Namespace()) == 1
    said = "".join(capsys.readouterr())
    assert "not built here: toolchain, host, kernel, guests' tuned kernel;" in said


def test_what_building_has_made_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(target: Path) -> None:
        target.joinpath("made").touch()

    for kind, packages in (("toolchain", debian.TOOLCHAIN_PACKAGES), ("host", debian.furnished())):
        cache.entry(kind, debian.recipe(packages), make)
    assert debian.missing() == []
    assert kernel.missing()
    cache.entry("kernel", kernel.recipe(debian.toolchain(), kernel.FRAGMENT.read_text()), make)
    assert not kernel.missing()
    monkeypatch.setattr(tuned, "kept", lambda suite: suite == "trixie")
    assert kept(Namespace()) == 0
    monkeypatch.setattr(debian, "SUITE", "another")
    assert kept(Namespace()) == 1
