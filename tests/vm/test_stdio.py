"""Standard streams between ctr and a process in the guest: every byte, in order, with back-pressure;
terminals; whoever reads may stall or die.
"""

import contextlib
import hashlib
import os
import re
import select
import subprocess
import time

import pytest

from tests.vm import faults
from tests.vm.pods import TERMINAL_PROGRAM, Pods, every_version

MIB = 1 << 20

# Every block differs from every other, so that a lost, doubled or swapped one is seen.
WRITER = """\
import hashlib, os, sys
def block(n):
    seed = hashlib.sha256(str(n).encode()).digest()
    return (seed * 32768)[:1 << 20]
for n in range({count}):
    data = memoryview(block(n))
    while data:
        data = data[os.write({fd}, data):]
"""


def block(number: int) -> bytes:
    return (hashlib.sha256(str(number).encode()).digest() * 32768)[:MIB]


def expected(count: int) -> str:
    digest = hashlib.sha256()
    for number in range(count):
        digest.update(block(number))
    return digest.hexdigest()


@every_version
def test_stdin_arrives_whole_and_ends(pods: Pods) -> None:
    data = b"".join(block(number) for number in range(10))
    result = pods.run("sha256sum", stdin=data, timeout_s=120).ok()
    assert result.out.split()[0] == hashlib.sha256(data).hexdigest()


def test_empty_stdin_ends(pods: Pods) -> None:
    # ctr forgets to pass on an end that comes before the container has started: wait for its word
    with pods.start("sh", "-c", "echo up; cat; echo ended") as running:
        running.read_until(b"up\n", 60)
        assert running.finish(20).stdout == b"ended\n"


def test_stdin_that_nobody_reads_holds_nothing_up(pods: Pods) -> None:
    result = pods.run("true", stdin=b"x" * (4 * MIB))
    assert result.code == 0, result


@pytest.mark.timeout(400)
def test_a_hundred_mebibytes_of_output_are_exact(pods: Pods) -> None:
    result = pods.run("python3", "-c", WRITER.format(count=100, fd=1), timeout_s=300).ok()
    assert len(result.stdout) == 100 * MIB
    assert hashlib.sha256(result.stdout).hexdigest() == expected(100)
    assert result.stderr == b""


def test_stderr_is_a_stream_of_its_own(pods: Pods) -> None:
    script = WRITER.format(count=2, fd=1) + WRITER.format(count=3, fd=2)
    result = pods.run("python3", "-c", script).ok()
    assert hashlib.sha256(result.stdout).hexdigest() == expected(2)
    assert hashlib.sha256(result.stderr).hexdigest() == expected(3)


