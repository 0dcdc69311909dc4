"""What install made, uninstall takes away: in reverse, without touching what became somebody else's."""

import socket
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

from scripts.manifest import Item, Kind, Manifest, running_daemon, start_time, stop_daemon


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return Manifest(path=tmp_path / "state/install.json")


def test_what_is_recorded_is_read_back(manifest: Manifest, tmp_path: Path) -> None:
    manifest.prefix, manifest.stamp = "/opt/casemate", "abc"
    manifest.record(Kind.TREE, tmp_path / "a")
    manifest.record(Kind.FILE, tmp_path / "b", "digest")
    again = Manifest.read(manifest.path)
    assert again == manifest
    assert again.holds(Kind.TREE, tmp_path / "a")
    assert not again.holds(Kind.FILE, tmp_path / "a")


def test_recording_twice_keeps_the_first_place_and_the_last_detail(manifest: Manifest) -> None:
    manifest.record(Kind.FILE, "/x", "old")
    manifest.record(Kind.TREE, "/y")
    manifest.record(Kind.FILE, "/x", "new")
    assert manifest.items == [Item(Kind.FILE, "/x", "new"), Item(Kind.TREE, "/y")]


def test_undo_takes_away_last_first(manifest: Manifest, tmp_path: Path) -> None:
    outer, inner = tmp_path / "etc", tmp_path / "etc/config.d"
    for directory in (outer, inner):
        manifest.record(Kind.DIRECTORY, directory)
        directory.mkdir()
    assert manifest.undo() == []
    assert not outer.exists()
    assert Manifest.read(manifest.path).items == []


def test_undo_of_what_was_never_made_is_no_error(manifest: Manifest, tmp_path: Path) -> None:
    for kind in (Kind.TREE, Kind.FILE, Kind.DIRECTORY, Kind.DAEMON, Kind.SERVICE):
        manifest.record(kind, tmp_path / kind)
    manifest.record(Kind.USER, "casemate-no-such-user", "dpkg")
    manifest.record(Kind.CONTAINERD_IMAGE, "localhost/none:latest", str(tmp_path / "no.sock"))
    assert manifest.undo() == []


def test_a_file_that_somebody_changed_is_kept(manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "casemate"
    manifest.record(Kind.FILE, path, sha256(b"ours").hexdigest())
    path.write_text("theirs")
    assert manifest.undo() == []
    assert path.read_text() == "theirs"


def test_a_service_is_stopped_before_its_file_goes(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a systemctl that writes down what it is asked, and whether the file is there then."""
    unit, told = tmp_path / "casemated.service", tmp_path / "told"
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f'#!/bin/sh\necho "$@" $(ls {unit}) >> {told}\n')
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    unit.write_text("ours")
    manifest.record(Kind.SERVICE, unit, sha256(b"ours").hexdigest())
    assert manifest.undo() == []
    assert told.read_text() == f"disable --quiet --now casemated.service {unit}\ndaemon-reload\n"
    assert not unit.exists()


def test_an_operators_file_keeps_its_directory(manifest: Manifest, tmp_path: Path) -> None:
    manifest.record(Kind.DIRECTORY, tmp_path / "etc")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/site.toml").touch()
    assert manifest.undo() == []
    assert (tmp_path / "etc/site.toml").exists()


def test_a_tree_with_a_mount_below_it_is_refused_and_stays_recorded(manifest: Manifest) -> None:
    manifest.record(Kind.TREE, "/sys/fs")  # where every Linux mounts its cgroups
    (failure,) = manifest.undo()
    assert "mounted" in str(failure)
    assert manifest.holds(Kind.TREE, "/sys/fs")


def test_a_shared_tree_stays_while_somebody_listens_in_it(manifest: Manifest, tmp_path: Path) -> None:
    tree = tmp_path / "run"
    tree.mkdir()
    manifest.record(Kind.SHARED_TREE, tree)
    with socket.socket(socket.AF_UNIX) as somebody:
        somebody.bind(str(tree / "sock"))
        somebody.listen()
        assert manifest.undo() == []
        assert tree.exists()
    manifest.record(Kind.SHARED_TREE, tree)
    assert manifest.undo() == []  # the socket is still there, and nobody behind it
    assert not tree.exists()


@pytest.mark.parametrize("path", ["/", "/usr", "/etc", "/opt", "relative/path", "/var/lib"])
def test_a_tree_that_cannot_be_ours_is_refused(manifest: Manifest, path: str) -> None:
    manifest.record(Kind.TREE, path)
    (failure,) = manifest.undo()
    assert "not ours" in str(failure)


def test_a_daemon_is_stopped_only_if_it_is_that_very_process(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    with subprocess.Popen(["sleep", "1000"]) as process:
        pid_file.write_text(f"{process.pid} 1\n")  # the same pid, another start: some other process by now
        assert running_daemon(pid_file) is None
        assert not stop_daemon(pid_file)
        assert process.poll() is None
        pid_file.write_text(f"{process.pid} {start_time(process.pid)}\n")
        assert running_daemon(pid_file) == process.pid
        assert stop_daemon(pid_file)
        assert process.wait() == -15
    assert not pid_file.exists()
