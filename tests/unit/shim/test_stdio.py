"""The host's ends of stdio on real FIFOs, files and programs: nothing lost, nothing left open."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rpc.errors import CasemateError, DeadlineExceeded, InvalidArgument, NotFound
from shim import stdio as module
from shim.record import Identity
from shim.stdio import Stdio, open_stdio
from tests.unit.rpc.wires import pass_time, run, until

PIPE_BYTES = 64 << 10


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


IDENTITY = Identity("default", "web", os.getpid(), 0, -1)


async def opened(
    stdin: object = "", stdout: object = "", stderr: object = "", *, terminal: bool = False
) -> Stdio:
    return await open_stdio(str(stdin), str(stdout), str(stderr), terminal, "web", IDENTITY)


def checked(test: Callable[[], Awaitable[None]]) -> None:
    """Runs it, and counts descriptors around it."""

    async def counted() -> None:
        await asyncio.sleep(0)
        before = descriptors()
        await test()
        assert descriptors() == before

    run(counted())


def reader(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


# --- FIFOs ---


def test_output_reaches_its_reader_and_then_its_end(fifo: Path) -> None:
    async def test() -> None:
        end = reader(fifo)
        stdio = await opened(stdout=fifo)
        assert stdio.stdout is not None
        assert stdio.stderr is None
        assert stdio.source is None
        await stdio.stdout.write(b"hello")
        await stdio.close()
        assert os.read(end, 100) == b"hello"
        assert os.read(end, 100) == b""
        os.close(end)

    checked(test)


def test_output_waits_for_a_slow_reader(fifo: Path) -> None:
    async def test() -> None:
        end = reader(fifo)
        stdio = await opened(stdout=fifo)
        assert stdio.stdout is not None
        sent = os.urandom(5 * PIPE_BYTES + 17)
        writing = asyncio.create_task(stdio.stdout.write(sent))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not writing.done()
        got = b""
        while len(got) < len(sent):
            try:
                got += os.read(end, 30_000)
            except BlockingIOError:
                await asyncio.sleep(0)
        await writing
        assert got == sent
        await stdio.close()
        os.close(end)

    checked(test)


def test_output_outlives_its_reader(fifo: Path) -> None:
    """containerd restarts: what is written meanwhile waits, and the next reader gets it."""

    async def test() -> None:
        first = reader(fifo)
        stdio = await opened(stdout=fifo)
        assert stdio.stdout is not None
        os.close(first)
        await stdio.stdout.write(b"meanwhile")
        second = reader(fifo)
        assert os.read(second, 100) == b"meanwhile"
        await stdio.close()
        assert os.read(second, 100) == b""
        os.close(second)

    checked(test)


def test_a_sink_that_is_full_can_be_given_up(fifo: Path) -> None:
    async def test() -> None:
        stdio = await opened(stdout=fifo)
        assert stdio.stdout is not None
        writing = asyncio.create_task(stdio.stdout.write(bytes(2 * PIPE_BYTES)))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
        await stdio.close()
        await stdio.close()

    checked(test)


def test_input_ends_when_it_is_closed_and_not_before(fifo: Path) -> None:
    async def test() -> None:
        stdio = await opened(stdin=fifo)
        source = stdio.source
        assert source is not None
        client = os.open(fifo, os.O_WRONLY)
        os.write(client, b"one")
        assert await source.read() == b"one"
        reading = asyncio.create_task(source.read())
        os.close(client)  # its writer is gone, and may come back
        for _ in range(20):
            await asyncio.sleep(0)
        assert not reading.done()
        client = os.open(fifo, os.O_WRONLY)
        os.write(client, b"two")
        assert await reading == b"two"
        os.close(client)
        reading = asyncio.create_task(source.read())
        await asyncio.sleep(0)
        source.close_soon()
        assert await reading == b""
        assert await source.read() == b""
        await stdio.close()

    checked(test)


def test_what_was_written_before_the_close_is_still_read(fifo: Path) -> None:
    async def test() -> None:
        stdio = await opened(stdin=fifo)
        source = stdio.source
        assert source is not None
        client = os.open(fifo, os.O_WRONLY)
        sent = os.urandom(PIPE_BYTES)
        os.write(client, sent)
        source.close_soon()
        got = b""
        while data := await source.read():
            got += data
        assert got == sent
        os.close(client)
        await stdio.close()

    checked(test)


def test_a_fifo_that_is_not_there_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        for stdin, stdout in (("x", ""), ("", "x")):
            with pytest.raises(NotFound, match="stdio: x does not exist"):
                await opened(stdin, stdout)

    checked(test)


@pytest.mark.parametrize("uri", ["tcp://host:1", "https://host/x", "binary-ish://x"])
def test_a_form_that_nobody_knows_is_refused_and_nothing_stays_open(fifo: Path, uri: str) -> None:
    async def test() -> None:
        with pytest.raises(InvalidArgument, match="not a FIFO, file:// or binary://"):
            await opened(fifo, fifo, uri)
        with pytest.raises(InvalidArgument):
            await opened(fifo, uri)

    checked(test)


def test_what_cannot_be_opened_is_an_error_of_ours(tmp_path: Path) -> None:
    """A directory, or a name below a file: the client's mistake, not a traceback."""

    async def test() -> None:
        (tmp_path / "file").touch()
        for uri in (tmp_path, tmp_path / "file/below", f"file://{tmp_path}", f"file://{tmp_path}/file/below"):
            with pytest.raises(CasemateError, match="stdio"):
                await opened(stdout=uri)

    checked(test)


