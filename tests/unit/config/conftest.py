"""A host of the test's own: its config directory, its run directory, nothing of this machine's."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from config import load

Write = Callable[[str, str], Path]


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory with etc/ (config) and run/ that the config package reads in this test."""
    (tmp_path / "etc/config.d").mkdir(parents=True)
    monkeypatch.setenv("CASEMATE_CONFIG_DIR", str(tmp_path / "etc"))
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("CASEMATE_IMAGE_DIR", raising=False)
    monkeypatch.setattr(load, "unreported", [])
    return tmp_path


@pytest.fixture
def write(host: Path) -> Write:
    """Writes a config file by its path below etc/; old enough to be cached at once."""

    def write(name: str, text: str) -> Path:
        path = host / "etc" / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the config files had been written a while ago: their change time cannot be set."""
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 10_000_000_000)


@pytest.fixture
def as_nobody() -> "Callable[[Path], None]":
    """Gives a file to another user."""

    def give(path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(path, 65534, 65534)

    return give
