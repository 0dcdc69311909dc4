"""A guest for the shim's tests: an agent that keeps its containers in memory, and a Machine around it.

The agent is a real ttrpc server on a real socket, QEMU and virtiofsd are real child processes (they sleep),
and the console is a real socket that words can be written to. Only what would take a minute is left out.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.api.types import Empty
from rpc.client import Client
from rpc.codec import Message
from rpc.errors import AlreadyExists, CasemateError, FailedPrecondition, NotFound
from rpc.method import Method
from rpc.server import Context, Send, Server
from shim.helper import Helper, Watched, spawn
from shim.vm.accel import Acceleration
from shim.vm.console import Console
from shim.vm.guest import Facts, Machine
from shim.vm.host import Host
from shim.vm.users import QemuUser
from tests.unit.rpc.wires import until

PIPE_BYTES = 64 << 10
CALL_S = 20.0
_ACCEL = Acceleration("tcg", "a test's")
FACTS = Facts("boot", _ACCEL, "serial", "sha256:" + "0" * 64, "6.1.0-cloud", 30 << 20, "virtiofs")


class Pipe:
    """What a program writes, bounded as the kernel's pipes are."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._closed = False
        self._changed = asyncio.Condition()

    async def write(self, data: bytes) -> None:
        view = memoryview(data)
        async with self._changed:
            while view:
                await self._changed.wait_for(lambda: len(self._data) < PIPE_BYTES)
                taken = view[: PIPE_BYTES - len(self._data)]
                self._data += taken
                view = view[len(taken) :]
                self._changed.notify_all()

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def read(self, most: int) -> tuple[bytes, bool]:
        """Some bytes, or the end."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._data or self._closed)
            data = bytes(self._data[:most])
            del self._data[:most]
            self._changed.notify_all()
            return data, self._closed and not self._data


class GuestProcess:
    """A program of the guest. state: created, running, paused, stopped."""

    def __init__(self, exec_id: str, document: bytes, terminal: bool) -> None:
        self.exec_id = exec_id
        self.document = document
        self.state = "created"
        self.pipes = {api.STDOUT: Pipe()} if terminal else {api.STDOUT: Pipe(), api.STDERR: Pipe()}
        self.stdin = bytearray()
        self.stdin_closed = asyncio.Event()
        self.signals: list[int] = []
        self.size = (0, 0)
        self.resources: list[bytes] = []


class GuestAgent:
    """Serves the agent's API. A test says what programs do, which calls fail, and which answers wait."""

    def __init__(self) -> None:
        self.server = Server()
        self.containers: dict[str, dict[str, GuestProcess]] = {}
        self.calls: list[str] = []
        self.created: list[api.CreateContainerRequest] = []
        self.fails: dict[str, CasemateError] = {}
        self.users: api.MakeUsersRequest | None = None
        self.protocol = api.PROTOCOL
        self.obeys = True
        """Whether programs end when they are sent a deadly signal."""
        self._events: asyncio.Queue[api.Event | None] = asyncio.Queue()
        self._held: dict[str, asyncio.Event] = {}
        self._reached: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        for method, handler in self._handlers().items():
            self.server.add(method, self._observed(method, handler))
        self.server.add(api.EVENTS, self._tell)

    def _handlers(self) -> dict[Method[Any, Any], Callable[[Any], Any]]:
        return {
            api.HELLO: self._hello,
            api.MOUNT_SHARE: self._mount_share,
            api.MAKE_POD: self._make_pod,
            api.MAKE_USERS: self._make_users,
            api.CONNECT: self._connect,
            api.NAME_SERVER: self._name_server,
            api.CREATE_CONTAINER: self._create,
            api.START_CONTAINER: self._start,
            api.EXEC: self._exec,
            api.SIGNAL: self._signal,
            api.DELETE: self._delete,
            api.WRITE_STDIN: self._write_stdin,
            api.CLOSE_STDIN: self._close_stdin,
            api.READ_OUTPUT: self._read_output,
            api.RESIZE: self._resize,
            api.PAUSE: self._pause,
            api.RESUME: self._resume,
            api.UPDATE: self._update,
            api.STATS: self._stats,
            api.SYNC: self._sync,
        }

    def _observed(self, method: Method[Any, Any], handler: Callable[[Any], Any]) -> Callable[..., Any]:
        async def handle(request: Message, _: Context) -> Message:
            self.calls.append(method.name)
            if method.name in self.fails:
                raise self.fails[method.name]
            answer: Message = await handler(request)
            self._reached[method.name].set()
            if method.name in self._held:
                await self._held[method.name].wait()
            return answer

        return handle

    # --- what a test does to it ---

    def hold(self, method: Method[Any, Any]) -> asyncio.Event:
        """Answers to this method wait until the event is set; what is asked is done at once."""
        self._held[method.name] = asyncio.Event()
        return self._held[method.name]

    async def calls_settle(self) -> None:
        """What was told until now is with the shim, and it has done what follows without being asked."""
        await until(self._events.empty)
        for _ in range(50):
            await asyncio.sleep(0)

    async def reached(self, method: Method[Any, Any]) -> None:
        """Returns when such a call was carried out, answered or not."""
        await self._reached[method.name].wait()

    def answer(self, method: Method[Any, Any], handler: Callable[[Any], Any]) -> None:
        """From now on this is what the agent does."""
        self.server.add(method, self._observed(method, handler))

    def process(self, container_id: str, exec_id: str = "") -> GuestProcess:
        try:
            return self.containers[container_id][exec_id]
        except KeyError:
            raise NotFound(f"{container_id}/{exec_id} does not exist in the guest") from None

    async def print(
        self, container_id: str, data: bytes, exec_id: str = "", stream: int = api.STDOUT
    ) -> None:
        """A program writes; waits as a program would when nobody reads."""
        await self.process(container_id, exec_id).pipes[stream].write(data)

    async def exit(self, container_id: str, exec_id: str = "", status: int = 0, at_ns: int = 0) -> None:
        """A program ends, with an init all execs of its container."""
        processes = self.containers[container_id]
        others = [] if exec_id else [process for name, process in processes.items() if name]
        for process in (*others, self.process(container_id, exec_id)):
            if process.state == "stopped":
                continue
            process.state = "stopped"
            for pipe in process.pipes.values():
                await pipe.close()
            code = status if process.exec_id == exec_id else 137
            self.tell(api.EventKind.EXIT, container_id, process.exec_id, code, at_ns)

    def tell(
        self, kind: api.EventKind, container_id: str, exec_id: str = "", status: int = 0, at_ns: int = 0
    ) -> None:
        """An event as it stands, true or not."""
        self._events.put_nowait(
            api.Event(
                kind=kind, container_id=container_id, exec_id=exec_id, exit_status=status, exited_at_ns=at_ns
            )
        )

    def stop_telling(self) -> None:
        """The stream of events ends, the agent does not."""
        self._events.put_nowait(None)

    # --- the agent's API ---

    async def _hello(self, request: api.HelloRequest) -> api.HelloResponse:
        self.hello = request
        return api.HelloResponse(protocol=self.protocol, kernel_release="6.1.0-cloud", monotonic_ns=10**9)

    async def _mount_share(self, _: api.MountShareRequest) -> Empty:
        return Empty()

    async def _tell(self, _: api.EventsRequest, __: Context, send: Send[api.Event]) -> None:
        while (event := await self._events.get()) is not None:
            await send(event)

    async def _connect(self, request: api.ConnectRequest) -> Empty:
        process = GuestProcess(request.exec_id, str(request.port).encode(), terminal=True)
        self.containers.setdefault(request.container_id, {})[request.exec_id] = process
        return Empty()

    async def _name_server(self, request: api.NameServerRequest) -> Empty:
        process = GuestProcess(request.address, b"", terminal=True)
        self.containers.setdefault("", {})[request.address] = process
        return Empty()

    async def _make_pod(self, request: api.MakePodRequest) -> Empty:
        return Empty()

    async def _make_users(self, request: api.MakeUsersRequest) -> Empty:
        self.users = request
        return Empty()

    async def _create(self, request: api.CreateContainerRequest) -> api.CreateContainerResponse:
        if request.container_id in self.containers:
            raise AlreadyExists(f"{request.container_id} exists in the guest")
        self.created.append(request)
        process = GuestProcess("", request.spec_json, request.terminal)
        self.containers[request.container_id] = {"": process}
        return api.CreateContainerResponse(pid=100)

    async def _start(self, request: api.ContainerRequest) -> Empty:
        process = self.process(request.container_id)
        if process.state != "created":
            raise FailedPrecondition(f"{request.container_id} is {process.state}")
        process.state = "running"
        return Empty()

    async def _exec(self, request: api.ExecRequest) -> api.ExecResponse:
        if self.process(request.container_id).state != "running":
            raise FailedPrecondition(f"{request.container_id} does not run")
        process = GuestProcess(request.exec_id, request.process_json, request.terminal)
        process.state = "running"
        self.containers[request.container_id][request.exec_id] = process
        return api.ExecResponse(pid=101)

    async def _signal(self, request: api.SignalRequest) -> Empty:
        process = self.process(request.container_id, request.exec_id)
        if process.state == "stopped":
            raise NotFound("the process has ended")
        process.signals.append(request.signal)
        if self.obeys:
            await self.exit(request.container_id, request.exec_id, 128 + request.signal)
        return Empty()

    async def _delete(self, request: api.DeleteRequest) -> Empty:
        process = self.process(request.container_id, request.exec_id)
        if process.state != "stopped" and not request.kill:
            raise FailedPrecondition(f"{request.container_id}/{request.exec_id} is {process.state}")
        del self.containers[request.container_id][request.exec_id]
        if not request.exec_id:
            del self.containers[request.container_id]
        return Empty()

    async def _write_stdin(self, request: api.WriteStdinRequest) -> Empty:
        process = self.process(request.container_id, request.exec_id)
        if process.state == "stopped":
            raise FailedPrecondition("stdin is closed")
        process.stdin += request.data
        return Empty()

    async def _close_stdin(self, request: api.CloseStdinRequest) -> Empty:
        self.process(request.container_id, request.exec_id).stdin_closed.set()
        return Empty()

    async def _read_output(self, request: api.ReadOutputRequest) -> api.ReadOutputResponse:
        pipe = self.process(request.container_id, request.exec_id).pipes[request.stream]
        data, eof = await pipe.read(request.max_bytes)
        return api.ReadOutputResponse(data=data, eof=eof)

    async def _resize(self, request: api.ResizeRequest) -> Empty:
        self.process(request.container_id, request.exec_id).size = (request.width, request.height)
        return Empty()

    async def _pause(self, request: api.ContainerRequest) -> Empty:
        self.process(request.container_id).state = "paused"
        return Empty()

    async def _resume(self, request: api.ContainerRequest) -> Empty:
        self.process(request.container_id).state = "running"
        return Empty()

    async def _update(self, request: api.UpdateRequest) -> Empty:
        self.process(request.container_id).resources.append(request.resources_json)
        return Empty()

    async def _stats(self, request: api.ContainerRequest) -> api.StatsResponse:
        self.process(request.container_id)
        return api.StatsResponse(metrics=self.metrics().encode())

    @staticmethod
    def metrics() -> Metrics:
        from rpc.api.cgroups import PidsStat

        return Metrics(pids=PidsStat(current=3, limit=10))

    async def _sync(self, _: Empty) -> Empty:
        return Empty()


