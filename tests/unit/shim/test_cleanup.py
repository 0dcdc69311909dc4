"""Cleaning up after a shim, from its journal alone: real processes, real sockets, more than one cleaner."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc.errors import DataLoss, FailedPrecondition
from shim import cleanup, system
from shim.cleanup import clean_pod, prune, remove_tree, retire
from shim.journal import Entry, Journal, Kind
from shim.paths import PodPaths


@pytest.fixture
def paths(tmp_path: Path) -> PodPaths:
    """A pod's directory as its shim made it."""
    paths = PodPaths("default", "web", tmp_path)
    paths.directory.mkdir(parents=True)
    return paths


class Shim:
    """A process that means to stay."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-ISc",
                "import signal; signal.signal(15, 1); print(flush=True); signal.pause()",
            ],
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.pid = self.process.pid

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def shim() -> Iterator[Shim]:
    shim = Shim()
    yield shim
    shim.close()


def write(paths: PodPaths, *entries: Entry) -> None:
    journal = Journal(paths.journal)
    for entry in entries:
        journal.add(entry)
    journal.close()


def entry_of(shim: Shim) -> Entry:
    return Entry(Kind.PROCESS, str(shim.pid), system.start_time(shim.pid))


def test_everything_of_a_pod_goes_newest_first(paths: PodPaths, shim: Shim, tmp_path: Path) -> None:
    address = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
    write(paths, Entry(Kind.SOCKET, str(address)), entry_of(shim))
    assert clean_pod(paths) == [f"process {shim.pid}", f"socket {address}", f"directory {paths.directory}"]
    assert shim.process.wait() == -9
    assert not address.exists()
    assert not paths.directory.exists()


def test_processes_go_first_and_then_the_cgroup_that_they_were_in(
    paths: PodPaths, shim: Shim, tmp_path: Path
) -> None:
    (tmp_path / "casemate-0").mkdir()
    write(paths, entry_of(shim), Entry(Kind.CGROUP, str(tmp_path / "casemate-0")))
    assert clean_pod(paths)[:2] == [f"process {shim.pid}", f"cgroup {tmp_path / 'casemate-0'}"]
    assert not (tmp_path / "casemate-0").exists()


def test_a_cgroup_that_was_never_made_or_is_gone_is_no_work(paths: PodPaths, tmp_path: Path) -> None:
    write(paths, Entry(Kind.CGROUP, str(tmp_path / "casemate-0")))
    assert clean_pod(paths) == [f"directory {paths.directory}"]


def test_a_cgroup_in_use_is_an_error_and_the_records_stay(paths: PodPaths, tmp_path: Path) -> None:
    """A directory that is not empty stands for one with a process, which rmdir(2) refuses alike."""
    (tmp_path / "casemate-0/x").mkdir(parents=True)
    write(paths, Entry(Kind.CGROUP, str(tmp_path / "casemate-0")))
    with pytest.raises(FailedPrecondition, match=r"casemate-0 still has processes"):
        clean_pod(paths)
    assert paths.journal.exists()


def test_a_second_time_finds_nothing_to_do(paths: PodPaths, shim: Shim, tmp_path: Path) -> None:
    write(paths, Entry(Kind.SOCKET, str(tmp_path / "s")), entry_of(shim))
    clean_pod(paths)
    assert clean_pod(paths) == []


def test_a_process_that_got_the_pid_since_is_left_alone(paths: PodPaths, shim: Shim) -> None:
    write(paths, Entry(Kind.PROCESS, str(shim.pid), system.start_time(shim.pid) - 1))
    assert clean_pod(paths) == [f"directory {paths.directory}"]
    assert shim.process.poll() is None


def test_a_process_that_is_gone_is_no_work(paths: PodPaths, shim: Shim) -> None:
    write(paths, entry_of(shim))
    shim.close()
    assert clean_pod(paths) == [f"directory {paths.directory}"]


def test_a_zombie_is_no_obstacle(paths: PodPaths, shim: Shim) -> None:
    write(paths, entry_of(shim))
    shim.process.kill()
    os.waitid(os.P_PID, shim.pid, os.WEXITED | os.WNOWAIT)
    assert paths.directory.exists()
    clean_pod(paths)
    assert not paths.directory.exists()


def test_a_process_that_survives_is_an_error_and_the_records_stay(
    paths: PodPaths, shim: Shim, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that hangs in the kernel; here the signal is kept from it."""
    monkeypatch.setattr(system, "kill_process", lambda pidfd: None)
    monkeypatch.setattr(cleanup, "KILL_TIMEOUT_S", 0.05)
    write(paths, entry_of(shim))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FailedPrecondition, match=f"process {shim.pid} did not end") as caught:
        clean_pod(paths)
    assert f"/proc/{shim.pid}/stack" in (caught.value.hint or "")
    assert paths.journal.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_half_a_line_was_never_acted_upon(paths: PodPaths, shim: Shim) -> None:
    write(paths, entry_of(shim))
    with paths.journal.open("a") as file:
        file.write('{"kind": "process", "value": "1", "star')
    clean_pod(paths)
    assert shim.process.wait() == -9


