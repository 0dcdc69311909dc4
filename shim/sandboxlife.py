"""A pod whose life its client drives apart from its containers' (containerd's Sandbox API): the same pod that
CRI's podsandbox mode makes. What it is told becomes a sandbox container's config.json, and is made of that.

It must not know messages of RPC, nor how a container or a machine is made.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from rpc.api.cri import PodSandboxConfig
from rpc.api.types import Mount
from rpc.errors import AlreadyExists, CasemateError, FailedPrecondition, InvalidArgument, NotFound
from shim import podconfig
from shim.bundle import is_containers
from shim.container import Container
from shim.creation import NewContainer
from shim.network import open_pod_network
from shim.oci import Document
from shim.pod import Pod
from shim.process import KILLED, Stopped
from shim.tasks import Tasks
from shim.wants import wants_of

TERM = 15
FILES = "casemate"
"""The directory in the pod's bundle, which containerd removes with it, where the files that it gives are."""

log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class NewSandbox:
    """What a client says of a pod that it wants. config: None where it is no CRI."""

    bundle: str
    mounts: tuple[Mount, ...]
    config: PodSandboxConfig | None
    netns_path: str
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Made:
    """A sandbox that was created. network: a descriptor of its network namespace; None for one of its own."""

    new: NewSandbox
    document: Document
    network: int | None
    gives: Mapping[str, str]
    created_ns: int


