"""The agent's API on top of the guest: translates requests into calls, holds no logic of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import time

from agent import system
from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.errors import FailedPrecondition, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent.containers import Guest
    from agent.network import Network
    from agent.spans import Spans
    from agent.transport import Line
    from rpc.server import Context, Server

VERSION = "0.1.0"
FILES_CONNECT_S = 5.0


class AgentService:
    """line is None where the agent does not own the machine it runs on (it is being tried out as an ordinary
    process): clock, host name, entropy, mounts and power are then left alone."""

    def __init__(self, guest: Guest, spans: Spans, line: Line | None) -> None:
        self.ending = asyncio.Event()
        self.prepared = False
        self._guest = guest
        self._spans = spans
        self._line = line
        self._first_hello_may_be_stale = line is not None and line.kind == "serial"
        self._network: Network | None = None

    def register(self, server: Server) -> None:
        server.add(api.HELLO, self.hello)
        server.add(api.MOUNT_SHARE, self.mount_share)
        server.add(api.MAKE_POD, self.make_pod)
        server.add(api.MAKE_USERS, self.make_users)
        server.add(api.CONNECT, self.connect)
        server.add(api.NAME_SERVER, self.name_server)
        server.add(api.CREATE_CONTAINER, self.create_container)
        server.add(api.START_CONTAINER, self.start_container)
        server.add(api.EXEC, self.exec)
        server.add(api.SIGNAL, self.signal)
        server.add(api.DELETE, self.delete)
        server.add(api.WRITE_STDIN, self.write_stdin)
        server.add(api.CLOSE_STDIN, self.close_stdin)
        server.add(api.READ_OUTPUT, self.read_output)
        server.add(api.RESIZE, self.resize)
        server.add(api.PAUSE, self.pause)
        server.add(api.RESUME, self.resume)
        server.add(api.UPDATE, self.update)
        server.add(api.NETWORK, self.network)
        server.add(api.DEVICES, self.devices)
        server.add(api.STATS, self.stats)
        server.add(api.EVENTS, self.events)
        server.add(api.CLOCK, self.clock)
        server.add(api.SYNC, self.sync)
        server.add(api.PREPARE, self.prepare)
        server.add(api.REHEARSE, self.rehearse)
        server.add(api.SHUTDOWN, self.shutdown)

    # the machine

    async def hello(self, request: api.HelloRequest, context: Context) -> api.HelloResponse:
        if request.protocol != api.PROTOCOL:
            raise InvalidArgument(
                f"the shim speaks agent protocol {request.protocol}, this guest image {api.PROTOCOL}",
                hint="build the guest image anew: casemate image build",
            )
        if request.hostname:
            self._guest.hostname = request.hostname
        if self._line is not None:
            if request.entropy:
                system.add_entropy(request.entropy)
            if request.realtime_ns:
                system.set_clock(request.realtime_ns, only_forward=self._first_hello_may_be_stale)
                self._first_hello_may_be_stale = False
            if request.hostname:
                system.set_hostname(request.hostname)
        total, used = system.memory_bytes()
        return api.HelloResponse(
            protocol=api.PROTOCOL,
            version=VERSION,
            kernel_release=os.uname().release,
            python=sys.version.split()[0],
            monotonic_ns=time.monotonic_ns(),
            spans=[
                api.GuestSpan(name=name, start_ns=start_ns, end_ns=end_ns)
                for name, start_ns, end_ns in self._spans.all()
            ],
            rss_bytes=system.rss_bytes(),
            memory_total_bytes=total,
            memory_used_bytes=used,
        )

    async def mount_share(self, request: api.MountShareRequest, context: Context) -> Empty:
        system.ensure_file_system(request.fstype)
        if request.fstype == "9p":
            await self._mount_9p(request)
        else:
            system.mount_share(request.tag, request.path, request.fstype, request.options)
        if request.volumes:
            self._guest.volumes = request.path
        else:
            self._guest.share = request.path
        self._guest.writes_back = request.fstype != "virtiofs"
        return Empty()

    async def _mount_9p(self, request: api.MountShareRequest) -> None:
        if self._line is None:
            raise FailedPrecondition("this agent has no line to a file server")
        with await self._line.connect_files(FILES_CONNECT_S) as connection:
            number = connection.fileno()
            options = [*request.options, "trans=fd", f"rfdno={number}", f"wfdno={number}"]
            system.mount_share(request.tag, request.path, request.fstype, options)

    async def network(self, request: api.NetworkRequest, context: Context) -> Empty:
        if self._line is None:
            raise FailedPrecondition("this agent does not own its network")
        if self._network is None:
            from agent.network import Network

            self._network = Network(self._guest.users)
        await self._network.apply(request)
        return Empty()

    async def name_server(self, request: api.NameServerRequest, context: Context) -> Empty:
        await self._guest.serve_names(request.address)
        return Empty()

    async def devices(self, request: api.DevicesRequest, context: Context) -> api.DevicesResponse:
        found = await self._guest.passthrough().come_up(request.devices, request.limit_ms / 1000)
        return api.DevicesResponse(devices=found)

    async def sync(self, request: Empty, context: Context) -> Empty:
        if self._guest.may_hold_data():
            await system.sync(system.SYNC_S)
        return Empty()

    async def prepare(self, request: Empty, context: Context) -> Empty:
        if self._guest.any_container():
            raise FailedPrecondition("a guest that has containers cannot become a template")
        from agent.rehearsal import empty_free_memory, rehearse

        await rehearse(self._guest)
        empty_free_memory(system.free_bytes())
        self._spans.forget()
        self.prepared = True
        self.ending.set()
        return Empty()

    async def rehearse(self, request: Empty, context: Context) -> Empty:
        if self._guest.any_container():
            raise FailedPrecondition("a guest that has containers needs no rehearsal")
        from agent.rehearsal import rehearse

        await rehearse(self._guest)
        return Empty()

    async def shutdown(self, request: Empty, context: Context) -> Empty:
        self._guest.kill_all()
        self.ending.set()
        return Empty()

    # containers

    async def make_pod(self, request: api.MakePodRequest, context: Context) -> Empty:
        self._guest.make_pod(request.container_id, request.shm_path, request.shm_bytes, request.sysctls)
        return Empty()

    async def make_users(self, request: api.MakeUsersRequest, context: Context) -> Empty:
        from agent import ids  # most pods have no user namespace

        uids, gids = (
            [(line.inside, line.outside, line.size) for line in mapping]
            for mapping in (request.uids, request.gids)
        )
        wanted = ids.Ids(uids, gids)
        if self._network is None:
            self._guest.make_users(wanted)
        else:
            await self._network.move(lambda: self._guest.make_users(wanted))
        return Empty()

    async def connect(self, request: api.ConnectRequest, context: Context) -> Empty:
        await self._guest.connect(request.container_id, request.exec_id, request.port)
        return Empty()

    async def create_container(
        self, request: api.CreateContainerRequest, context: Context
    ) -> api.CreateContainerResponse:
        pid = await self._guest.create(
            request.container_id,
            request.spec_json,
            terminal=request.terminal,
            stdin=request.stdin,
            disks=request.disks,
            given=request.devices,
        )
        return api.CreateContainerResponse(pid=pid)

    async def start_container(self, request: api.ContainerRequest, context: Context) -> Empty:
        await self._guest.container(request.container_id).start()
        return Empty()

    async def exec(self, request: api.ExecRequest, context: Context) -> api.ExecResponse:
        pid = await self._guest.exec(
            request.container_id,
            request.exec_id,
            request.process_json,
            terminal=request.terminal,
            stdin=request.stdin,
        )
        return api.ExecResponse(pid=pid)

    async def signal(self, request: api.SignalRequest, context: Context) -> Empty:
        container = self._guest.container(request.container_id)
        container.signal(request.exec_id, request.signal, everyone=request.all)
        return Empty()

    async def delete(self, request: api.DeleteRequest, context: Context) -> Empty:
        await self._guest.delete(request.container_id, request.exec_id, kill=request.kill)
        return Empty()

    async def pause(self, request: api.ContainerRequest, context: Context) -> Empty:
        await self._guest.container(request.container_id).pause()
        return Empty()

    async def resume(self, request: api.ContainerRequest, context: Context) -> Empty:
        await self._guest.container(request.container_id).resume()
        return Empty()

    async def update(self, request: api.UpdateRequest, context: Context) -> Empty:
        await self._guest.update(request.container_id, request.resources_json)
        return Empty()

    async def stats(self, request: api.ContainerRequest, context: Context) -> api.StatsResponse:
        metrics = self._guest.container(request.container_id).cgroup.metrics()
        return api.StatsResponse(metrics=metrics.encode())

    async def clock(self, request: api.ClockRequest, context: Context) -> api.ClockResponse:
        realtime_ns = time.time_ns()
        if request.adjust_ns and self._line is not None:
            system.adjust_clock(request.adjust_ns)
        return api.ClockResponse(realtime_ns=realtime_ns)

    # streams

    async def write_stdin(self, request: api.WriteStdinRequest, context: Context) -> Empty:
        await self._guest.process(request.container_id, request.exec_id).stdin().write(request.data)
        return Empty()

    async def close_stdin(self, request: api.CloseStdinRequest, context: Context) -> Empty:
        await self._guest.process(request.container_id, request.exec_id).stdin().finish()
        return Empty()

    async def read_output(self, request: api.ReadOutputRequest, context: Context) -> api.ReadOutputResponse:
        process = self._guest.process(request.container_id, request.exec_id)
        data = await process.stdio.output(request.stream).read(request.max_bytes)
        return api.ReadOutputResponse(data=data, eof=not data)

    async def resize(self, request: api.ResizeRequest, context: Context) -> Empty:
        process = self._guest.process(request.container_id, request.exec_id)
        process.stdio.resize(request.width, request.height)
        return Empty()

    async def events(
        self,
        request: api.EventsRequest,
        context: Context,
        send: Callable[[api.Event], Awaitable[None]],
    ) -> None:
        with self._guest.events.subscribe() as events:
            while True:
                await send(await events.first())
                events.drop_first()
