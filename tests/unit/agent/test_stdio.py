"""Our ends of pipes and terminals: back-pressure, ends of files, closing under a waiting reader."""

import asyncio
import os
import pty
import socket
import termios
from pathlib import Path
from struct import unpack

import pytest

from agent.stdio import PIPE_BYTES, STDERR, STDOUT, ConsoleSocket, Input, Output, Stdio, TerminalOutput
from rpc.errors import FailedPrecondition, Internal, InvalidArgument


async def read_all(out: Output | TerminalOutput, size: int) -> bytes:
    """So many bytes: what a terminal is given comes out of it in pieces, when the kernel gets round to it."""
    got = b""
    while len(got) < size:
        more = await out.read(100)
        assert more, got
        got += more
    return got


def output() -> tuple[Output, int]:
    ours, theirs = os.pipe()
    return Output(ours), theirs


def test_read_gives_what_is_there_up_to_the_maximum() -> None:
    async def scenario() -> None:
        out, theirs = output()
        os.write(theirs, b"0123456789")
        assert await out.read(4) == b"0123"
        assert await out.read(0) == b"456789"
        out.close()
        os.close(theirs)

    asyncio.run(scenario())


def test_read_waits_and_then_ends() -> None:
    async def scenario() -> None:
        out, theirs = output()
        reading = asyncio.create_task(out.read(100))
        await asyncio.sleep(0)
        assert not reading.done()
        os.write(theirs, b"late")
        assert await reading == b"late"
        os.close(theirs)
        assert await out.read(100) == b""
        assert await out.read(100) == b""
        out.close()

    asyncio.run(scenario())


def test_second_reader_is_refused() -> None:
    async def scenario() -> None:
        out, theirs = output()
        reading = asyncio.create_task(out.read(100))
        await asyncio.sleep(0)
        with pytest.raises(FailedPrecondition, match="already being read"):
            await out.read(100)
        os.close(theirs)
        assert await reading == b""
        out.close()

    asyncio.run(scenario())


def test_close_wakes_the_reader_and_frees_the_number_for_others() -> None:
    async def scenario() -> None:
        first, theirs = output()
        reading = asyncio.create_task(first.read(100))
        await asyncio.sleep(0)
        first.close()
        os.close(theirs)
        second, again = output()  # most likely the same numbers
        waiting = asyncio.create_task(second.read(100))
        assert await reading == b""
        os.write(again, b"second")
        async with asyncio.timeout(5):
            assert await waiting == b"second"
        second.close()
        os.close(again)
        assert await second.read(1) == b""

    asyncio.run(scenario())


def test_cancelled_reader_leaves_the_stream_readable() -> None:
    async def scenario() -> None:
        out, theirs = output()
        reading = asyncio.create_task(out.read(100))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        os.write(theirs, b"kept")
        assert await out.read(100) == b"kept"
        out.close()
        os.close(theirs)

    asyncio.run(scenario())


def test_write_waits_until_all_of_it_is_taken() -> None:
    async def scenario() -> None:
        theirs, ours = os.pipe()
        into = Input(ours, terminal=False)
        data = os.urandom(300_000)
        writing = asyncio.create_task(into.write(data))
        await asyncio.sleep(0.05)
        assert not writing.done()
        out = Output(theirs)
        got = b""
        while len(got) < len(data):
            got += await out.read(50_000)
        await writing
        assert got == data
        await into.finish()
        assert await out.read(1) == b""
        out.close()

    asyncio.run(scenario())


def test_writers_take_turns() -> None:
    async def scenario() -> None:
        theirs, ours = os.pipe()
        into = Input(ours, terminal=False)
        writes = [asyncio.create_task(into.write(bytes([n]) * 100_000)) for n in range(3)]
        out = Output(theirs)
        got = b""
        while len(got) < 300_000:
            got += await out.read(1 << 16)
        await asyncio.gather(*writes)
        assert got == b"".join(bytes([n]) * 100_000 for n in range(3))
        into.close()
        out.close()

    asyncio.run(scenario())


def test_write_without_a_reader_is_refused() -> None:
    async def scenario() -> None:
        theirs, ours = os.pipe()
        into = Input(ours, terminal=False)
        os.close(theirs)
        with pytest.raises(FailedPrecondition, match="no reader"):
            await into.write(b"x")
        into.close()
        with pytest.raises(FailedPrecondition, match="closed"):
            await into.write(b"x")
        await into.finish()

    asyncio.run(scenario())