def test_a_terminal_has_no_stderr(fifo: Path) -> None:
    async def test() -> None:
        stdio = await opened(fifo, fifo, "tcp://not/looked/at", terminal=True)
        assert stdio.stderr is None
        await stdio.close()

    checked(test)


# --- files ---


def test_files_are_appended_to_and_their_directories_made(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "a b" / "log"
        path.parent.mkdir()
        path.write_text("before\n")
        for uri in (f"file://{tmp_path}/a%20b/log", f"file://{tmp_path}/new/below/log"):
            stdio = await opened(stdout=uri, stderr=uri)
            assert stdio.stdout is not None
            assert stdio.stderr is not None
            await stdio.stdout.write(b"out\n")
            await stdio.stderr.write(b"err\n")
            await stdio.close()
        assert path.read_text() == "before\nout\nerr\n"
        assert (tmp_path / "new/below/log").read_text() == "out\nerr\n"

    checked(test)


# --- loggers ---

LOGGER = """#!/bin/sh
trap '' TERM
echo "$CONTAINER_NAMESPACE/$CONTAINER_ID" "$@" > {dir}/arguments
exec 5>&-
cat <&3 > {dir}/out &
exec 3<&-
cat <&4 > {dir}/err
wait
"""


@pytest.fixture
def logger(tmp_path: Path) -> Callable[[str], str]:
    """Writes a script, and says what its URI is."""

    def write(script: str) -> str:
        path = tmp_path / "logger"
        path.write_text(script.format(dir=tmp_path))
        path.chmod(0o755)
        return f"binary://{path}"

    return write


def test_a_logger_gets_both_streams_and_knows_whose_they_are(
    tmp_path: Path, logger: Callable[[str], str]
) -> None:
    async def test() -> None:
        uri = logger(LOGGER) + "?--dir=%2Fvar%2Flog&quiet="
        stdio = await opened(stdout=uri, stderr=uri)
        assert stdio.stdout is not None
        assert stdio.stderr is not None
        sent = os.urandom(3 * PIPE_BYTES)
        await stdio.stdout.write(sent)
        await stdio.stderr.write(b"oops")
        await stdio.close()
        assert (tmp_path / "out").read_bytes() == sent
        assert (tmp_path / "err").read_bytes() == b"oops"
        assert (tmp_path / "arguments").read_text() == "default/web --dir /var/log quiet\n"

    checked(test)


STUBBORN = """#!/bin/sh
trap '' TERM
exec 5>&-
cat <&3 > {dir}/out
exec 3<&-
cat <&4 > {dir}/err
echo done > {dir}/done
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_logger_that_reads_to_the_end_is_not_killed(
    tmp_path: Path, logger: Callable[[str], str], terminal: bool
) -> None:
    """One stream may end long before the other, and both ends are given up more than once."""

    async def test() -> None:
        uri = logger(STUBBORN)
        stdio = await opened(stdout=uri, stderr=uri, terminal=terminal)
        assert stdio.stdout is not None
        await stdio.stdout.write(b"out")
        await stdio.stdout.close()
        await stdio.close()
        await stdio.close()
        assert (tmp_path / "done").exists()

    checked(test)


def test_a_terminals_logger_knows_at_once_that_there_is_no_stderr(
    tmp_path: Path, logger: Callable[[str], str]
) -> None:
    async def test() -> None:
        uri = logger("#!/bin/sh\nexec 5>&-\ncat <&4\n: >{dir}/ended\nexec cat <&3 >{dir}/out\n")
        stdio = await opened(stdout=uri, stderr=uri, terminal=True)
        assert stdio.stderr is None
        await until((tmp_path / "ended").exists)
        await stdio.close()

    checked(test)


def test_a_logger_that_does_not_end_is_killed(
    tmp_path: Path, logger: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGGER_END_S", 0.1)

    async def test() -> None:
        uri = logger("#!/bin/sh\ntrap '' TERM\necho $$ >{dir}/pid\nexec 5>&-\nexec sleep 1000\n")
        stdio = await opened(stdout=uri)
        pid = int((tmp_path / "pid").read_text())
        await stdio.close()
        assert not is_alive(pid)

    checked(test)


def test_a_logger_is_not_signalled_once_it_is_gone(
    logger: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pid may be another process's by then."""
    signalled: list[int] = []

    async def test() -> None:
        uri = logger(LOGGER)
        stdio = await opened(stdout=uri, stderr=uri)
        assert stdio.stdout is not None
        assert stdio.stderr is not None
        await stdio.stdout.close()
        await stdio.stderr.close()
        monkeypatch.setattr(os, "kill", lambda pid, number: signalled.append(pid))
        monkeypatch.setattr(signal, "pidfd_send_signal", lambda pidfd, number: signalled.append(pidfd))
        await stdio.close()

    checked(test)
    assert signalled == []


def test_a_logger_that_died_takes_nothing_more(logger: Callable[[str], str]) -> None:
    async def test() -> None:
        stdio = await opened(stdout=logger("#!/bin/sh\nexit 0\n"))
        assert stdio.stdout is not None
        for _ in range(3):
            await stdio.stdout.write(bytes(2 * PIPE_BYTES))
        await stdio.close()

    checked(test)


def test_a_logger_that_is_never_ready_is_given_up(tmp_path: Path, logger: Callable[[str], str]) -> None:
    async def test() -> None:
        opening = asyncio.create_task(
            opened(stdout=logger("#!/bin/sh\necho $$ > {dir}/pid\nexec sleep 1000\n"))
        )
        path = tmp_path / "pid"
        await until(lambda: path.exists() and path.read_text().endswith("\n"))
        pass_time(module.LOGGER_READY_S)
        with pytest.raises(DeadlineExceeded, match=r"logger .*/logger was not ready"):
            await opening
        pid = int(path.read_text())
        await until(lambda: not is_alive(pid))
        await asyncio.sleep(0)

    checked(test)


def test_a_create_that_is_given_up_gives_up_its_logger(tmp_path: Path, logger: Callable[[str], str]) -> None:
    """The client left while the logger was not ready yet."""

    async def test() -> None:
        opening = asyncio.create_task(
            opened(stdout=logger("#!/bin/sh\necho $$ > {dir}/pid\nexec sleep 1000\n"))
        )
        path = tmp_path / "pid"
        await until(lambda: path.exists() and path.read_text().endswith("\n"))
        opening.cancel()
        await asyncio.gather(opening, return_exceptions=True)
        pid = int(path.read_text())
        await until(lambda: not is_alive(pid))
        await asyncio.sleep(0)

    try:
        checked(test)
    finally:
        pid = int((tmp_path / "pid").read_text())
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.mark.parametrize("kind", ["missing", "plain"])
def test_a_logger_that_cannot_be_executed_is_named(tmp_path: Path, kind: str) -> None:
    async def test() -> None:
        path = tmp_path / "logger"
        if kind == "plain":
            path.write_text("not a program")
        with pytest.raises(NotFound, match=f"logger {path} cannot be executed"):
            await opened(stdout=f"binary://{path}")

    checked(test)


def test_a_logger_that_is_no_program_is_named(tmp_path: Path) -> None:
    async def test() -> None:
        path = tmp_path / "logger"
        path.write_bytes(b"\x7fELF nonsense")
        path.chmod(0o755)
        with pytest.raises(CasemateError, match="logger"):
            await opened(stdout=f"binary://{path}")

    checked(test)
