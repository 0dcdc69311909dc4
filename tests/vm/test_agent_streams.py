"""What a process in a guest reads and writes, by streams and by a terminal, asked of the agent alone."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import Callable

import pytest

from rpc.api import agent as api
from rpc.errors import FailedPrecondition
from tests.vm.agentvm import AgentVM, process, spec

MIB = 1 << 20


# standard streams


def test_streams_are_apart(vm: AgentVM) -> None:
    assert vm.run(vm.once("apart", spec("sh", "-c", "echo out; echo err >&2"))) == (0, b"out\n", b"err\n")


def test_ten_mebibytes_of_input_arrive_unharmed(vm: AgentVM) -> None:
    data = os.urandom(10 * MIB)

    async def feed() -> None:
        for start in range(0, len(data), MIB):
            await vm.write("input", data[start : start + MIB])
        await vm.close_stdin("input")

    async def scenario() -> bytes:
        await vm.create("input", spec("sha256sum"), stdin=True)
        await vm.start("input")
        async with asyncio.TaskGroup() as group:
            group.create_task(feed())
            reading = group.create_task(vm.output("input"))
        assert await vm.exit_of("input") == 0
        await vm.delete("input")
        return reading.result()

    assert vm.run(scenario()).split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_input_written_before_start_is_read(vm: AgentVM) -> None:
    async def scenario() -> bytes:
        await vm.create("early", spec("cat"), stdin=True)
        await vm.write("early", b"early words")
        await vm.close_stdin("early")
        await vm.start("early")
        output = await vm.output("early")
        await vm.exit_of("early")
        await vm.delete("early")
        return output

    assert vm.run(scenario()) == b"early words"


def test_write_waits_for_a_reader(vm: AgentVM) -> None:
    async def scenario() -> tuple[bool, bytes]:
        await vm.create("slow", spec("wc", "-c"), stdin=True)
        writing = asyncio.create_task(vm.write("slow", bytes(2 * MIB)))
        answered, _ = await asyncio.wait([writing], timeout=1.0)
        await vm.start("slow")
        await writing
        await vm.close_stdin("slow")
        output = await vm.output("slow")
        await vm.exit_of("slow")
        await vm.delete("slow")
        return bool(answered), output

    answered, output = vm.run(scenario())
    assert not answered, "two mebibytes were taken though nobody read them"
    assert int(output) == 2 * MIB


def test_input_that_nobody_reads_any_more_is_refused(vm: AgentVM) -> None:
    async def scenario() -> None:
        await vm.create("deaf", spec("sh", "-c", "exec <&-; echo closed; sleep 1000"), stdin=True)
        await vm.start("deaf")
        async for chunk in vm.chunks("deaf"):
            assert chunk == b"closed\n"
            break
        try:
            with pytest.raises(FailedPrecondition, match="no reader"):
                await vm.write("deaf", b"anybody?")
        finally:
            await vm.finish("deaf")

    vm.run(scenario())


def test_process_without_input_reads_end_of_file(vm: AgentVM) -> None:
    async def scenario() -> tuple[int, bytes, bytes]:
        return await vm.once("mute", spec("sh", "-c", "cat; echo done"))

    assert vm.run(scenario()) == (0, b"done\n", b"")
    with vm.sleeper("mute"), pytest.raises(FailedPrecondition, match="no standard input"):
        vm.run(vm.write("mute", b"x"))


def test_hundred_mebibytes_of_output_are_byte_exact(
    vm: AgentVM, record_property: Callable[[str, object], None]
) -> None:
    size = 100 * MIB
    line = b"0123456789abcde\n" * 4096
    expected = hashlib.sha256()
    for _ in range(size // len(line)):
        expected.update(line)

    async def scenario() -> tuple[str, float]:
        got = hashlib.sha256()
        script = f"yes 0123456789abcde | dd bs=65536 count={size // 65536} iflag=fullblock 2>/dev/null"
        await vm.create("flood", spec("sh", "-c", script))
        begin = time.monotonic()
        await vm.start("flood")
        async for chunk in vm.chunks("flood"):
            got.update(chunk)
        seconds = time.monotonic() - begin
        assert await vm.exit_of("flood") == 0
        await vm.delete("flood")
        return got.hexdigest(), seconds

    digest, seconds = vm.run(scenario(), timeout_s=280)
    record_property("mebibytes_per_second", round(100 / seconds, 1))
    assert digest == expected.hexdigest()


def test_unread_output_stops_the_writer(vm: AgentVM) -> None:
    """The agent keeps nothing: what is not asked for stays in a pipe of 256 KiB, and the writer waits."""

    async def scenario() -> tuple[int, int, int]:
        await vm.create("held", spec("sh", "-c", "yes | head -c 8388608"))
        before = (await vm.hello()).rss_bytes
        await vm.start("held")
        await asyncio.sleep(1.0)  # nothing happens, which has no event
        during = (await vm.hello()).rss_bytes
        assert ("held", "") not in vm.exits
        size = len(await vm.output("held"))
        await vm.exit_of("held")
        await vm.delete("held")
        return before, during, size

    before, during, size = vm.run(scenario())
    assert during - before < MIB
    assert size == 8 * MIB


def test_output_can_be_read_after_the_end(vm: AgentVM) -> None:
    async def scenario() -> tuple[int, bytes]:
        await vm.create("late", spec("sh", "-c", "yes | head -c 100000; exit 3"))
        await vm.start("late")
        status = await vm.exit_of("late")
        output = await vm.output("late")
        await vm.delete("late")
        return status, output

    assert vm.run(scenario()) == (3, b"y\n" * 50000)


def test_reads_are_no_larger_than_asked_for(vm: AgentVM) -> None:
    async def scenario() -> list[bytes]:
        await vm.create("small", spec("echo", "0123456789"))
        await vm.start("small")
        await vm.exit_of("small")
        chunks = [chunk async for chunk in vm.chunks("small", max_bytes=4)]
        await vm.delete("small")
        return chunks

    assert vm.run(scenario()) == [b"0123", b"4567", b"89\n"]


def test_child_that_keeps_the_pipe_does_not_hold_back_the_exit(vm: AgentVM) -> None:
    async def scenario() -> tuple[int, bool, bytes]:
        await vm.exec("leaky", "parent", process("sh", "-c", "sleep 1000 & echo gone; exit 4"))
        status = await vm.exit_of("leaky", "parent")
        reading = asyncio.create_task(vm.output("leaky", "parent"))
        ended, _ = await asyncio.wait([reading], timeout=0.5)
        await vm.signal("leaky", 9)  # with its init the whole pid namespace goes
        return status, bool(ended), await reading

    with vm.sleeper("leaky"):
        assert vm.run(scenario()) == (4, False, b"gone\n")
        vm.run(vm.exit_of("leaky"))


def test_delete_ends_a_read_of_a_pipe_that_is_still_open(vm: AgentVM) -> None:
    async def scenario() -> bytes:
        await vm.exec("open", "parent", process("sh", "-c", "sleep 1000 & exit 0"))
        await vm.exit_of("open", "parent")
        reading = asyncio.create_task(vm.output("open", "parent"))
        await asyncio.wait([reading], timeout=0.2)
        await vm.delete("open", "parent")
        return await reading

    with vm.sleeper("open"):
        assert vm.run(scenario()) == b""


# terminals


def test_terminal_has_the_size_it_is_given(vm: AgentVM) -> None:
    script = "trap 'stty size; exit 6' WINCH; stty size; while :; do sleep 0.1; done"

    async def scenario() -> tuple[int, bytes]:
        what = spec("sh", "-c", script, consoleSize={"width": 80, "height": 24})
        await vm.create("tty", what, terminal=True)
        await vm.start("tty")
        output = b""
        async for chunk in vm.chunks("tty"):
            output += chunk
            if output.endswith(b"24 80\r\n"):
                resize = api.ResizeRequest(container_id="tty", width=132, height=43)
                await vm.client.call(api.RESIZE, resize)
        status = await vm.exit_of("tty")
        await vm.delete("tty")
        return status, output

    assert vm.run(scenario()) == (6, b"24 80\r\n43 132\r\n")


def test_terminal_of_an_exec_takes_input_and_control_characters(vm: AgentVM) -> None:
    async def scenario() -> tuple[int, bytes]:
        await vm.exec("console", "shell", process("sh", "-c", "tty; cat"), terminal=True, stdin=True)
        output = b""
        async for chunk in vm.chunks("console", "shell"):
            output += chunk
            if output == b"/dev/pts/0\r\n":
                await vm.write("console", b"hello\n", "shell")
            if output.endswith(b"hello\r\nhello\r\n"):
                await vm.write("console", b"\x03", "shell")
        status = await vm.exit_of("console", "shell")
        await vm.delete("console", "shell")
        return status, output

    with vm.sleeper("console"):
        status, output = vm.run(scenario())
    assert output == b"/dev/pts/0\r\nhello\r\nhello\r\n^C"
    assert status == 128 + signal.SIGINT


def test_last_words_on_a_terminal_are_not_lost(vm: AgentVM) -> None:
    async def scenario(number: int) -> bytes:
        name = f"words-{number}"
        await vm.exec("terminal", name, process("seq", "1", "400"), terminal=True)
        output = await vm.output("terminal", name)
        await vm.exit_of("terminal", name)
        await vm.delete("terminal", name)
        return output

    expected = b"".join(b"%d\r\n" % number for number in range(1, 401))
    with vm.sleeper("terminal"):
        for number in range(10):
            assert vm.run(scenario(number)) == expected


def test_resize_without_a_terminal_is_no_error(vm: AgentVM) -> None:
    with vm.sleeper("pipes"):
        vm.run(vm.client.call(api.RESIZE, api.ResizeRequest(container_id="pipes", width=1, height=1)))