class Guest:
    """A machine of a test, and the handles to break it with."""

    def __init__(self, agent: GuestAgent, machine: Machine, qemu: Watched, files: Helper) -> None:
        self.agent = agent
        self.machine = machine
        self.qemu = qemu
        self.files = files
        self.console: socket.socket
        self._hang_up: Callable[[], None]

    def hang_up(self) -> None:
        """The agent's connection ends, whatever QEMU does."""
        self._hang_up()

    async def write_console(self, text: str) -> None:
        await asyncio.get_running_loop().sock_sendall(self.console, text.encode())

    @contextmanager
    def hurried(self, method: Method[Any, Any]) -> Iterator[None]:
        """Within it the agent's answer to this method, which it holds back, is waited for only a moment. All
        that it does answer has its time, however slow this machine is.
        """
        call = self.machine.call

        async def hurried(
            asked: Method[Any, Any], request: Any, timeout_s: float | None = None, *, patient: bool = False
        ) -> Any:
            return await call(asked, request, 0.1 if asked is method else timeout_s, patient=patient)

        self.machine.call = hurried  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            self.machine.call = call  # type: ignore[method-assign]


@asynccontextmanager
async def running_guest(directory: Path) -> AsyncIterator[Guest]:
    """A machine whose agent answers. Nothing of it is left afterwards, however it ended."""
    share = directory / "shared"
    share.mkdir(parents=True, exist_ok=True)
    agent = GuestAgent()
    async with AsyncExitStack() as undo:
        qemu = spawn("QEMU", ["/bin/sleep", "1000"])
        undo.push_async_callback(qemu.end)
        log = directory / "virtiofsd.log"
        files = spawn("virtiofsd", ["/bin/sh", "-c", "echo virtiofsd: ready; exec sleep 1000"], log=str(log))
        undo.push_async_callback(files.end)
        console = Console(directory / "console.sock", directory / "console.log", 1 << 20, os.getuid())
        undo.callback(console.close)
        reading = asyncio.create_task(console.read())
        undo.callback(reading.cancel)
        here, there = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=there)
        serving = asyncio.create_task(agent.server.serve(reader, writer))
        undo.callback(serving.cancel)
        client = Client(*await asyncio.open_connection(sock=here), "the guest's agent")
        undo.push_async_callback(client.close)
        host = Host(
            directory / "libvirt",
            directory / "ram",
            QemuUser(0, "root", "root"),
            directory / "seeds",
            reach={},
        )
        machine = Machine(
            FACTS, client, qemu, files, console, share, lambda: "", CALL_S, host, undo.pop_all()
        )
        guest = Guest(agent, machine, qemu, files)
        guest._hang_up = writer.transport.abort
        guest.console = await _connect(directory / "console.sock")
        await guest.write_console("Linux boots\n")
        await until(lambda: (directory / "console.log").stat().st_size > 0 and log.stat().st_size > 0)
        power = asyncio.create_task(_until_power_off(qemu, guest))
        try:
            yield guest
        finally:
            await machine.stop()
            await power
            await asyncio.gather(serving, reading, return_exceptions=True)


async def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, str(path))
    return connection


async def _until_power_off(qemu: Watched, guest: Guest) -> None:
    """QEMU's sockets end with it."""
    await qemu.exited.wait()
    guest.hang_up()
    guest.console.close()
