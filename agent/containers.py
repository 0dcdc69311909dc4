"""All the containers of the guest, and what they share: crun, the reaper, the events.

Must not know of RPC methods; events are the API's messages because they are nothing but data.
"""

from __future__ import annotations

import json
import logging
import re

from agent.cgroups import OomWatch
from agent.container import Container
from agent.events import EventQueue
from agent.pod import Pod
from rpc.api.agent import NAMESPACES, Event, EventKind
from rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Coroutine, Sequence
    from typing import Any

    from agent.crun import Crun
    from agent.forward import Forward
    from agent.ids import Ids
    from agent.nameserver import NameServer
    from agent.passthrough import Passthrough
    from agent.process import Process
    from agent.reaper import Exit, Reaper
    from agent.users import Users
    from rpc.api.agent import Disk, GivenDevice

MAX_ID_BYTES = 76  # containerd's own limit
_log = logging.getLogger("casemate.agent")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)


class Guest:
    """directory: where bundles live. tasks: the group that followers of processes belong to.

    sysctl_root: None where the network is not the agent's to change (sysctls.py).
    """

    def __init__(
        self,
        crun: Crun,
        reaper: Reaper,
        oom_watch: OomWatch,
        tasks: asyncio.TaskGroup,
        directory: str,
        cgroup_root: str,
        sysctl_root: str | None,
    ) -> None:
        self.crun = crun
        self.reaper = reaper
        self.oom_watch = oom_watch
        self.events = EventQueue()
        self.directory = directory
        self.cgroup_root = cgroup_root
        self.hostname = ""  # the pod's, whatever its containers make of it
        self.share = ""  # where the host's files are, once they are
        self.writes_back = True  # whether files that nobody has open may be newer here than on the host
        self.volumes = ""  # the same files, if what is bound into a container is cached less than its root
        self.sysctl_root = sysctl_root
        self.users: Users | None = None  # of the pod, if it has a user namespace
        self._pod: Pod | None = None
        self._name_servers: dict[str, NameServer] = {}
        self._passthrough: Passthrough | None = None
        self._tasks = tasks
        self._containers: dict[str, Container] = {}

    def any_container(self) -> bool:
        return bool(self._containers)

    def container(self, container_id: str) -> Container:
        try:
            return self._containers[container_id]
        except KeyError:
            raise NotFound(f"container {container_id} does not exist") from None

    def has_others(self, container: Container) -> bool:
        """Whether any other container is in this guest, or about to be."""
        return any(each is not container for each in self._containers.values())

    def process(self, container_id: str, exec_id: str) -> Process | Forward:
        """Or what is like one. Raises NotFound."""
        if not container_id and exec_id in self._name_servers:
            return self._name_servers[exec_id]
        if self._pod is not None and container_id == self._pod.id:
            return self._pod.forward(exec_id)
        return self.container(container_id).process(exec_id)

    async def serve_names(self, address: str) -> None:
        """process("", address) is what is asked there. Raises AlreadyExists, FailedPrecondition."""
        from agent import nameserver

        if address in self._name_servers:
            raise AlreadyExists(f"name server at {address}")
        self._name_servers[address] = await nameserver.serve(address)

    async def connect(self, pod_id: str, name: str, port: int) -> None:
        """To a port of the loopback; name is that of process() from then on."""
        if self._pod is None or pod_id != self._pod.id:
            raise NotFound(f"this guest is not that of pod {pod_id}")
        await self._pod.connect(name, port)

    def make_users(self, wanted: Ids) -> Users:
        """The pod's user namespace, before anything is in it. Raises InvalidArgument, FailedPrecondition."""
        if self.sysctl_root is None:
            raise FailedPrecondition("user namespace of the pod: this agent does not own its kernel")
        if self.users is not None and self.users.ids == wanted:
            return self.users  # of a container that could not be made
        if self.users is not None or self._containers or self._pod is not None:
            raise FailedPrecondition("user namespace of the pod: there is something in the pod already")
        from agent.users import Users  # most pods have none

        users = Users(wanted)
        users.enter()
        self.users = users
        if self._passthrough is not None:
            self._passthrough.move_cards(users)
        return users

    def make_pod(self, pod_id: str, shm_path: str, shm_bytes: int, wanted: dict[str, str]) -> None:
        """What containers to come have in common. Raises as Pod.make()."""
        check_id(pod_id)
        if self._pod is not None:
            raise AlreadyExists(f"this guest is that of pod {self._pod.id}")
        pod = Pod(pod_id, f"{self.directory}-pod", self.reaper, self.users)
        pod.make(shm_path, shm_bytes, wanted, self.sysctl_root)
        self._pod = pod

    def passthrough(self) -> Passthrough:
        if self._passthrough is None:
            from agent.passthrough import Passthrough  # most guests have no such device
            from agent.transport import say

            self._passthrough = Passthrough(say=say)
        return self._passthrough

    def resolve_namespaces(self, spec: dict[str, Any]) -> None:
        """Puts paths in the place of those that stand for a container's (rpc/api/agent.py, NAMESPACES).

        Raises NotFound for a container that is not there, FailedPrecondition for one that has ended,
        InvalidArgument for a user namespace whose IDs are other ones than config.json says.
        """
        for entry in (spec.get("linux") or {}).get("namespaces") or ():
            path = entry.get("path")
            if isinstance(path, str) and path.startswith(f"{NAMESPACES}/"):
                container_id, _, kind = path.removeprefix(f"{NAMESPACES}/").partition("/")
                if kind == "user":
                    self._check_ids(container_id, spec)
                entry["path"] = self._namespace(container_id, kind)

    def name_host(self, spec: dict[str, Any]) -> None:
        """A container with a host name of its own, and none given, begins with the pod's.

        The kernel would give it the one that the pod's containers have made of that (uts_namespaces(7)).
        """
        entries = (spec.get("linux") or {}).get("namespaces") or ()
        own = any(entry.get("type") == "uts" and not entry.get("path") for entry in entries)
        if own and self.hostname and not spec.get("hostname"):
            spec["hostname"] = self.hostname

    def _check_ids(self, container_id: str, spec: dict[str, Any]) -> None:
        from agent import ids, users

        if container_id:
            there = users.of_process(self.container(container_id).running("user").pid)
        elif self.users is not None:
            there = self.users.ids
        else:
            raise FailedPrecondition("user namespace of the pod: it has none")
        if ids.of_spec(spec) != there:
            raise InvalidArgument(
                "linux.uidMappings, gidMappings: the user namespace that it names has others"
            )

    def _namespace(self, container_id: str, kind: str) -> str:
        if not container_id and kind == "user" and self.users is not None:
            return self.users.path
        if self._pod is not None and container_id == self._pod.id and kind == "pid":
            return self._pod.pid_namespace()
        return f"/proc/{self.container(container_id).running(kind).pid}/ns/{kind}"

    async def create(
        self,
        container_id: str,
        spec: bytes,
        *,
        terminal: bool,
        stdin: bool,
        disks: Sequence[Disk] = (),
        given: Sequence[GivenDevice] = (),
    ) -> int:
        check_id(container_id)
        if container_id in self._containers:
            raise AlreadyExists(f"container {container_id} exists already")
        parsed = parse_object(spec, "OCI specification")
        if not isinstance(parsed.get("process"), dict) or not isinstance(parsed.get("root"), dict):
            raise InvalidArgument("malformed OCI specification", "it lacks process or root")
        container = Container(self, container_id)
        self._containers[container_id] = container
        try:
            if disks or (parsed.get("linux") or {}).get("devices"):
                from agent import devices

                devices.make_there(parsed)
                await devices.add_disks(parsed, disks)
            if given:
                self.passthrough().add(parsed, given)
            return await container.create(parsed, terminal=terminal, stdin=stdin)
        except BaseException:
            del self._containers[container_id]
            raise

    async def exec(
        self, container_id: str, exec_id: str, process: bytes, *, terminal: bool, stdin: bool
    ) -> int:
        check_id(exec_id)
        parsed = parse_object(process, "OCI process")
        return await self.container(container_id).exec(exec_id, parsed, terminal=terminal, stdin=stdin)

    async def update(self, container_id: str, resources: bytes) -> None:
        parsed = parse_object(resources, "OCI resources")
        await self.container(container_id).update(parsed)

    async def delete(self, container_id: str, exec_id: str, *, kill: bool) -> None:
        if self._pod is not None and container_id == self._pod.id:
            self._pod.hang_up(exec_id)
            return
        container = self.container(container_id)
        if exec_id:
            await container.delete_exec(exec_id, kill=kill)
        elif await container.delete(kill=kill):
            del self._containers[container_id]

    def may_hold_data(self) -> bool:
        """Whether the host may lack what a container wrote.

        Over virtiofs every write goes there at once, save those to mapped memory: these go when the last
        process that has it mapped is gone (Linux, fs/fuse/file.c, fuse_vma_close). A sync would have the host
        write all its disk's dirty pages, which may take seconds.
        """
        return self.writes_back or any(container.cgroup.pids() for container in self._containers.values())

    def kill_all(self) -> None:
        for container in self._containers.values():
            container.cgroup.kill()

    # what containers tell

    def follow(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._tasks.create_task(self._survive(coroutine))

    async def _survive(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """What goes wrong with one container must not end the machine."""
        try:
            await coroutine
        except Exception:  # noqa: BLE001 - whatever it is: it is logged, and one container's trouble
            _log.exception("a container's process could not be followed to its end")

    def announce_exit(self, process: Process, how: Exit) -> None:
        if not process.unwanted:
            self.events.put(
                Event(
                    kind=EventKind.EXIT,
                    container_id=process.container_id,
                    exec_id=process.exec_id,
                    exit_status=how.status,
                    exited_at_ns=how.at_ns,
                )
            )
        process.settled.set()

    def announce_oom(self, container_id: str) -> None:
        self.events.put(Event(kind=EventKind.OOM, container_id=container_id))


def check_id(name: str) -> None:
    """Ids become names of directories and cgroups."""
    if len(name) > MAX_ID_BYTES or not _ID.fullmatch(name):
        raise InvalidArgument(f"{name[:MAX_ID_BYTES]!r} is no valid id")


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"malformed {what}", str(error)) from None
    if not isinstance(parsed, dict):
        raise InvalidArgument(f"malformed {what}", "not a JSON object")
    return parsed