def test_close_wakes_the_writer() -> None:
    async def scenario() -> None:
        theirs, ours = os.pipe()
        into = Input(ours, terminal=False)
        writing = asyncio.create_task(into.write(bytes(1 << 20)))
        await asyncio.sleep(0.01)
        into.close()
        with pytest.raises(FailedPrecondition, match="closed"):
            await writing
        os.close(theirs)

    asyncio.run(scenario())


def test_pipes_are_made_for_both_outputs_and_input_on_demand() -> None:
    async def scenario() -> None:
        mute = Stdio.pipes(stdin=False)
        assert mute.input is None
        assert sorted(mute.outputs) == [STDOUT, STDERR]
        assert os.read(mute.inherited[0], 1) == b""
        with pytest.raises(InvalidArgument, match="no output stream 3"):
            mute.output(3)
        os.write(mute.inherited[2], b"error")
        mute.handed_over()
        assert await mute.output(STDERR).read(100) == b"error"
        assert await mute.output(STDERR).read(100) == b""
        mute.resize(1, 1)
        mute.close()
        mute.close()
        talking = Stdio.pipes(stdin=True)
        assert talking.input is not None
        await talking.input.write(b"hi")
        assert os.read(talking.inherited[0], 10) == b"hi"
        talking.close()

    asyncio.run(scenario())


def test_a_pipe_holds_what_nobody_reads() -> None:
    async def scenario() -> None:
        stdio = Stdio.pipes(stdin=False)
        os.set_blocking(stdio.inherited[1], False)
        assert os.write(stdio.inherited[1], bytes(2 * PIPE_BYTES)) == PIPE_BYTES
        stdio.close()

    asyncio.run(scenario())


def test_terminal_lives_from_its_adoption_to_its_hangup() -> None:
    async def scenario() -> None:
        stdio = Stdio.terminal()
        with pytest.raises(InvalidArgument):
            stdio.output(STDOUT)
        master, slave = pty.openpty()
        stdio.adopt(master)
        stdio.handed_over()
        stdio.resize(132, 43)
        assert os.get_terminal_size(slave) == (132, 43)
        stdio.resize(1 << 20, 43)
        assert os.get_terminal_size(slave).columns == 0xFFFF
        os.write(slave, b"words\n")
        out = stdio.output(STDOUT)
        assert await read_all(out, 7) == b"words\r\n"
        assert stdio.input is not None
        await stdio.input.write(b"line\n")
        assert os.read(slave, 100) == b"line\n"
        await stdio.input.finish()  # a terminal has no end of file
        await stdio.input.write(b"more\n")
        assert os.read(slave, 100) == b"more\n"
        assert await read_all(out, 12) == b"line\r\nmore\r\n"
        os.write(slave, b"last words")
        os.close(slave)
        assert await read_all(out, 10) == b"last words"
        assert await out.read(100) == b""
        stdio.close()

    asyncio.run(scenario())


def test_console_socket_receives_a_terminal(tmp_path: Path) -> None:
    console = ConsoleSocket(str(tmp_path / "tty"))
    master, slave = pty.openpty()
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(console.path)
        socket.send_fds(sender, [b"/dev/ptmx"], [master])
        received = console.receive()
    console.close()
    assert not (tmp_path / "tty").exists()
    assert not os.get_inheritable(received)
    assert unpack("4H", fcntl_winsize(received)) is not None
    for fd in (master, slave, received):
        os.close(fd)


def fcntl_winsize(fd: int) -> bytes:
    import fcntl

    return fcntl.ioctl(fd, termios.TIOCGWINSZ, bytes(8))


def test_console_socket_that_got_nothing_is_an_error(tmp_path: Path) -> None:
    console = ConsoleSocket(str(tmp_path / "tty"))
    with pytest.raises(Internal, match="no terminal"):
        console.receive()
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(console.path)
        with pytest.raises(Internal, match="sent no terminal"):
            console.receive()
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(console.path)
        sender.send(b"no descriptor")
        with pytest.raises(Internal, match="no descriptor"):
            console.receive()
    console.close()
