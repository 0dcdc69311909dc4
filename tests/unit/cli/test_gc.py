"""`casemate gc`: what a dead shim left is gone afterwards, what lives is untouched."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from shim.journal import Entry, Journal, Kind
from shim.paths import PodPaths
from tests.unit.cli.conftest import Casemate, Host, Shim

NewShim = Callable[[], Shim]


def dead_pod(host: Path, pods: Host, shim: Shim, name: str = "web") -> tuple[Path, Path]:
    """A pod with a socket and a journal whose shim was killed. Returns its directory and its socket."""
    directory = pods.pod("default", name, shim)
    address = host / f"{name}.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
    journal = Journal(directory / "journal.jsonl")
    journal.add(Entry(Kind.SOCKET, str(address)))
    journal.add(Entry(Kind.PROCESS, str(shim.pid), shim.start_time))
    journal.close()
    (directory / "shared").mkdir()
    (directory / "trace.json").write_text('{"spans": []}')
    shim.end()
    return directory, address


def test_nothing_to_do_is_said(casemate: Casemate) -> None:
    result = casemate("gc")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing to clean up" in result.stderr


def test_a_dead_pod_is_cleaned_and_its_records_kept(
    casemate: Casemate, host: Path, pods: Host, new_shim: NewShim
) -> None:
    directory, address = dead_pod(host, pods, new_shim())
    result = casemate("gc")
    assert result.exit_code == 0
    assert "cleaned default/web" in result.stdout
    assert "nothing to clean up" not in result.stderr
    assert f"socket {address}" in result.stdout
    assert not directory.exists()
    assert not address.exists()
    ended = PodPaths("default", "web").ended
    assert json.loads((ended / "state.json").read_text())["state"] == "ended"
    assert (ended / "trace.json").exists()
    # and again: there is nothing left
    assert "nothing to clean up" in casemate("gc").stderr


def test_dry_run_says_the_same_and_does_nothing(
    casemate: Casemate, host: Path, pods: Host, new_shim: NewShim
) -> None:
    directory, address = dead_pod(host, pods, new_shim())
    (planned,) = json.loads(casemate("gc", "--dry-run", "--json").stdout)["cleaned"]
    assert directory.exists()
    assert address.exists()
    assert "would clean default/web" in casemate("gc", "-n").stdout
    (done,) = json.loads(casemate("gc", "--json").stdout)["cleaned"]
    assert planned == done


def test_pods_with_a_shim_are_not_touched(
    casemate: Casemate, host: Path, pods: Host, new_shim: NewShim
) -> None:
    dead_pod(host, pods, new_shim(), "dead")
    alive = pods.pod("default", "alive", new_shim())
    assert casemate("gc").exit_code == 0
    assert [path.name for path in (host / "run/pods").iterdir()] == [alive.name]


def test_a_pod_that_is_just_being_started_is_not_touched(
    casemate: Casemate, host: Path, new_shim: NewShim
) -> None:
    """`start` makes the directory, then the journal with its socket; the shim adds itself, then a state."""
    fresh, bound, journalled = (host / "run/pods" / name for name in ("fresh", "bound", "journalled"))
    shim, address = new_shim(), host / "bound.sock"
    address.touch()
    entries = {
        fresh: [],
        bound: [Entry(Kind.SOCKET, str(address))],
        journalled: [
            Entry(Kind.SOCKET, str(host / "other.sock")),
            Entry(Kind.PROCESS, str(shim.pid), shim.start_time),
        ],
    }
    for directory, written in entries.items():
        directory.mkdir(parents=True)
        if written:
            journal = Journal(directory / "journal.jsonl")
            for entry in written:
                journal.add(entry)
            journal.close()
    assert json.loads(casemate("gc", "--json").stdout)["cleaned"] == []
    assert all(directory.exists() for directory in entries)
    assert address.exists()
    shim.end()
    for directory in (fresh, bound):  # whoever made them has been killed
        os.utime(directory, (1, 1))
    cleaned = json.loads(casemate("gc", "--json").stdout)["cleaned"]
    assert sorted(pod["key"] for pod in cleaned) == ["bound", "fresh", "journalled"]
    assert not any(directory.exists() for directory in entries)
    assert not address.exists()


def test_a_pod_without_a_name_is_shown_by_its_key(casemate: Casemate, host: Path) -> None:
    nameless = host / "run/pods/0123456789abcdef"
    nameless.mkdir(parents=True)
    os.utime(nameless, (1, 1))
    assert "cleaned 0123456789abcdef" in casemate("gc").stdout


def test_one_that_fails_does_not_keep_the_others(
    casemate: Casemate, host: Path, pods: Host, new_shim: NewShim
) -> None:
    damaged, _ = dead_pod(host, pods, new_shim(), "damaged")
    (damaged / "journal.jsonl").write_text("not a journal\n")
    other, _ = dead_pod(host, pods, new_shim(), "other")
    result = casemate("gc")
    assert result.exit_code == 1
    assert "default/damaged" in result.stderr
    assert "line 1 cannot be read" in result.stderr
    assert damaged.exists()
    assert not other.exists()


def test_old_records_go_beyond_what_the_config_keeps(casemate: Casemate, host: Path, pods: Host) -> None:
    (host / "etc/config.toml").write_text("traces_kept = 2\n")
    for number in range(4):
        pods.pod("default", f"pod-{number}", ended=True, created_at=float(number))
    planned = json.loads(casemate("gc", "-n", "--json").stdout)["removed"]
    result = casemate("gc")
    assert "removed the records of 2 ended pods" in result.stdout
    assert "nothing to clean up" not in result.stderr
    left = {PodPaths("default", f"pod-{number}").ended for number in (2, 3)}
    assert set((host / "run/ended").iterdir()) == left
    assert set(map(Path, planned)) == {PodPaths("default", f"pod-{number}").ended for number in (0, 1)}


def test_a_mistake_in_the_config_keeps_records_but_cleans_pods(
    casemate: Casemate, host: Path, pods: Host, new_shim: NewShim
) -> None:
    (host / "etc/config.toml").write_text("traces_kep = 2\n")
    directory, _ = dead_pod(host, pods, new_shim())
    pods.pod("default", "old", ended=True)
    result = casemate("gc")
    assert result.exit_code == 1
    assert "unknown key traces_kep" in result.stderr
    assert not directory.exists()
    assert len(list((host / "run/ended").iterdir())) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_a_mount_that_was_left_is_taken_away_with_its_directory(
    casemate: Casemate, host: Path, pods: Host, new_shim: NewShim
) -> None:
    from shim import system

    directory, _ = dead_pod(host, pods, new_shim())
    system.mount("none", str(directory / "shared"), "tmpfs")
    (planned,) = json.loads(casemate("gc", "-n", "--json").stdout)["cleaned"]
    assert planned["undone"][-1] == f"directory {directory}"
    (done,) = json.loads(casemate("gc", "--json").stdout)["cleaned"]
    assert planned == done
    assert str(directory) not in Path("/proc/self/mounts").read_text()
