"""What the kernel says of a process, and how an error of the kernel's is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim import system


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["/bin/sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def test_a_start_time_stays_and_is_no_one_elses(child: subprocess.Popen[bytes]) -> None:
    assert system.start_time(child.pid) == system.start_time(child.pid)
    assert system.start_time(child.pid) >= system.start_time("self")
    assert system.start_time("self") == system.start_time(os.getpid())


def test_a_start_time_is_read_past_any_name(tmp_path: Path) -> None:
    """The name of a program comes before it in the line, and may be anything."""
    program = tmp_path / ") R 1 ("
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([program, "1000"])
    try:
        assert system.start_time(process.pid) >= system.start_time("self")
    finally:
        process.kill()
        process.wait()


def test_a_process_is_opened_if_it_is_the_one_that_is_meant(child: subprocess.Popen[bytes]) -> None:
    started = system.start_time(child.pid)
    assert system.open_process(child.pid, started + 1) is None
    fd = system.open_process(child.pid, started)
    assert fd is not None
    system.kill_process(fd, signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    system.kill_process(fd)  # gone is what was wanted
    os.close(fd)
    assert system.open_process(child.pid, started) is None


def test_pids_are_the_hosts(child: subprocess.Popen[bytes]) -> None:
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    assert system.host_pid(proc) == os.getpid()
    fd = os.pidfd_open(child.pid)
    assert system.host_pid_of(fd, proc) == child.pid
    child.kill()
    child.wait()
    assert system.host_pid_of(fd, proc) == 0
    os.close(fd)
    assert system.host_pid_of(proc, proc) == 0  # no pidfd at all
    os.close(proc)


NOBODYS_UID = 2_000_131_071
OTHERS = "import os, sys; os.setuid(int(sys.argv[1])); print(flush=True); sys.stdin.read()"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_runs_as_a_user_is_killed_and_nothing_else() -> None:
    argv = [sys.executable, "-ISc", OTHERS]
    users = [NOBODYS_UID, NOBODYS_UID, NOBODYS_UID - 1]
    started = [
        subprocess.Popen([*argv, str(user)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for user in users
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    system.kill_processes_of(NOBODYS_UID)
    for process in started:
        process.communicate()
    assert [process.returncode for process in started] == [-signal.SIGKILL, -signal.SIGKILL, 0]


def test_a_thread_can_be_named() -> None:
    names: list[str] = []

    def name() -> None:
        system.set_process_name("casemate-a-name-too-long")
        names.append(Path("/proc/thread-self/comm").read_text().strip())

    thread = threading.Thread(target=name)
    thread.start()
    thread.join()
    assert names == ["casemate-a-name"]


@pytest.mark.parametrize(
    "call",
    [
        lambda: system.mount("none", "/nowhere/at/all", "tmpfs"),
        lambda: system.umount("/nowhere/at/all"),
    ],
)
def test_an_error_names_the_path(call: object) -> None:
    assert callable(call)
    with pytest.raises(OSError, match="/nowhere/at/all"):
        call()


def test_an_error_names_the_call() -> None:
    with pytest.raises(OSError, match="unshare"):
        system.unshare(1)
    with open("/dev/null") as file, pytest.raises(OSError, match="setns"):
        system.setns(file.fileno(), system.CLONE_NEWNET)


def test_unlinking_what_is_gone_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    system.unlink_if_there(tmp_path / "x")
    system.unlink_if_there(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert system.is_no_space(OSError(28, "No space left on device"))
    assert system.is_no_space(OSError(122, "Disk quota exceeded"))
    assert not system.is_no_space(OSError(5, "Input/output error"))


def test_who_keeps_little_memory_gets_no_huge_pages_unasked_nor_do_its_children() -> None:
    """prctl(2) answers what was set: 1, or 3 where programs may still ask (Linux 6.18)."""
    ask = "import ctypes; print(ctypes.CDLL(None).prctl(42, 0, 0, 0, 0), flush=True)"  # PR_GET_THP_DISABLE
    code = f"{ask}\nimport os, sys; from shim import system\nsystem.keep_little_memory()\n{ask}\n"
    code += f"os.execv(sys.executable, [sys.executable, '-c', {ask!r}])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, *after = said.split()
    assert before == "0"
    assert after in (["1", "1"], ["3", "3"])
