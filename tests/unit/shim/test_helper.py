"""Processes that the shim starts: what they are given, how their end is noticed, who reaps whom."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rpc.errors import Unavailable
from shim.helper import Helper, Watched, in_thread, reap_orphans, spawn, tail
from tests.unit.rpc.wires import run


def shell(script: str, **options: object) -> Helper:
    return spawn("test", ["/bin/sh", "-c", script], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("script", "status", "how"),
    [
        ("exit 0", 0, "exit status 0"),
        ("exit 42", 42, "exit status 42"),
        ("exit 255", 255, "exit status 255"),
        ("kill -9 $$", 137, "killed by signal 9"),
        ("kill -11 $$", 139, "killed by signal 11"),
    ],
)
def test_the_end_of_a_child_is_an_event(script: str, status: int, how: str) -> None:
    async def life() -> None:
        process = shell(script)
        await process.exited.wait()
        assert process.status == status
        assert process.how() == how
        with pytest.raises(ChildProcessError):
            reap(process.pid)

    run(life())


def ended_child(status: int) -> int:
    """The pid of a zombie of ours."""
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"exit {status}"], os.environ)
    until_zombie(pid)
    return pid


def until_zombie(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def reap(pid: int) -> None:
    os.waitpid(pid, 0)


def test_a_child_that_ended_before_it_was_watched_is_reaped_too() -> None:
    async def life() -> None:
        pid = ended_child(3)
        process = Helper("test", pid)
        await process.exited.wait()
        assert process.status == 3

    run(life())


def test_a_process_that_is_gone_has_exited() -> None:
    async def life() -> None:
        pid = ended_child(0)
        reap(pid)
        process = Watched("test", pid)
        assert process.exited.is_set()
        process.kill()
        assert process.host_pid(-1) == 0

    run(life())


def test_somebody_elses_child_is_watched_and_left_to_its_parent() -> None:
    """QEMU: libvirt's child, or nobody's."""
    parent = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 1000 & echo $!; wait; read line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())

    async def life() -> None:
        process = Watched("test", pid)
        assert not process.exited.is_set()
        await process.end()

    run(life())
    parent.communicate(b"\n")
    assert parent.returncode == 0


def test_a_process_is_shown_as_the_host_counts_it() -> None:
    async def life() -> None:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        process = shell("read line; exec sleep 1000")
        assert process.host_pid(proc) in (process.pid, 0)
        await process.end()
        assert process.host_pid(proc) == 0
        os.close(proc)

    run(life())


def test_a_killed_child_is_gone_when_end_returns() -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        process = shell("trap '' TERM INT; exec sleep 1000")
        await process.end()
        assert process.status == 137
        process.kill()
        await process.end()
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


def test_what_a_child_says_is_in_its_log(tmp_path: Path) -> None:
    async def life() -> None:
        log = tmp_path / "log"
        process = shell("cat; echo out; echo err >&2", log=str(log))
        await process.exited.wait()
        assert log.read_text() == "out\nerr\n"
        assert process.words() == "out\nerr"
        assert log.stat().st_mode & 0o777 == 0o600

    run(life())


def test_a_child_without_a_log_writes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    async def life() -> None:
        process = shell("echo out; echo err >&2")
        await process.exited.wait()
        assert process.words() == ""

    run(life())
    assert capfd.readouterr() == ("", "")


def test_descriptors_are_handed_over_by_number(tmp_path: Path) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        pairs = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        # Numbers of ours that are the child's other numbers: a naive dup2 would overwrite them.
        fds = {3: pairs[1][1], 4: pairs[0][1], 5: pairs[2][1]}
        process = shell("echo three >&3; echo four >&4; echo five >&5", fds=fds)
        await process.exited.wait()
        assert [os.read(read, 10) for read, _ in pairs] == [b"four\n", b"three\n", b"five\n"]
        for fd in (fd for pair in pairs for fd in pair):
            os.close(fd)
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


def test_descriptors_may_be_handed_over_crosswise() -> None:
    """The child's numbers are ours, the other way round: a naive dup2 would lose one of them."""

    async def life() -> None:
        (read_a, a), (read_b, b) = (os.pipe2(os.O_CLOEXEC) for _ in range(2))
        code = f"import os; os.write({a}, b'to a'); os.write({b}, b'to b')"
        process = spawn("test", [sys.executable, "-ISc", code], fds={a: b, b: a})
        await process.exited.wait()
        assert process.status == 0
        assert (os.read(read_b, 10), os.read(read_a, 10)) == (b"to a", b"to b")
        same = spawn("test", [sys.executable, "-ISc", f"import os; os.write({a}, b'x')"], fds={a: a})
        await same.exited.wait()
        assert same.status == 0
        for fd in (read_a, a, read_b, b):
            os.close(fd)

    run(life())


def test_nothing_else_of_ours_is_handed_over(tmp_path: Path) -> None:
    async def life() -> None:
        kept = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        # what whoever started the tests left open for all
        inherited = {int(fd) for fd in os.listdir("/proc/self/fd") if _is_inheritable(int(fd))}
        log = tmp_path / "log"
        process = shell("ls /proc/self/fd", fds={7: kept}, log=str(log))
        await process.exited.wait()
        own = min({*range(3, 100)} - inherited - {7})  # the directory that ls reads
        assert {int(fd) for fd in log.read_text().split()} == {0, 1, 2, 7, own, *inherited}
        os.close(kept)

    run(life())


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False  # the directory that was listed


