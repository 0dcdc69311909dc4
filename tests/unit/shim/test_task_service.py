"""containerd's task API over a real socket: every method of both versions, on a pod with a small guest."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rpc.api import agent as agent_api
from rpc.api import task as api
from rpc.api.cgroups import Metrics
from rpc.api.options import ProcessDetails
from rpc.api.types import Any as AnyMessage
from rpc.client import Client
from rpc.codec import Message
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from rpc.method import Method
from rpc.server import Server
from shim.services.task import TaskService, checked_id
from tests.unit.rpc.wires import run, until
from tests.unit.shim.pods import POD, PodOfTest, running_pod

PROCESS = "types.containerd.io/opencontainers/runtime-spec/1/Process"


class Containerd:
    """Asks as containerd does, by the service's name of one version."""

    def __init__(self, client: Client, tested: PodOfTest, service: str) -> None:
        self.client = client
        self.tested = tested
        self.service = service
        self.shutdown = asyncio.Event()

    async def ask(self, method: Method[Any, Any], request: Any) -> Any:
        named = Method(self.service, method.name, method.request, method.response)
        return await self.client.call(named, request, timeout_s=25)

    async def create(self, name: str = POD, **changes: Any) -> api.CreateTaskResponse:
        bundle = self.tested.new(name).bundle
        request = api.CreateTaskRequest(id=name, bundle=bundle, **changes)
        answer: api.CreateTaskResponse = await self.ask(api.CREATE, request)
        return answer

    async def run(self, name: str = POD) -> int:
        created = await self.create(name)
        started = await self.ask(api.START, api.StartRequest(id=name))
        assert started.pid == created.pid
        pid: int = started.pid
        return pid

    async def exec(self, exec_id: str, name: str = POD, **changes: Any) -> None:
        spec = AnyMessage(type_url=PROCESS, value=b'{"args": ["id"]}')
        await self.ask(api.EXEC, api.ExecProcessRequest(id=name, exec_id=exec_id, spec=spec, **changes))

    async def state(self, exec_id: str = "", name: str = POD) -> api.StateResponse:
        answer: api.StateResponse = await self.ask(api.STATE, api.StateRequest(id=name, exec_id=exec_id))
        return answer


@asynccontextmanager
async def containerd(directory: Path, service: str = api.SERVICE) -> AsyncIterator[Containerd]:
    async with running_pod(directory) as tested:
        server = Server()
        path = directory / "shim.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        await server.listen_unix(listener)
        try:
            async with await Client.connect_unix(str(path), "shim") as client:
                asking = Containerd(client, tested, service)
                TaskService(tested.pod, asking.shutdown.set).register(server)
                yield asking
        finally:
            await server.close()


def test_every_method_is_served_in_both_versions(tmp_path: Path) -> None:
    server = Server()
    TaskService(None, lambda: None).register(server)  # type: ignore[arg-type]
    for service in (api.SERVICE, api.SERVICE_V3):
        for method in api.METHODS:
            server.find(service, method.name)


@pytest.mark.parametrize("service", [api.SERVICE, api.SERVICE_V3])
def test_a_task_from_create_to_shutdown(tmp_path: Path, service: str) -> None:
    async def life() -> None:
        async with containerd(tmp_path, service) as asking:
            created = await asking.create()
            assert created.pid == asking.tested.anchors.pids[0] + 1_000_000
            waiting = asyncio.create_task(asking.ask(api.WAIT, api.WaitRequest(id=POD)))
            state = await asking.state()
            assert (state.status, state.pid, state.exited_at) == (api.Status.CREATED, created.pid, None)
            await asking.ask(api.START, api.StartRequest(id=POD))
            state = await asking.state()
            assert (state.id, state.bundle) == (POD, str(tmp_path / "bundles/web"))
            assert state.status == api.Status.RUNNING
            assert not waiting.done()
            await asking.tested.exit(status=7)
            waited = await waiting
            assert waited.exit_status == 7
            state = await asking.state()
            assert (state.status, state.exit_status, state.pid) == (api.Status.STOPPED, 7, created.pid)
            assert state.exited_at == waited.exited_at
            again = await asking.ask(api.WAIT, api.WaitRequest(id=POD))
            assert again == waited
            await asking.ask(api.SHUTDOWN, api.ShutdownRequest(id=POD))
            assert not asking.shutdown.is_set(), "there is a task yet"
            deleted = await asking.ask(api.DELETE, api.DeleteRequest(id=POD))
            assert (deleted.pid, deleted.exit_status) == (created.pid, 7)
            assert deleted.exited_at == waited.exited_at
            with pytest.raises(NotFound, match="container web does not exist"):
                await asking.state()
            await asking.ask(api.SHUTDOWN, api.ShutdownRequest(id=POD))
            assert asking.shutdown.is_set()

    run(life())


