"""stdio between the host's ends and the guest: every byte, back-pressure all the way, ends on both sides."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import FailedPrecondition, NotFound
from shim import container as module
from shim.container import Process
from tests.unit.rpc.wires import run, until
from tests.unit.shim.guests import PIPE_BYTES
from tests.unit.shim.pods import POD, PodOfTest, running_pod


def fifos(directory: Path, *names: str) -> dict[str, str]:
    for name in names:
        os.mkfifo(directory / name)
    return {name: str(directory / name) for name in names}


def reader(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


async def read_to_end(fd: int) -> bytes:
    """What a client reads, at its own pace."""
    got = bytearray()
    while True:
        try:
            data = os.read(fd, 50_000)
        except BlockingIOError:
            await asyncio.sleep(0)
            continue
        if not data:
            return bytes(got)
        got += data


async def settle() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


async def delete_ended(tested: PodOfTest, exec_id: str = "") -> None:
    await tested.exit(exec_id=exec_id)
    await tested.pod.delete(POD, exec_id)


def test_every_byte_of_both_streams_arrives(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout", "stderr")
            out, err = reader(ends["stdout"]), reader(ends["stderr"])
            await tested.run(**ends)
            sent = os.urandom(20 * PIPE_BYTES + 1)
            reading = asyncio.gather(read_to_end(out), read_to_end(err))
            await tested.agent.print(POD, sent)
            await tested.agent.print(POD, b"oops", stream=api.STDERR)
            await delete_ended(tested)
            assert list(await reading) == [sent, b"oops"]
            os.close(out)
            os.close(err)

    run(life())


def test_the_last_bytes_before_an_exit_are_delivered_before_delete_is_answered(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            out = reader(ends["stdout"])
            await tested.run(**ends)
            await tested.agent.print(POD, b"x" * PIPE_BYTES)
            await tested.exit()
            await tested.pod.delete(POD)
            assert os.read(out, 2 * PIPE_BYTES) == b"x" * PIPE_BYTES
            assert os.read(out, 1) == b""
            os.close(out)

    run(life())


@pytest.mark.parametrize("exec_id", ["shell", "stdin", "read-stdin"])
def test_the_last_bytes_of_an_exec_too_whatever_it_is_called(tmp_path: Path, exec_id: str) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout", "stdin")
            out = reader(ends["stdout"])
            await tested.run()
            tested.add_exec(exec_id, **ends)
            await tested.pod.start(POD, exec_id)
            await tested.agent.print(POD, b"last words", exec_id)
            await delete_ended(tested, exec_id)
            assert os.read(out, 100) == b"last words"
            os.close(out)

    run(life())


def test_a_reader_that_does_not_read_makes_the_program_wait(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            out = reader(ends["stdout"])
            await tested.run(**ends)
            sent = os.urandom(2 << 20)
            printing = asyncio.create_task(tested.agent.print(POD, sent))
            await settle()
            assert not printing.done()
            reading = asyncio.create_task(read_to_end(out))
            await printing
            await delete_ended(tested)
            assert await reading == sent
            os.close(out)

    run(life())


def test_one_stream_that_waits_does_not_hold_up_the_other(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout", "stderr")
            out, err = reader(ends["stdout"]), reader(ends["stderr"])
            await tested.run(**ends)
            printing = asyncio.create_task(tested.agent.print(POD, bytes(2 << 20)))
            await tested.agent.print(POD, b"still here", stream=api.STDERR)
            await settle()
            assert not printing.done()
            assert os.read(err, 100) == b"still here"
            reading = asyncio.create_task(read_to_end(out))
            await printing
            await delete_ended(tested)
            assert len(await reading) == 2 << 20
            os.close(out)
            os.close(err)

    run(life())


def test_output_that_nobody_wants_is_read_and_dropped(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.agent.print(POD, bytes(10 * PIPE_BYTES))
            await tested.agent.print(POD, bytes(10 * PIPE_BYTES), stream=api.STDERR)
            await delete_ended(tested)

    run(life())


def test_a_full_disk_under_the_log_does_not_stop_the_program(tmp_path: Path) -> None:
    """What cannot be written is dropped; a program that may not print must not hang for ever."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run(stdout="file:///dev/full")
            await tested.agent.print(POD, bytes(10 * PIPE_BYTES))
            await delete_ended(tested)

    run(life())


