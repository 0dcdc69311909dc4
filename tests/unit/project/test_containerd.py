"""Starting the demo's containerd: it is ready when it says so, its early end is told in its own words, and
what was started can be stopped. The daemon here is a small program that speaks like one.
"""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition
from scripts import containerd
from scripts.manifest import Kind, Manifest, running_daemon
from scripts.venv import SYSTEM_PYTHON

READY = """\
import os, signal, socket, sys
assert open(sys.argv[2]).read().startswith("# Written by"), sys.argv
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
    manager.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
signal.pause()
"""
BROKEN = """\
import sys
sys.exit("containerd: toml: unknown key")
"""


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manifest]:
    for name, place in {
        "HOME": "home",
        "ROOT": "root",
        "PID_FILE": "home/pid",
        "LOG": "home/log",
        "ADDRESS": "run/containerd.sock",
    }.items():
        monkeypatch.setattr(containerd, name, tmp_path / place)
    monkeypatch.setattr(containerd, "executable", lambda _: tmp_path / "daemon")
    manifest = Manifest(path=tmp_path / "install.json")
    yield manifest
    assert manifest.undo() == []


def daemon(tmp_path: Path, source: str) -> None:
    (tmp_path / "daemon").write_text(f"#!{SYSTEM_PYTHON}\n{source}")
    (tmp_path / "daemon").chmod(0o755)


def test_started_when_it_says_so_and_stopped_by_uninstall(manifest: Manifest, tmp_path: Path) -> None:
    daemon(tmp_path, READY)
    containerd.start(manifest)
    assert running_daemon(containerd.PID_FILE) is not None
    assert manifest.holds(Kind.DAEMON, containerd.PID_FILE)
    assert manifest.undo() == []
    assert running_daemon(containerd.PID_FILE) is None
    assert not (tmp_path / "home").exists()
    assert not (tmp_path / "root").exists()


def test_an_early_end_is_told_in_its_own_words(manifest: Manifest, tmp_path: Path) -> None:
    daemon(tmp_path, BROKEN)
    with pytest.raises(FailedPrecondition, match="toml: unknown key"):
        containerd.start(manifest)
    assert running_daemon(containerd.PID_FILE) is None


def test_nothing_listens_at_a_socket_whose_owner_is_gone(manifest: Manifest) -> None:
    assert containerd.answers() is None
    containerd.ADDRESS.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(containerd.ADDRESS))
    assert containerd.answers() is None