def test_signals_are_as_a_program_expects_them(tmp_path: Path) -> None:
    """Python ignores SIGPIPE; a logger or virtiofsd that inherited that would misbehave."""

    async def life() -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        log = tmp_path / "log"
        process = shell("grep -E '^Sig(Blk|Ign)' /proc/self/status", log=str(log))
        await process.exited.wait()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        fields = dict(line.split(":\t") for line in log.read_text().splitlines())
        assert int(fields["SigBlk"], 16) == 0
        assert not int(fields["SigIgn"], 16) & 1 << (signal.SIGPIPE - 1)

    run(life())


def test_the_environment_is_what_was_given(tmp_path: Path) -> None:
    async def life() -> None:
        log = tmp_path / "log"
        process = spawn("test", ["/usr/bin/env"], env={"ONLY": "this"}, log=str(log))
        await process.exited.wait()
        assert log.read_text() == "ONLY=this\n"

    run(life())


@pytest.mark.parametrize("program", ["/nowhere/program", "/etc/hostname", "/"])
def test_a_program_that_cannot_be_executed_is_named(program: str) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        read, write = os.pipe2(os.O_CLOEXEC)
        with pytest.raises(Unavailable, match=f"thing: cannot run {program}"):
            spawn("thing", [program], fds={3: read})
        os.close(read)
        os.close(write)
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


def test_the_end_of_a_log_is_bounded(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\x1b[31mred\x07\nnext\n")
    assert tail(str(log)) == "?[31mred?\nnext", "what is told of it may end on a terminal"
    log.write_bytes(b"\xff" * 100 + b"x" * 5000 + b"\nlast\n")
    assert tail(str(log)) == "x" * (2048 - 6) + "\nlast"
    assert tail(str(log), 4) == "ast"
    assert tail(str(tmp_path / "none")) == ""


def test_a_thread_gives_its_result_or_its_error() -> None:
    async def life() -> None:
        assert await in_thread(lambda: 7) == 7
        with pytest.raises(KeyError, match="NO_SUCH"):
            await in_thread(lambda: os.environ["NO_SUCH_VARIABLE"])

    run(life())


def test_a_thread_that_nobody_waits_for_any_more_disturbs_nobody() -> None:
    """It hangs in libvirt, and comes back when the one who asked is gone, or the loop itself."""
    gates = [threading.Event(), threading.Event()]
    done = [threading.Event(), threading.Event()]

    def work(number: int) -> None:
        gates[number].wait()
        done[number].set()

    async def life() -> None:
        given_up = in_thread(lambda: work(0))
        given_up.cancel()
        gates[0].set()
        await asyncio.to_thread(done[0].wait)
        await asyncio.sleep(0)
        in_thread(lambda: work(1))

    run(life())
    before = [thread for thread in threading.enumerate() if thread.daemon]
    gates[1].set()
    for thread in before:
        thread.join(5)


# reap_orphans() works on what it finds as pid 1. These are as it meets them: zombies, told apart by session.
ORPHANS = """
import os, sys, time
from shim.helper import reap_orphans

def child(new_session, orphan):
    '''A zombie of ours. orphan: its parent is gone, as a daemon's is.'''
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        if new_session:
            os.setsid()
        pid = os.fork() if orphan else 0
        if pid == 0:
            os.write(write, str(os.getpid()).encode())
            os._exit(0)
        os._exit(0)
    if orphan:
        os.waitpid(middle, 0)
    pid = int(os.read(read, 20))
    while open(f"/proc/{pid}/stat").read().rpartition(") ")[2][0] != "Z":
        time.sleep(0.001)
    return pid

pids = {
    "orphan of a session of its own": child(True, True),
    "orphan of our session": child(False, True),
    "leads its own session": child(True, False),
    "child": child(False, False),
}
reap_orphans()
for name, pid in pids.items():
    print(name, "left" if os.path.exists(f"/proc/{pid}") else "reaped", sep=": ")
"""


def test_only_orphaned_daemons_are_reaped() -> None:
    """libvirt's children are libvirt's to wait for, ours are ours."""
    if os.geteuid() != 0:
        pytest.skip("a PID namespace needs root")
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", ORPHANS]
    result = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert result.stdout.splitlines() == [
        "orphan of a session of its own: reaped",
        "orphan of our session: left",
        "leads its own session: left",
        "child: left",
    ]


HOW = """
import asyncio, os, sys
from shim.helper import Watched

async def main():
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        pid = os.fork()
        if pid == 0:
            os.write(write, str(os.getpid()).encode())
            os.execv("/bin/sleep", ["sleep", "1000"])
        os._exit(0)
    os.waitpid(middle, 0)
    orphan = Watched("QEMU", int(os.read(read, 20)))
    print(repr(orphan.how()))
    await orphan.end()
    print(orphan.how(), orphan.how(), sep="; ")

asyncio.run(main())
"""


def test_how_an_orphan_ended_is_known_once_it_has() -> None:
    if os.geteuid() != 0:
        pytest.skip("a PID namespace needs root")
    words = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", HOW]
    result = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert result.stdout.splitlines() == ["''", "killed by signal 9; killed by signal 9"]


def test_without_orphans_nothing_is_reaped() -> None:
    async def life() -> None:
        process = shell("exit 9")
        until_zombie(process.pid)
        reap_orphans()
        await process.exited.wait()
        assert process.status == 9

    asyncio.run(life())