def test_what_is_not_understood_is_reported_before_anything_is_touched(paths: PodPaths, shim: Shim) -> None:
    write(paths, entry_of(shim))
    with paths.journal.open("a") as file:
        file.write('{"kind": "tap", "value": "cm0", "started": 0}\n')
    with pytest.raises(DataLoss, match="line 2"):
        clean_pod(paths)
    assert shim.process.poll() is None
    assert paths.directory.exists()


@pytest.mark.parametrize("pid", ["-1", "0", "x", "99999999999999999999"])
def test_a_pid_that_is_none_kills_nobody(paths: PodPaths, pid: str) -> None:
    write(paths, Entry(Kind.PROCESS, pid, 1))
    try:
        undone = clean_pod(paths)
    except DataLoss:
        return
    assert undone == [f"directory {paths.directory}"]


def test_without_a_journal_the_directory_still_goes(paths: PodPaths) -> None:
    assert clean_pod(paths) == [f"directory {paths.directory}"]


def test_without_a_directory_there_is_nothing(tmp_path: Path) -> None:
    assert clean_pod(PodPaths("default", "never", tmp_path)) == []


def test_the_records_of_a_pod_are_kept(paths: PodPaths) -> None:
    paths.state.write_text(json.dumps({"state": "running", "id": "web"}))
    paths.trace.write_text("{}")
    paths.console.write_text("Linux boots")
    paths.log.write_text("started")
    (paths.directory / "virtiofsd.log").touch()
    clean_pod(paths)
    assert sorted(path.name for path in paths.ended.iterdir()) == [
        "console.log",
        "shim.log",
        "state.json",
        "trace.json",
    ]
    assert json.loads((paths.ended / "state.json").read_text()) == {"state": "ended", "id": "web"}
    assert (paths.ended / "console.log").read_text() == "Linux boots"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\udcff"])
def test_a_damaged_state_is_kept_as_it_is(paths: PodPaths, text: str) -> None:
    paths.state.write_text(text, errors="surrogateescape")
    clean_pod(paths)
    assert not paths.directory.exists()
    assert (paths.ended / "state.json").exists()


def test_only_so_many_ended_pods_are_kept(tmp_path: Path) -> None:
    for number in range(5):
        paths = PodPaths("default", f"pod {number}", tmp_path)
        paths.directory.mkdir(parents=True)
        paths.log.touch()
        retire(paths, 3)
        os.utime(paths.ended, ns=(number, number))
    kept = {path.name for path in (tmp_path / "ended").iterdir()}
    assert kept == {PodPaths("default", f"pod {number}").key for number in (2, 3, 4)}
    assert len(prune(tmp_path / "ended", 1)) == 2
    assert prune(tmp_path / "ended", 1) == []
    assert prune(tmp_path / "nowhere", 1) == []


