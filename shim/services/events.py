"""What happens in a pod, told to containerd: in order, without anybody waiting for it.

A Listener is called by the pod; the Publisher behind it forwards over ttrpc, and by the client's binary
when that fails. It decides nothing.
"""

import asyncio
import logging
import time

from rpc.api import events as api
from rpc.api.types import Any, Timestamp
from rpc.client import Client
from rpc.codec import Message
from rpc.errors import CasemateError
from shim.container import Container, Process
from shim.helper import spawn
from shim.process import Stopped

# Of containerd's own shims (pkg/shim/publisher.go): how long one event may take, and how often it is tried.
FORWARD_S = 5.0
TRIES = 5
RETRY_S = 0.5  # doubled each time: 15 s in all
NAMESPACE_HEADER = "containerd-namespace-ttrpc"

log = logging.getLogger("casemate")


class Publisher:
    """One queue, one connection, made again when containerd comes back."""

    def __init__(self, namespace: str, ttrpc_address: str, address: str, binary: str) -> None:
        self._namespace = namespace
        self._ttrpc_address = ttrpc_address.removeprefix("unix://")
        self._address = address
        self._binary = binary
        self._queue: asyncio.Queue[api.Envelope | None] = asyncio.Queue()
        self._client: Client | None = None

    def publish(self, event: Message) -> None:
        self._queue.put_nowait(
            api.Envelope(
                timestamp=Timestamp.from_ns(time.time_ns()),
                namespace=self._namespace,
                topic=api.TOPICS[type(event)],
                event=Any.pack(event),
            )
        )

    def finish(self) -> None:
        """run() returns when what was published until now is forwarded."""
        self._queue.put_nowait(None)

    async def run(self) -> None:
        try:
            while (envelope := await self._queue.get()) is not None:
                await self._deliver(envelope)
        finally:
            if self._client is not None:
                await self._client.close()

    async def _deliver(self, envelope: api.Envelope) -> None:
        problem = ""
        for attempt in range(TRIES):
            try:
                async with asyncio.timeout(FORWARD_S):
                    await self._forward(envelope)
                return
            except (CasemateError, OSError, TimeoutError) as error:
                problem = str(error) or type(error).__name__
                client, self._client = self._client, None
                if client is not None:
                    await client.close()
            if attempt == 0 and await self._by_binary(envelope):
                return
            if attempt + 1 < TRIES:
                await asyncio.sleep(RETRY_S * 2**attempt)  # nothing tells when containerd is back
        log.error("event %s was not taken by containerd: %s", envelope.topic, problem)

    async def _forward(self, envelope: api.Envelope) -> None:
        if self._client is None or self._client.is_closed:
            self._client = await Client.connect_unix(self._ttrpc_address, "containerd")
        await self._client.call(
            api.FORWARD,
            api.ForwardRequest(envelope=envelope),
            metadata={NAMESPACE_HEADER: self._namespace},
        )

    async def _by_binary(self, envelope: api.Envelope) -> bool:
        """`containerd publish` reads an Any on stdin: for an old containerd without the ttrpc service."""
        if not self._binary or envelope.event is None:
            return False
        import os

        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            arguments = ["--address", self._address, "publish", "--topic", envelope.topic]
            process = spawn(
                "publisher",
                [self._binary, *arguments, "--namespace", self._namespace],
                fds={0: read},
            )
            os.write(write, envelope.event.encode())  # far less than a pipe holds
        except CasemateError as error:
            log.warning("event %s: %s", envelope.topic, error)
            return False
        finally:
            os.close(read)
            os.close(write)
        try:
            async with asyncio.timeout(FORWARD_S):
                await process.exited.wait()
        except TimeoutError:
            process.kill()
            await process.exited.wait()
        return process.status == 0


class Listener:
    """The pod's happenings in containerd's messages. What it does not know as a task has no events."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def _publish(self, container: Container, event: Message) -> None:
        if container.is_task:
            self._publisher.publish(event)

    def created(self, container: Container, bundle: str, mounts: "Sequence[Mount]") -> None:
        init = container.init
        self._publish(
            container,
            api.TaskCreate(
                container_id=container.id,
                bundle=bundle,
                rootfs=list(mounts),
                io=api.TaskIO(
                    stdin=init.stdin, stdout=init.stdout, stderr=init.stderr, terminal=init.terminal
                ),
                pid=container.pid,
            ),
        )

    def started(self, container: Container, process: Process) -> None:
        if process.exec_id:
            self._publish(
                container,
                api.TaskExecStarted(container_id=container.id, exec_id=process.exec_id, pid=container.pid),
            )
        else:
            self._publish(container, api.TaskStart(container_id=container.id, pid=container.pid))

    def exec_added(self, container: Container, process: Process) -> None:
        self._publish(container, api.TaskExecAdded(container_id=container.id, exec_id=process.exec_id))

    def exited(self, container: Container, process: Process) -> None:
        self._publish(
            container,
            api.TaskExit(
                container_id=container.id,
                id=process.exec_id or container.id,
                pid=container.pid,
                exit_status=process.end.exit_status,
                exited_at=Timestamp.from_ns(process.end.exited_at_ns),
            ),
        )

    def deleted(self, container: Container, process: Process, end: Stopped) -> None:
        if process.exec_id:
            return  # as runc's shim: only the container's own
        self._publish(
            container,
            api.TaskDelete(
                container_id=container.id,
                pid=container.pid,
                exit_status=end.exit_status,
                exited_at=Timestamp.from_ns(end.exited_at_ns),
            ),
        )

    def oom(self, container: Container) -> None:
        self._publish(container, api.TaskOOM(container_id=container.id))

    def paused(self, container: Container) -> None:
        self._publish(container, api.TaskPaused(container_id=container.id))

    def resumed(self, container: Container) -> None:
        self._publish(container, api.TaskResumed(container_id=container.id))


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from rpc.api.types import Mount