class SandboxLife:
    """Absent, created, running, over: every step at most once, in that order.

    spec: the pod's config.json, if it came with one. bring_up: enters what a pod with this config.json and
    this network has on the host, and begins its machine.
    """

    def __init__(
        self, pod: Pod, spec: Document | None, bring_up: Callable[[Document, int | None], Awaitable[None]]
    ) -> None:
        self._pod = pod
        self._spec = spec
        self._bring_up = bring_up
        self._made: Made | None = None
        self._container: Container | None = None
        self._begun = False
        self._end: Stopped | None = None
        self._over = asyncio.Event()
        self._changing = asyncio.Lock()
        self._tasks = Tasks("the end of a sandbox failed")

    @property
    def made(self) -> Made:
        """Raises NotFound before it is created."""
        if self._made is None:
            raise self._not_created(NotFound)
        return self._made

    def _not_created(self, kind: type[CasemateError]) -> CasemateError:
        return kind(f"sandbox {self._pod.identity.pod_id} was not created")

    @property
    def is_created(self) -> bool:
        return self._made is not None

    @property
    def is_ready(self) -> bool:
        return self.pid != 0

    @property
    def is_ending_or_ready(self) -> bool:
        """Whether stop() has something to wait for."""
        return self._container is not None and not self._over.is_set()

    @property
    def pid(self) -> int:
        """What stands for it on the host, as the host counts; 0 where nothing does."""
        container = self._container
        return container.pid if container is not None and not container.init.ended else 0

    @property
    def end(self) -> Stopped | None:
        """How it ended, if it has."""
        container = self._container
        return container.init.end if container is not None and container.init.ended else self._end

    async def create(self, new: NewSandbox) -> None:
        """Raises what is wrong with what is asked for, FailedPrecondition in a container's shim, and
        AlreadyExists the second time."""
        pod_id = self._pod.identity.pod_id
        if is_containers(self._spec):
            raise FailedPrecondition(
                f"sandbox {pod_id}: the bundle's config.json is a container's, which has its virtual machine",
                hint="a sandbox is one of CRI's, or its config.json has no process",
            )
        async with self._changing:
            if self._made is not None:
                raise AlreadyExists(f"sandbox {pod_id} exists already")
            document = podconfig.document_of(
                new.config, pod_id, new.netns_path, new.annotations, self._spec or {}
            )
            wants_of(document, self._pod.settings, self._pod.identity.namespace, pod_id)
            gives = {} if new.config is None else _give(new.bundle, new.config, document["hostname"])
            network = self._in_host(lambda: open_pod_network(document))
            self._made = Made(new, document, network, gives, time.time_ns())
            self._pod.occupancy.keep()

    def _in_host(self, function: Callable[[], int | None]) -> int | None:
        """The path may be of a mount that is younger than the pod's own mounts."""
        host = self._pod.identity.host
        return function() if host is None else host.run(function)

    async def start(self) -> int:
        """Its pid. Raises FailedPrecondition where it is not its turn, and why there is no machine."""
        async with self._changing:
            if self._made is None:
                raise self._not_created(FailedPrecondition)
            if self._begun or self._end is not None:
                raise FailedPrecondition(f"sandbox {self._pod.identity.pod_id} was started or stopped before")
            self._begun = True
            with ExitStack() as undo:
                undo.callback(lambda: self._is_over(Stopped(KILLED, time.time_ns())))
                self._container = await self._start(self._made)
                undo.pop_all()
            self._tasks.start(self._follow(self._container))
        return self._container.pid

    async def _start(self, made: Made) -> Container:
        pod_id = self._pod.identity.pod_id
        await self._bring_up(made.document, made.network)
        await self._pod.create(
            NewContainer(
                container_id=pod_id,
                bundle=made.new.bundle,
                mounts=made.new.mounts,
                terminal=False,
                stdin="",
                stdout="",
                stderr="",
                document=made.document,
                gives=made.gives,
            )
        )
        return await self._pod.start(pod_id)

    async def _follow(self, container: Container) -> None:
        """However it ended: asked to, with its machine, or by its pid. Nothing of it runs on."""
        await container.init.exited.wait()
        try:
            with suppress(NotFound):  # the whole pod ends
                await self._pod.delete(container.id)
            await self._pod.end_machine()
        finally:
            self._is_over(container.init.end)

    def _is_over(self, end: Stopped) -> None:
        if not self._over.is_set():
            self._end = end
            self._over.set()

    async def stop(self, timeout_s: float) -> None:
        """Ends it with all that runs in it: at once, or its containers by SIGTERM first, where there is a
        timeout. Of one that is over, nothing."""
        async with self._changing:
            if self._made is None or self._over.is_set():
                return
            container = self._container
            if container is None:  # it was not started, and will not be
                if self._made.network is not None:
                    os.close(self._made.network)
                self._is_over(Stopped(0, time.time_ns()))
                return
            if timeout_s > 0:
                await self._ask_to_end(container, timeout_s)
            await self._signal(container, TERM)
            await self._over.wait()

    async def _ask_to_end(self, sandbox: Container, timeout_s: float) -> None:
        running = [
            each for each in self._pod.containers.values() if each is not sandbox and not each.init.ended
        ]
        for container in running:
            await self._signal(container, TERM)
        if running:
            ends = [asyncio.ensure_future(container.init.exited.wait()) for container in running]
            _, late = await asyncio.wait(ends, timeout=timeout_s)
            for each in late:
                each.cancel()

    async def _signal(self, container: Container, number: int) -> None:
        try:
            await self._pod.kill(container.id, "", number)
        except NotFound:
            pass  # it has ended meanwhile
        except CasemateError as error:
            log.warning("container %s was not asked to end: %s", container.id, error)

    async def wait(self) -> Stopped:
        """How it ended, once nothing of it runs. Raises NotFound before it is created."""
        if self._made is None:
            raise self._not_created(NotFound)
        await self._over.wait()
        assert self._end is not None
        return self._end

    async def close(self) -> None:
        """With the pod, whose containers need nobody then who follows them."""
        await self._tasks.cancel()


def _give(bundle: str, config: PodSandboxConfig, hostname: str) -> dict[str, str]:
    """Files for the containers, as CRI makes them in its other mode: by place, where they are on the host."""
    if not bundle.startswith("/"):
        raise InvalidArgument(f"bundle_path {bundle!r} of the sandbox is not absolute")
    directory = Path(bundle, FILES)
    directory.mkdir(mode=0o711, exist_ok=True)
    given = {}
    for place, text in podconfig.files_of(config, hostname).items():
        path = directory / Path(place).name
        path.write_bytes(text.encode() if text is not None else _own(place))
        path.chmod(0o644)
        given[place] = str(path)
    return given


def _own(path: str) -> bytes:
    """The host's. One that has none: an empty file."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return b""