def test_a_full_disk_costs_the_records_and_nothing_else(
    paths: PodPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: object, __: object) -> None:
        raise OSError(28, "No space left on device")

    paths.log.touch()
    monkeypatch.setattr(os, "replace", full)
    retire(paths, 3)
    assert not paths.directory.exists()


def test_another_error_is_raised_after_the_directory_went(paths: PodPaths) -> None:
    paths.log.touch()
    paths.ended.parent.write_text("in the way")
    with pytest.raises(OSError, match="ended"):
        retire(paths, 3)
    assert not paths.directory.exists()


def test_what_was_undone_by_somebody_else_is_no_work(paths: PodPaths, tmp_path: Path) -> None:
    write(paths, Entry(Kind.CGROUP, str(tmp_path / "gone")), Entry(Kind.SOCKET, str(tmp_path / "gone")))
    assert clean_pod(paths) == [f"directory {paths.directory}"]
    remove_tree(tmp_path / "gone" / "below")


def test_containers_of_an_ended_pod_are_stopped(paths: PodPaths) -> None:
    paths.state.write_text(json.dumps({"containers": [{"id": "web", "state": "running"}, 7]}))
    clean_pod(paths)
    document = json.loads((paths.ended / "state.json").read_text())
    assert document == {"state": "ended", "containers": [{"id": "web", "state": "stopped"}, 7]}


def test_links_are_removed_and_not_followed(paths: PodPaths, tmp_path: Path) -> None:
    """A guest may have left them."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    paths.shared.mkdir(parents=True)
    (paths.shared / "link").symlink_to(outside)
    (paths.directory / "file-link").symlink_to(outside / "kept")
    os.mkfifo(paths.directory / "fifo")
    remove_tree(paths.directory)
    assert not paths.directory.exists()
    assert (outside / "kept").exists()
    remove_tree(paths.directory)


def test_a_directory_that_is_a_link_itself_is_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    link = tmp_path / "link"
    link.symlink_to(outside)
    remove_tree(link)
    assert (outside / "kept").exists()
    assert not link.is_symlink()


def test_cleaners_do_not_disturb_each_other(tmp_path: Path, shim: Shim) -> None:
    """The shim that ends, containerd's `delete` and `casemate gc`, all at once."""
    paths = PodPaths("default", "web", tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        for number in range(20):
            (paths.directory / f"d{number}").mkdir(parents=True)
            (paths.directory / f"d{number}" / "file").touch()
        paths.state.write_text('{"state": "running"}')
        write(paths, Entry(Kind.SOCKET, str(tmp_path / "s")))
        (tmp_path / "s").touch()
        errors: list[BaseException] = []
        barrier = threading.Barrier(4)

        def clean(errors: list[BaseException] = errors, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            try:
                clean_pod(paths)
            except BaseException as error:  # noqa: BLE001 - any error of any cleaner fails the test
                errors.append(error)

        cleaners = [threading.Thread(target=clean) for _ in range(4)]
        for cleaner in cleaners:
            cleaner.start()
        for cleaner in cleaners:
            cleaner.join()
        assert errors == []
        assert not paths.directory.exists()
        assert (paths.ended / "state.json").read_text() == '{"state": "ended"}'
    assert len(os.listdir("/proc/self/fd")) == before


def test_two_cleaners_can_wait_for_the_same_process(paths: PodPaths, shim: Shim) -> None:
    write(paths, entry_of(shim))
    cleaners = [threading.Thread(target=clean_pod, args=(paths,)) for _ in range(2)]
    for cleaner in cleaners:
        cleaner.start()
    for cleaner in cleaners:
        cleaner.join()
    assert shim.process.wait() == -9
    assert not paths.directory.exists()