def test_the_last_bytes_before_the_exit_are_not_lost(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        for number in range(20):
            result = pods.exec(
                name, "sh", "-c", f"head -c 100000 /dev/zero; printf end-{number}; exit {number}"
            )
            assert result.code == number
            assert len(result.stdout) == 100000 + len(f"end-{number}"), result
            assert result.out.endswith(f"end-{number}")


@pytest.mark.timeout(900)
def test_no_output_is_lost_on_a_busy_host(pods: Pods) -> None:
    """Which has more to calculate than processors: the exit is told while output is on its way yet."""
    with pods.detached("sleep", "1000") as name, contextlib.ExitStack() as undo:
        for _ in range(2 * (os.cpu_count() or 1)):
            busy = undo.enter_context(subprocess.Popen(["sh", "-c", "while :; do :; done"]))
            undo.callback(busy.kill)
        for _ in range(2):
            result = pods.exec(name, "python3", "-c", WRITER.format(count=2, fd=1), timeout_s=400).ok()
            assert len(result.stdout) == 2 * MIB
            assert hashlib.sha256(result.stdout).hexdigest() == expected(2)


def test_output_arrives_while_the_program_runs(pods: Pods) -> None:
    with pods.start("sh", "-c", "echo asked; read answer; echo got $answer") as running:
        running.read_until(b"asked\n", 30)
        running.write(b"this\n")
        running.read_until(b"got this\n", 30)
        assert running.finish(20).code == 0


@every_version
def test_a_terminal_has_a_size_and_changes_it(pods: Pods) -> None:
    with pods.terminal("python3", "-c", TERMINAL_PROGRAM, columns=101, rows=33) as terminal:
        terminal.expect(rb"isatty True True True", 60)
        terminal.expect(rb"size=101x33", 30)
        terminal.resize_until(77, 22, rb"size=77x22", 30)
        terminal.write(b"words\r")
        terminal.expect(rb"echo=words", 30)
        terminal.write(b"quit\r")
        code, _ = terminal.finish(20)
    assert code == 7


def test_a_terminal_turns_ctrl_c_into_a_signal(pods: Pods) -> None:
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 1; done"
    with pods.terminal("sh", "-c", script) as terminal:
        terminal.expect(rb"ready", 60)
        terminal.write(b"\x03")
        terminal.expect(rb"caught", 30)
        assert terminal.finish(20)[0] == 3


def test_a_terminal_carries_much_output(pods: Pods) -> None:
    # The program waits before it ends: `ctr run --tty` itself loses what comes last (with runc more often)
    with pods.terminal("sh", "-c", "echo begin; seq 1 20000; echo end; read key") as terminal:
        terminal.expect(rb"begin\r+\n", 60)
        output = terminal.collect(b"end", 90)
        terminal.write(b"\r")
        assert terminal.finish(20)[0] == 0
    assert [int(line) for line in output.split()] == list(range(1, 20001))


def test_a_terminals_last_bytes_before_the_exit_are_not_lost(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        for number in range(10):
            argv = ("task", "exec", "--tty", "--exec-id", f"t{number}", name)
            script = "echo begin; seq 1 5000"
            with pods.ctr.terminal(*argv, "sh", "-c", script) as terminal:
                terminal.expect(rb"begin\r+\n", 30)
                code, output = terminal.finish(60)
            assert code == 0
            assert [int(line) for line in output.split()] == list(range(1, 5001))


def test_output_to_a_log_file(pods: Pods) -> None:
    """nerdctl and ctr hand over a URI in place of FIFOs; its directories need not be there."""
    log = pods.ctr.instance.work / pods.ctr.new_id("logs") / "below" / "log.txt"
    with pods.detached("sh", "-c", "echo out; echo err >&2", options=("--log-uri", f"file://{log}")) as name:
        pods.wait_status(name, "STOPPED")
    assert sorted(log.read_text().splitlines()) == ["err", "out"]


def test_output_to_a_logging_program(pods: Pods) -> None:
    """containerd's logging binary: fd 3 is stdout, fd 4 stderr, closing fd 5 says ready; URI's arguments."""
    log = pods.ctr.instance.work / pods.ctr.new_id("log")
    text = (
        "#!/bin/sh\ntrap '' TERM\nexec 5>&-\n"
        "{ echo id=$CONTAINER_ID ns=$CONTAINER_NAMESPACE; echo args=$*; cat <&3 & cat <&4; wait; } > $2\n"
    )
    program = faults.script(pods.ctr.instance, "logger", text)
    uri = f"binary://{program}?to={log}"
    with pods.detached("sh", "-c", "echo out; echo err >&2", options=("--log-uri", uri)) as name:
        pods.wait_status(name, "STOPPED")
    lines = log.read_text().splitlines()
    assert lines[:2] == [f"id={name} ns={pods.ctr.namespace}", f"args=to {log}"]
    assert sorted(lines[2:]) == ["err", "out"]


def test_a_logging_program_is_the_hosts(pods: Pods) -> None:
    """With containerd's network (a collector on the loopback), files (journald's socket) and environment."""
    log = pods.ctr.instance.work / pods.ctr.new_id("log")
    text = (
        "#!/bin/sh\ntrap '' TERM\n"
        "{ readlink /proc/self/ns/net /proc/self/ns/mnt; env; } > $2\n"
        "exec 5>&-\ncat <&3 > /dev/null\n"
    )
    program = faults.script(pods.ctr.instance, "logger", text)
    with pods.detached("true", options=("--log-uri", f"binary://{program}?to={log}")) as name:
        pods.wait_status(name, "STOPPED")
    lines = log.read_text().splitlines()
    containerd = f"/proc/{pods.ctr.instance.containerd_pid}/ns"
    assert lines[:2] == [os.readlink(f"{containerd}/{kind}") for kind in ("net", "mnt")]
    environment = dict(line.split("=", 1) for line in lines[2:])
    assert environment["HOME"] == "/root"
    assert not {"CASEMATE_POD", "NOTIFY_SOCKET"} & set(environment)


# --- a reader that stalls or dies ---

LATE = """\
import os, time
print("up", flush=True)
while not os.path.exists("/go"):
    time.sleep(0.05)
"""
"""Before a WRITER: begins when it is told to."""
LATER = LATE + WRITER.format(count=2, fd=1) + "sys.exit(6)\n"


def wait_full(pods: Pods, name: str, timeout_s: float = 60.0) -> None:
    """Until nothing more goes into the FIFO of its output, which nobody reads. Of that nobody tells: hence a
    bounded poll."""
    (fifo,) = pods.ctr.instance.path("/run/containerd/fifo").glob(f"*/{name}-stdout")
    fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + timeout_s
        while select.select([], [fd], [], 0)[1]:
            assert time.monotonic() < deadline, f"there is room after {timeout_s} s"
            time.sleep(0.02)
    finally:
        os.close(fd)


def test_a_reader_that_stalls_holds_up_the_writer_alone(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with pods.start("python3", "-c", LATER, name=name) as running:
        running.read_until(b"up\n", 60)
        pods.exec(name, "touch", "/go").ok()
        wait_full(pods, name)  # of ctr's own pipe, too, or it would read on
        assert pods.exec(name, "echo", "here").ok().out == "here\n"
        result = running.finish(60)
    assert result.code == 6, result
    assert hashlib.sha256(result.stdout).hexdigest() == expected(2)


@every_version
def test_what_is_written_after_its_reader_has_died_is_there_for_the_next(pods: Pods) -> None:
    """A client that dies is no reason for a container to end, nor for its output to be lost."""
    name = pods.ctr.new_id()
    with pods.ctr.start(*pods.argv(name, ("python3", "-c", LATER), ())) as running:
        running.read_until(b"up\n", 60)
        running.process.kill()
        running.process.wait(10)
    try:
        assert pods.status(name) == "RUNNING"
        pods.exec(name, "touch", "/go").ok()
        wait_full(pods, name)
        assert pods.exec(name, "echo", "here").ok().out == "here\n"
        with pods.ctr.start("task", "attach", name) as running:
            result = running.finish(60)
        assert result.code == 6, result
        assert hashlib.sha256(result.stdout).hexdigest() == expected(2)
    finally:
        pods.remove(name)


def test_a_writer_that_nobody_reads_can_be_ended(pods: Pods) -> None:
    with pods.detached("python3", "-c", LATER) as name:
        pods.exec(name, "touch", "/go").ok()
        wait_full(pods, name)
        pods.kill(name).ok()
        pods.wait_status(name, "STOPPED")
        result = pods.ctr("task", "delete", name)
        assert result.code == 137 or re.search("137", result.err), result


def test_a_logging_program_that_dies_does_not_stop_the_container(pods: Pods) -> None:
    """Nobody can read on there: the log of the pod says that output is dropped."""
    program = faults.script(pods.ctr.instance, "dying", "#!/bin/sh\nexec 5>&-\nread line <&3\nexit 1\n")
    script = LATER.replace("/go", "/")
    with pods.detached("python3", "-c", script, options=("--log-uri", f"binary://{program}")) as name:
        pods.wait_status(name, "STOPPED")
        assert "output is dropped" in pods.paths(name).log.read_text()
        result = pods.ctr("task", "delete", name)
        assert result.code == 6 or re.search(r"status 6|exit.*6", result.err), result