def test_a_shutdown_now_does_not_wait_for_tasks(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            await asking.ask(api.SHUTDOWN, api.ShutdownRequest(id=POD, now=True))
            assert asking.shutdown.is_set()

    run(life())


def test_an_exec_from_exec_to_delete(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            pid = await asking.run()
            await asking.exec("shell", stdout=str(tmp_path / "out"))
            os.mkfifo(tmp_path / "out")
            assert (await asking.state("shell")).status == api.Status.CREATED
            waiting = asyncio.create_task(asking.ask(api.WAIT, api.WaitRequest(id=POD, exec_id="shell")))
            started = await asking.ask(api.START, api.StartRequest(id=POD, exec_id="shell"))
            assert started.pid == pid
            state = await asking.state("shell")
            assert (state.exec_id, state.stdout) == ("shell", str(tmp_path / "out"))
            assert asking.tested.agent.process(POD, "shell").document == b'{"args":["id"]}'
            await asking.ask(api.KILL, api.KillRequest(id=POD, exec_id="shell", signal=15))
            assert (await waiting).exit_status == 143
            deleted = await asking.ask(api.DELETE, api.DeleteRequest(id=POD, exec_id="shell"))
            assert deleted.exit_status == 143
            with pytest.raises(NotFound, match="exec shell"):
                await asking.state("shell")

    run(life())


def test_pids_are_the_inits_and_the_execs_with_their_names(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            pid = await asking.run()
            for name in ("first", "second"):
                await asking.exec(name)
                await asking.ask(api.START, api.StartRequest(id=POD, exec_id=name))
            await asking.tested.exit(exec_id="first")
            answer = await asking.ask(api.PIDS, api.PidsRequest(id=POD))
            init, process = answer.processes
            assert (init.pid, init.info) == (pid, None)
            assert process.pid == pid
            assert process.info.type_url == "containerd.runc.v1.ProcessDetails"
            assert ProcessDetails.decode(process.info.value).exec_id == "second"
            await asking.tested.exit()
            answer = await asking.ask(api.PIDS, api.PidsRequest(id=POD))
            assert [process.pid for process in answer.processes] == [pid], "containerd kills what has none"

    run(life())


def test_connect_is_answered_whatever_became_of_the_container(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            answer = await asking.ask(api.CONNECT, api.ConnectRequest(id="never-was"))
            assert (answer.shim_pid, answer.task_pid) == (os.getpid(), 0)
            pid = await asking.run()
            assert (await asking.ask(api.CONNECT, api.ConnectRequest(id=POD))).task_pid == pid

    run(life())


def test_pause_and_resume(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            await asking.ask(api.PAUSE, api.PauseRequest(id=POD))
            assert (await asking.state()).status == api.Status.PAUSED
            await asking.ask(api.RESUME, api.ResumeRequest(id=POD))
            assert (await asking.state()).status == api.Status.RUNNING

    run(life())


def test_statistics_are_cgroups_v2(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            answer = await asking.ask(api.STATS, api.StatsRequest(id=POD))
            assert answer.stats.type_url == "io.containerd.cgroups.v2.Metrics"
            assert Metrics.decode(answer.stats.value) == asking.tested.agent.metrics()

    run(life())


def test_statistics_that_are_nonsense_do_not_reach_containerd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nonsense:
        def encode(self) -> bytes:
            return b"\xff\xff\xff"

    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            monkeypatch.setattr(asking.tested.agent, "metrics", Nonsense)
            with pytest.raises(DataLoss, match="the guest's statistics cannot be read"):
                await asking.ask(api.STATS, api.StatsRequest(id=POD))

    run(life())


def test_a_terminal_is_resized_and_resources_are_updated(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.create(terminal=True)
            await asking.ask(api.START, api.StartRequest(id=POD))
            await asking.ask(api.RESIZE_PTY, api.ResizePtyRequest(id=POD, width=132, height=50))
            resources = AnyMessage(type_url="x", value=json.dumps({"pids": {"limit": 7}}).encode())
            await asking.ask(api.UPDATE, api.UpdateTaskRequest(id=POD, resources=resources))
            process = asking.tested.agent.process(POD)
            assert process.size == (132, 50)
            assert process.resources == [b'{"pids":{"limit":7}}']
            assert (await asking.state()).terminal

    run(life())


def test_input_ends_when_containerd_says_so(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            os.mkfifo(tmp_path / "in")
            await asking.create(stdin=str(tmp_path / "in"))
            await asking.ask(api.START, api.StartRequest(id=POD))
            process = asking.tested.agent.process(POD)
            await asking.ask(api.CLOSE_IO, api.CloseIORequest(id=POD))
            assert not process.stdin_closed.is_set()
            await asking.ask(api.CLOSE_IO, api.CloseIORequest(id=POD, stdin=True))
            await process.stdin_closed.wait()

    run(life())


def test_rootfs_and_stdio_of_a_create_are_told_in_its_event(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            os.mkfifo(tmp_path / "out")
            await asking.create(stdout=str(tmp_path / "out"))
            event: Any = asking.tested.recorder.events[0]
            assert event.bundle == str(tmp_path / "bundles/web")
            assert event.io.stdout == str(tmp_path / "out")
            assert event.pid == asking.tested.anchors.pids[0] + 1_000_000

    run(life())


@pytest.mark.parametrize(
    ("method", "request_", "error", "words"),
    [
        (api.CHECKPOINT, api.CheckpointTaskRequest(id=POD), Unimplemented, "checkpoint"),
        (api.CREATE, api.CreateTaskRequest(id="x", checkpoint="/c"), Unimplemented, "checkpoint"),
        (api.CREATE, api.CreateTaskRequest(id=""), InvalidArgument, "cannot be the id"),
        (api.CREATE, api.CreateTaskRequest(id="x", bundle="/nowhere"), NotFound, "/nowhere/config.json"),
        (api.EXEC, api.ExecProcessRequest(id=POD, exec_id="x"), InvalidArgument, "no process given"),
        (
            api.EXEC,
            api.ExecProcessRequest(id=POD, exec_id="a/b", spec=AnyMessage()),
            InvalidArgument,
            "cannot be the id",
        ),
        (
            api.EXEC,
            api.ExecProcessRequest(id="other", exec_id="x", spec=AnyMessage()),
            NotFound,
            "container other",
        ),
        (api.UPDATE, api.UpdateTaskRequest(id=POD), InvalidArgument, "no resources given"),
        (api.START, api.StartRequest(id=POD), FailedPrecondition, "running"),
        (api.DELETE, api.DeleteRequest(id=POD), FailedPrecondition, "cannot delete"),
        (api.STATE, api.StateRequest(id="other"), NotFound, "container other does not exist"),
        (api.WAIT, api.WaitRequest(id="other"), NotFound, "container other"),
        (api.WAIT, api.WaitRequest(id=POD, exec_id="x"), NotFound, "exec x"),
        (api.PIDS, api.PidsRequest(id="other"), NotFound, "container other"),
        (api.STATS, api.StatsRequest(id="other"), NotFound, "container other"),
        (api.CLOSE_IO, api.CloseIORequest(id="other", stdin=True), NotFound, "container other"),
        (api.RESIZE_PTY, api.ResizePtyRequest(id="other"), NotFound, "container other"),
        (api.KILL, api.KillRequest(id="other", signal=9), NotFound, "container other"),
    ],
)
def test_what_cannot_be_done_is_said_with_its_code(
    tmp_path: Path, method: Method[Any, Any], request_: Any, error: type[CasemateError], words: str
) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            with pytest.raises(error, match=words):
                await asking.ask(method, request_)

    run(life())


def test_what_exists_cannot_be_created_again(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            with pytest.raises(AlreadyExists, match="container web exists already"):
                await asking.create()
            await asking.exec("shell")
            with pytest.raises(AlreadyExists, match="exec shell of container web exists already"):
                await asking.exec("shell")

    run(life())


def test_a_client_that_leaves_while_it_waits_disturbs_nobody(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            leaving = await Client.connect_unix(str(tmp_path / "shim.sock"))
            waiting = asyncio.create_task(leaving.call(api.WAIT, api.WaitRequest(id=POD)))
            await asyncio.sleep(0)
            await leaving.close()
            await asyncio.gather(waiting, return_exceptions=True)
            assert (await asking.state()).status == api.Status.RUNNING

    run(life())


async def ask_and_leave(directory: Path, asking: Containerd, reached: asyncio.Event) -> None:
    """A Create of a containerd that is gone when the guest is at it."""
    leaving = await Client.connect_unix(str(directory / "shim.sock"))
    request = api.CreateTaskRequest(id=POD, bundle=asking.tested.new().bundle)
    creating = asyncio.create_task(leaving.call(api.CREATE, request))
    await reached.wait()
    await leaving.close()
    await asyncio.gather(creating, return_exceptions=True)


def test_what_changes_a_pod_is_finished_though_its_caller_left(tmp_path: Path) -> None:
    """The containerd that comes back finds the container, or can delete it."""

    async def life() -> None:
        async with containerd(tmp_path) as asking:
            reached, gate = asyncio.Event(), asyncio.Event()

            async def create(request: agent_api.CreateContainerRequest) -> Message:
                reached.set()
                await gate.wait()
                answer: Message = await asking.tested.agent._create(request)
                return answer

            asking.tested.agent.answer(agent_api.CREATE_CONTAINER, create)
            await ask_and_leave(tmp_path, asking, reached)
            gate.set()
            await until(lambda: asking.tested.told == ["create web"])
            assert (await asking.state()).status == api.Status.CREATED
            await asking.ask(api.DELETE, api.DeleteRequest(id=POD))
            assert asking.tested.pod.containers == {}

    run(life())


def test_a_create_that_fails_after_its_client_left_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            reached, gate = asyncio.Event(), asyncio.Event()

            async def create(_: agent_api.CreateContainerRequest) -> Message:
                reached.set()
                await gate.wait()
                raise NotFound("no such program")

            asking.tested.agent.answer(agent_api.CREATE_CONTAINER, create)
            await ask_and_leave(tmp_path, asking, reached)
            gate.set()
            await until(lambda: list(asking.tested.guest.machine.share.iterdir()) == [])
            await asking.tested.agent.calls_settle()
            assert asking.tested.pod.containers == {}
        gc.collect()

    run(life())
    assert "never retrieved" not in caplog.text
    assert "no such program" in caplog.text


@pytest.mark.parametrize(
    "value",
    ["", ".", "..", "a/b", "/", "a\0b", "x" * 129, pytest.param("\U0001f600" * 100, id="many bytes")],
)
def test_what_cannot_be_a_files_name_cannot_be_an_id(value: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the id"):
        checked_id(value)


@pytest.mark.parametrize("value", ["web", "a.b_c-d", "x" * 128, "..."])
def test_what_can_be_is_taken_as_it_is(value: str) -> None:
    assert checked_id(value) == value