def test_a_terminal_is_one_stream(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            out = reader(ends["stdout"])
            await tested.run(terminal=True, **ends)
            await tested.agent.print(POD, b"$ ")
            await delete_ended(tested)
            assert await read_to_end(out) == b"$ "
            os.close(out)

    run(life())


def test_input_reaches_the_program_and_its_end_when_it_is_closed(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdin")
            container = await tested.create(**ends)
            client = os.open(ends["stdin"], os.O_WRONLY | os.O_NONBLOCK)
            await tested.pod.start(POD)
            program = tested.agent.process(POD)
            sent = os.urandom(3 * PIPE_BYTES + 5)
            left = memoryview(sent)
            while left:
                try:
                    left = left[os.write(client, left) :]
                except BlockingIOError:
                    await asyncio.sleep(0)
            await until(lambda: len(program.stdin) == len(sent))
            os.close(client)
            await settle()
            assert not program.stdin_closed.is_set()
            container.init.close_stdin()
            await program.stdin_closed.wait()
            assert bytes(program.stdin) == sent

    run(life())


def test_input_that_was_closed_before_the_start_was_answered_ends(tmp_path: Path) -> None:
    """What was written until then is read first."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdin")
            await tested.run()
            process = tested.add_exec("shell", **ends)
            client = os.open(ends["stdin"], os.O_RDWR | os.O_NONBLOCK)
            os.write(client, b"all there is")
            process.close_stdin()
            await tested.pod.start(POD, "shell")
            await tested.agent.process(POD, "shell").stdin_closed.wait()
            assert bytes(tested.agent.process(POD, "shell").stdin) == b"all there is"
            os.close(client)

    run(life())


def test_input_is_not_taken_faster_than_the_program_reads(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdin")
            await tested.create(**ends)
            gate = tested.agent.hold(api.WRITE_STDIN)
            client = os.open(ends["stdin"], os.O_WRONLY | os.O_NONBLOCK)
            written = 0
            for _ in range(1000):
                try:
                    written += os.write(client, bytes(PIPE_BYTES))
                except BlockingIOError:
                    await asyncio.sleep(0)
            assert written <= 2 * PIPE_BYTES  # what is on its way, and what the FIFO holds
            gate.set()
            await until(lambda: len(tested.agent.process(POD).stdin) == written)
            os.close(client)

    run(life())


def test_a_program_that_ends_while_there_is_input_is_no_failure(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdin")
            await tested.run(**ends)
            await tested.exit(status=2)
            client = os.open(ends["stdin"], os.O_WRONLY | os.O_NONBLOCK)
            os.write(client, b"too late")
            await settle()
            tested.pod.container(POD).init.close_stdin()
            await tested.pod.delete(POD)
            os.close(client)

    run(life())


def test_closing_what_was_never_open_is_nothing() -> None:
    async def life() -> None:
        process = Process(POD, "", False, "", "", "")
        process.close_stdin()
        await process.drain()
        await process.close()
        with pytest.raises(FailedPrecondition, match="process web is created"):
            _ = process.end

    run(life())


def test_a_grandchild_that_holds_output_open_does_not_hold_up_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.1)

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            out = reader(ends["stdout"])
            await tested.run(**ends)
            tested.agent.tell(api.EventKind.EXIT, POD)
            await tested.pod.container(POD).init.exited.wait()
            await tested.pod.delete(POD)
            assert os.read(out, 1) == b""
            os.close(out)

    run(life())
    assert "output was not read to its end" in caplog.text


def test_the_exit_of_one_that_logs_is_told_when_all_is_written(tmp_path: Path) -> None:
    """nerdctl's logger reads until then; a FIFO's reader sees its end."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            log = tmp_path / "log"
            await tested.run(stdout=f"file://{log}", stderr=f"file://{log}")
            pipes, init = tested.agent.process(POD).pipes, tested.pod.container(POD).init
            tested.agent.tell(api.EventKind.EXIT, POD)
            await pipes[api.STDOUT].write(b"last words")
            await tested.agent.calls_settle()
            assert not init.exited.is_set()
            await pipes[api.STDOUT].close()
            await pipes[api.STDERR].close()
            await init.exited.wait()
            assert log.read_text() == "last words"

    run(life())


def test_a_grandchild_that_holds_a_log_open_does_not_hold_up_the_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_S", 0.1)

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run(stdout=f"file://{tmp_path}/log")
            tested.agent.tell(api.EventKind.EXIT, POD)
            async with asyncio.timeout(module.DRAIN_S / 2):
                await tested.pod.container(POD).init.exited.wait()

    run(life())


def test_a_reader_that_never_reads_does_not_hold_up_delete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAIN_S", 0.1)

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            await tested.run(**ends)
            await tested.agent.print(POD, bytes(PIPE_BYTES))
            await settle()
            await tested.agent.print(POD, bytes(PIPE_BYTES))
            await delete_ended(tested)

    run(life())


def test_nothing_is_asked_of_the_guest_for_a_process_that_was_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reader does not read: one chunk waits here, the next one is on its way."""
    monkeypatch.setattr(module, "DRAIN_S", 0.1)

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await settle()
            before = len(asyncio.all_tasks())
            ends = fifos(tmp_path, "stdout")
            tested.add_exec("shell", **ends)
            await tested.pod.start(POD, "shell")
            for _ in range(2):  # the FIFO is full, and the guest has no more
                await tested.agent.print(POD, bytes(PIPE_BYTES), "shell")
                await settle()
            tested.agent.tell(api.EventKind.EXIT, POD, "shell")
            await tested.pod.container(POD).process("shell").exited.wait()
            await tested.pod.delete(POD, "shell")
            await settle()
            # what the agent itself still waits for is not ours to end: two streams at most
            ours = [task for task in asyncio.all_tasks() if "Machine.call" in repr(task.get_coro())]
            assert ours == []
            assert len(asyncio.all_tasks()) <= before + 2

    run(life())


def test_readers_see_the_end_when_the_machine_is_lost(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            out = reader(ends["stdout"])
            await tested.run(**ends)
            await tested.agent.print(POD, b"before")
            await settle()
            os.kill(tested.guest.qemu.pid, 9)
            assert await read_to_end(out) == b"before"
            os.close(out)

    run(life())


def test_a_process_of_another_name_is_not_found(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.create()
            assert container.process("") is container.init
            with pytest.raises(NotFound, match="exec ghost of container web does not exist"):
                container.process("ghost")

    run(life())


@pytest.mark.parametrize("lie", [api.ReadOutputResponse(data=bytes(1 << 20)), api.ReadOutputResponse()])
def test_a_guest_that_answers_more_output_than_was_asked_for_or_none_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lie: api.ReadOutputResponse
) -> None:
    """More would fill the host's memory, none would keep its processor busy."""

    async def read_output(_: api.ReadOutputRequest) -> api.ReadOutputResponse:
        return lie

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            ends = fifos(tmp_path, "stdout")
            out = reader(ends["stdout"])
            tested.agent.answer(api.READ_OUTPUT, read_output)
            await tested.run(**ends)
            assert await read_to_end(out) == b""
            calls = tested.agent.calls.count("ReadOutput")
            await settle()
            assert tested.agent.calls.count("ReadOutput") == calls
            await tested.exit()
            await tested.pod.delete(POD)
            os.close(out)

    run(life())
