"""rpc/ speaks with Go's ttrpc and containerd's generated task API, as client and as server."""

import asyncio
import json
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.api import task
from rpc.api.options import RuncOptions
from rpc.api.types import Any, Empty, Mount
from rpc.client import Client
from rpc.errors import CasemateError, Code, DeadlineExceeded, FailedPrecondition, Unavailable, Unimplemented
from rpc.method import Method
from rpc.server import Context, Receive, Send, Server
from tests.vm.interop import peer
from tests.vm.interop.peer import EchoPayload, Part, Sum

pytestmark = pytest.mark.usefixtures("go_program")


# ------------------------------------------------------------------------- our client, Go's server


@asynccontextmanager
async def go_server(
    program: Path, directory: Path
) -> AsyncIterator[tuple[Client, asyncio.subprocess.Process]]:
    path = str(directory / "go.sock")
    process = await asyncio.create_subprocess_exec(program, "serve", path, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"listening\n"
        async with await Client.connect_unix(path, "go") as client:
            yield client, process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def pattern(size: int) -> bytes:
    return (bytes(range(251)) * (size // 251 + 1))[:size]


def test_go_reads_a_whole_request(go_program: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with go_server(go_program, tmp_path) as (client, _):
            answer = await client.call(
                task.CREATE,
                task.CreateTaskRequest(
                    id="pod",
                    bundle="/run/bündle",
                    rootfs=[Mount(type="overlay", options=["lowerdir=/a:/b", "", "ro"]), Mount(target="t")],
                    terminal=True,
                    stdin="in",
                    options=Any.pack(RuncOptions(no_pivot_root=True, io_uid=1000, shim_cgroup="/x")),
                ),
            )
            assert answer.pid == (1 << 32) - 1
            seen = (await client.call(task.STATS, task.StatsRequest(id="created"))).stats
            assert seen is not None
            created = json.loads(seen.value)
            assert created == {
                "id": "pod",
                "bundle": "/run/bündle",
                "rootfs": [{"type": "overlay", "options": ["lowerdir=/a:/b", "", "ro"]}, {"target": "t"}],
                "terminal": True,
                "stdin": "in",
                "options": {
                    "@type": "containerd.runc.v1.Options",
                    "noPivotRoot": True,
                    "ioUid": 1000,
                    "shimCgroup": "/x",
                },
            }

    asyncio.run(test())


def test_go_gets_metadata_and_deadline(go_program: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with go_server(go_program, tmp_path) as (client, _):
            request = task.StateRequest(id="x")
            state = await client.call(
                task.STATE, request, timeout_s=60, metadata={"Containerd-Namespace-TTRPC": "k8s.io"}
            )
            assert (state.id, state.stdin) == ("x", "k8s.io")
            assert 50_000 < state.pid <= 60_000
            state = await client.call(task.STATE, request)
            assert (state.stdin, state.pid) == ("", 0)

    asyncio.run(test())


@pytest.mark.parametrize("code", list(Code)[1:])
def test_gos_status_codes_are_our_errors(go_program: Path, tmp_path: Path, code: Code) -> None:
    async def test() -> None:
        async with go_server(go_program, tmp_path) as (client, _):
            with pytest.raises(CasemateError) as caught:
                await client.call(task.KILL, task.KillRequest(signal=code))
            assert (caught.value.code, str(caught.value)) == (code, f"code {int(code)}")
            assert await client.call(task.KILL, task.KillRequest(signal=0)) == Empty()
            with pytest.raises(CasemateError, match="no status") as caught:
                await client.call(task.KILL, task.KillRequest(signal=99))
            assert caught.value.code is Code.UNKNOWN
            with pytest.raises(Unimplemented):
                await client.call(Method("nope", "Nope", Empty, Empty), Empty())

    asyncio.run(test())


@pytest.mark.parametrize("size", [0, 1, 70_000, (4 << 20) - 100])
def test_go_sends_large_answers(go_program: Path, tmp_path: Path, size: int) -> None:
    async def test() -> None:
        async with go_server(go_program, tmp_path) as (client, _):
            stats = (await client.call(task.STATS, task.StatsRequest(id=str(size)))).stats
            assert stats == Any(type_url="bytes", value=pattern(size))

    asyncio.run(test())


def test_go_answers_late_and_out_of_order(go_program: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with go_server(go_program, tmp_path) as (client, process):
            async with asyncio.TaskGroup() as group:
                waiting = [group.create_task(wait(client)) for _ in range(10)]
                states = [
                    group.create_task(client.call(task.STATE, task.StateRequest(id=str(n))))
                    for n in range(500)
                ]
                with pytest.raises(DeadlineExceeded):
                    await client.call(task.WAIT, task.WaitRequest(), timeout_s=0.05)
                for n, state in enumerate(states):
                    assert (await state).id == str(n)
                process.kill()
            assert {str(task.result()) for task in waiting} == {"go: connection closed"}
            await client.closed()

    async def wait(client: Client) -> CasemateError:
        with pytest.raises(Unavailable) as caught:
            await client.call(task.WAIT, task.WaitRequest())
        return caught.value

    asyncio.run(test())


def test_streams_of_every_shape_with_gos_server(go_program: Path, tmp_path: Path) -> None:
    async def test() -> None:
        async with go_server(go_program, tmp_path) as (client, _):
            assert await client.call(peer.ECHO, EchoPayload(seq=1, msg="m")) == EchoPayload(seq=2, msg="m")
            async with client.stream(peer.ECHO_STREAM) as echo:
                for seq in range(100):
                    await echo.send(EchoPayload(seq=seq, msg="m"))
                    assert await echo.receive() == EchoPayload(seq=seq + 1, msg="m")
                await echo.close_send()
                assert await echo.receive() is None
            async with client.stream(peer.ECHO_STREAM) as echo:
                await echo.send(EchoPayload(msg="fail"))
                with pytest.raises(FailedPrecondition, match="asked to fail"):
                    await echo.receive()
            async with client.stream(peer.SUM_STREAM) as sums:
                for add in range(100):
                    await sums.send(Part(add=add))
                await sums.close_send()
                assert await sums.receive() == Sum(sum=4950, num=100)
            async with client.stream(peer.DIVIDE_STREAM, Sum(num=60)) as parts:
                assert [part.add async for part in parts] == list(range(60))
            async with client.stream(peer.ECHO_NULL) as nothing:
                for _ in range(10):
                    await nothing.send(EchoPayload())
                await nothing.close_send()
                assert await nothing.receive() == Empty()
            async with client.stream(peer.ECHO_NULL_STREAM) as nothing:
                for _ in range(10):
                    await nothing.send(EchoPayload())
                    assert await nothing.receive() == Empty()
                await nothing.close_send()
                assert await nothing.receive() is None
            async with client.stream(peer.EMPTY_PAYLOAD_STREAM, Empty()) as payloads:
                assert [payload.seq async for payload in payloads] == [1, 2, 3, 4, 5]
            async with client.stream(peer.ECHO_STREAM) as left:  # leaving early ends the handler in Go
                await left.send(EchoPayload(seq=7))
            assert (await client.call(peer.ECHO, EchoPayload())).seq == 1

    asyncio.run(test())


# ------------------------------------------------------------------------- Go's client, our server


class Service:
    """What go/serve.go answers, from our side. Methods of Task that are not here are Unimplemented."""

    def __init__(self) -> None:
        self.created = b""
        self.shutdown_asked = asyncio.Event()
        self.server = server = Server()
        for name in (task.SERVICE, task.SERVICE_V3):
            server.add(task.STATE, self.state, service=name)
        server.add(task.CREATE, self.create)
        server.add(task.STATS, self.stats)
        server.add(task.KILL, self.kill)
        server.add(task.WAIT, self.wait)
        server.add(task.SHUTDOWN, self.shutdown)
        server.add(peer.ECHO_STREAM, self.echo_stream)
        server.add(peer.SUM_STREAM, self.sum_stream)
        server.add(peer.DIVIDE_STREAM, self.divide_stream)
        server.add(peer.ECHO_NULL, self.echo_null)
        server.add(peer.ECHO_NULL_STREAM, self.echo_null_stream)
        server.add(peer.EMPTY_PAYLOAD_STREAM, self.empty_payload)

    async def state(self, request: task.StateRequest, context: Context) -> task.StateResponse:
        left_s = context.deadline - asyncio.get_running_loop().time() if context.deadline else 0
        return task.StateResponse(
            id=request.id,
            pid=int(left_s * 1000),
            stdin=context.metadata.get("containerd-namespace-ttrpc", ""),
        )

    async def create(self, request: task.CreateTaskRequest, context: Context) -> task.CreateTaskResponse:
        self.created = request.encode()
        return task.CreateTaskResponse(pid=1)

    async def stats(self, request: task.StatsRequest, context: Context) -> task.StatsResponse:
        value = self.created if request.id == "created" else pattern(int(request.id))
        return task.StatsResponse(stats=Any(type_url="bytes", value=value))

    async def kill(self, request: task.KillRequest, context: Context) -> Empty:
        if request.signal == 99:
            raise RuntimeError("no status")
        if request.signal:
            raise CasemateError(f"code {request.signal}", code=Code(request.signal))
        return Empty()

    async def wait(self, request: task.WaitRequest, context: Context) -> task.WaitResponse:
        await asyncio.Event().wait()
        return task.WaitResponse()

    async def shutdown(self, request: task.ShutdownRequest, context: Context) -> Empty:
        self.shutdown_asked.set()
        return Empty()

    async def echo_stream(
        self, context: Context, receive: Receive[EchoPayload], send: Send[EchoPayload]
    ) -> None:
        async for payload in receive:
            if payload.msg == "fail":
                raise FailedPrecondition("asked to fail")
            await send(EchoPayload(seq=payload.seq + 1, msg=payload.msg))

    async def sum_stream(self, context: Context, receive: Receive[Part]) -> Sum:
        parts = [part.add async for part in receive]
        return Sum(sum=sum(parts), num=len(parts))

    async def divide_stream(self, request: Sum, context: Context, send: Send[Part]) -> None:
        for add in range(request.num):
            await send(Part(add=add))

    async def echo_null(self, context: Context, receive: Receive[EchoPayload]) -> Empty:
        async for _ in receive:
            pass
        return Empty()

    async def echo_null_stream(
        self, context: Context, receive: Receive[EchoPayload], send: Send[Empty]
    ) -> None:
        async for _ in receive:
            await send(Empty())

    async def empty_payload(self, request: Empty, context: Context, send: Send[EchoPayload]) -> None:
        for seq in range(1, 6):
            await send(EchoPayload(seq=seq))


def test_gos_client_is_content_with_our_server(go_program: Path, tmp_path: Path) -> None:
    async def test() -> dict[str, str]:
        path = str(tmp_path / "ours.sock")
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(path)
        service = Service()
        await service.server.listen_unix(sock)
        process = await asyncio.create_subprocess_exec(go_program, "call", path, stdout=subprocess.PIPE)

        async def end() -> None:
            await service.shutdown_asked.wait()
            await service.server.close()

        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            ending = group.create_task(end())
            output, _ = await process.communicate()
            ending.cancel()
        assert process.returncode == 0
        results: dict[str, str] = json.loads(output)
        return results

    results = asyncio.run(test())
    assert len(results) == 22
    assert {what: wrong for what, wrong in results.items() if wrong} == {}
