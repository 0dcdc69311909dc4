"""containerd's task API on a pod: every method is a translation, none decides anything."""

import os

from rpc.api import task as api
from rpc.api.options import ProcessDetails
from rpc.api.types import Any, Empty, ProcessInfo, Timestamp
from rpc.errors import InvalidArgument, Unimplemented
from rpc.server import Context, Server
from shim.container import Process
from shim.creation import NewContainer
from shim.pod import Pod
from shim.process import Stopped
from shim.services.settled import Settled

METRICS = "io.containerd.cgroups.v2.Metrics"


class TaskService:
    """Serves containerd.task.v2.Task and v3.Task. on_shutdown is called when nothing is left to serve."""

    def __init__(self, pod: Pod, on_shutdown: "Callable[[], None]") -> None:
        self._pod = pod
        self._on_shutdown = on_shutdown
        self._settled = Settled()

    def register(self, server: Server) -> None:
        for name in (api.SERVICE, api.SERVICE_V3):
            server.add(api.STATE, self.state, name)
            server.add(api.CREATE, self.create, name)
            server.add(api.START, self.start, name)
            server.add(api.DELETE, self.delete, name)
            server.add(api.PIDS, self.pids, name)
            server.add(api.PAUSE, self.pause, name)
            server.add(api.RESUME, self.resume, name)
            server.add(api.CHECKPOINT, self.checkpoint, name)
            server.add(api.KILL, self.kill, name)
            server.add(api.EXEC, self.exec, name)
            server.add(api.RESIZE_PTY, self.resize_pty, name)
            server.add(api.CLOSE_IO, self.close_io, name)
            server.add(api.UPDATE, self.update, name)
            server.add(api.WAIT, self.wait, name)
            server.add(api.STATS, self.stats, name)
            server.add(api.CONNECT, self.connect, name)
            server.add(api.SHUTDOWN, self.shutdown, name)

    async def create(self, request: api.CreateTaskRequest, _: Context) -> api.CreateTaskResponse:
        if request.checkpoint:
            raise Unimplemented("checkpoint: a VM's container cannot be restored from one")
        container = await self._settled(
            self._pod.create(
                NewContainer(
                    container_id=checked_id(request.id),
                    bundle=request.bundle,
                    mounts=tuple(request.rootfs),
                    terminal=request.terminal,
                    stdin=request.stdin,
                    stdout=request.stdout,
                    stderr=request.stderr,
                )
            )
        )
        return api.CreateTaskResponse(pid=container.pid)

    async def start(self, request: api.StartRequest, _: Context) -> api.StartResponse:
        return api.StartResponse(pid=(await self._settled(self._pod.start(request.id, request.exec_id))).pid)

    async def state(self, request: api.StateRequest, _: Context) -> api.StateResponse:
        container = self._pod.container(request.id)
        process = container.process(request.exec_id)
        end = process.state if isinstance(process.state, Stopped) else None
        return api.StateResponse(
            id=request.id,
            bundle=container.bundle,
            pid=container.pid,
            status=process.state.status,
            stdin=process.stdin,
            stdout=process.stdout,
            stderr=process.stderr,
            terminal=process.terminal,
            exit_status=end.exit_status if end else 0,
            exited_at=Timestamp.from_ns(end.exited_at_ns) if end else None,
            exec_id=request.exec_id,
        )

    async def wait(self, request: api.WaitRequest, _: Context) -> api.WaitResponse:
        process = self._pod.container(request.id).process(request.exec_id)
        await process.exited.wait()
        return api.WaitResponse(
            exit_status=process.end.exit_status, exited_at=Timestamp.from_ns(process.end.exited_at_ns)
        )

    async def delete(self, request: api.DeleteRequest, _: Context) -> api.DeleteResponse:
        pid, end = await self._settled(self._pod.delete(request.id, request.exec_id))
        return api.DeleteResponse(
            pid=pid, exit_status=end.exit_status, exited_at=Timestamp.from_ns(end.exited_at_ns)
        )

    async def kill(self, request: api.KillRequest, _: Context) -> Empty:
        await self._settled(
            self._pod.kill(request.id, request.exec_id, request.signal, everything=request.all)
        )
        return Empty()

    async def exec(self, request: api.ExecProcessRequest, _: Context) -> Empty:
        if request.spec is None:
            raise InvalidArgument(f"exec {request.exec_id}: no process given")
        process = Process(
            request.id,
            checked_id(request.exec_id),
            request.terminal,
            request.stdin,
            request.stdout,
            request.stderr,
        )
        self._pod.add_exec(request.id, process, bytes(request.spec.value))
        return Empty()

    async def pids(self, request: api.PidsRequest, _: Context) -> api.PidsResponse:
        container = self._pod.container(request.id)
        processes = [ProcessInfo(pid=container.pid)]
        for process in container.execs.values():
            if not process.ended:
                details = Any.pack(ProcessDetails(exec_id=process.exec_id))
                processes.append(ProcessInfo(pid=container.pid, info=details))
        return api.PidsResponse(processes=processes)

    async def pause(self, request: api.PauseRequest, _: Context) -> Empty:
        await self._settled(self._pod.pause(request.id))
        return Empty()

    async def resume(self, request: api.ResumeRequest, _: Context) -> Empty:
        await self._settled(self._pod.resume(request.id))
        return Empty()

    async def checkpoint(self, request: api.CheckpointTaskRequest, _: Context) -> Empty:
        raise Unimplemented("checkpoint: a VM's container cannot be checkpointed")

    async def resize_pty(self, request: api.ResizePtyRequest, _: Context) -> Empty:
        await self._pod.resize(request.id, request.exec_id, request.width, request.height)
        return Empty()

    async def close_io(self, request: api.CloseIORequest, _: Context) -> Empty:
        process = self._pod.container(request.id).process(request.exec_id)
        if request.stdin:
            process.close_stdin()
        return Empty()

    async def update(self, request: api.UpdateTaskRequest, _: Context) -> Empty:
        if request.resources is None:
            raise InvalidArgument("update: no resources given")
        await self._settled(self._pod.update(request.id, bytes(request.resources.value)))
        return Empty()

    async def stats(self, request: api.StatsRequest, _: Context) -> api.StatsResponse:
        metrics = await self._pod.stats(request.id)
        return api.StatsResponse(stats=Any(type_url=METRICS, value=metrics))

    async def connect(self, request: api.ConnectRequest, _: Context) -> api.ConnectResponse:
        """Never NotFound: containerd asks after its own restart, whatever became of the container."""
        container = self._pod.containers.get(request.id)
        return api.ConnectResponse(
            shim_pid=self._pod.identity.pid, task_pid=container.pid if container else 0, version="v2"
        )

    async def shutdown(self, request: api.ShutdownRequest, _: Context) -> Empty:
        over = not self._pod.containers and not self._pod.occupancy.kept
        if over or request.now:
            self._on_shutdown()
        return Empty()


def checked_id(value: str) -> str:
    """Ids become names of files and cgroups here. containerd's own rule is stricter; we do not rely on it."""
    if not value or len(value.encode()) > 128 or value in (".", "..") or os.sep in value or "\0" in value:
        raise InvalidArgument(f"{value!r} cannot be the id of a container or an exec")
    return value


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
