"""A pod on a small guest (guests.py): real events to a list, real children as anchors, a bundle on disk."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from config.load import load
from config.settings import Profile
from rpc.api import events
from rpc.codec import Message
from shim import system
from shim.anchor import Anchors
from shim.apprentice import Standby
from shim.container import Container, Process
from shim.creation import Means, NewContainer
from shim.devices import Devices
from shim.disks import Disks
from shim.helper import Watched
from shim.journal import Journal
from shim.paths import PodPaths
from shim.pod import Pod
from shim.podnetwork import PodNetwork
from shim.record import Identity
from shim.services.events import Listener, Publisher
from shim.trace import Trace
from shim.vm import sources
from shim.vm.guest import Machine
from shim.vm.setting import MachineRequest
from tests.unit.shim.guests import Guest, GuestAgent, running_guest

NAMESPACES = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network", "cgroup")]
POD = "web"


class Sleepers(Anchors):
    """Anchors without the privileges of root: children that do as little, in the host's own root."""

    def __init__(self) -> None:
        self.roots: list[str] = []
        self.pids: list[int] = []

    async def make(self, root: str) -> tuple[Watched, int]:
        self.roots.append(root)
        self.pids.append(_sleeper())
        return Watched("anchor", self.pids[-1]), self.pids[-1] + 1_000_000

    def ended(self, number: int) -> bool:
        """Whether an anchor is dead, reaped or not."""
        state = Path(f"/proc/{self.pids[number]}/stat").read_text().rpartition(") ")[2]
        return state.startswith("Z")

    def close(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _sleeper() -> int:
    return os.posix_spawn("/bin/sleep", ["sleep", "1000"], os.environ)


class Recorder(Publisher):
    """Keeps what would be told to containerd."""

    def __init__(self) -> None:
        super().__init__("default", "/nowhere.ttrpc", "/nowhere", "")
        self.events: list[Message] = []
        self._more = asyncio.Condition()

    def publish(self, event: Message) -> None:
        self.events.append(event)

    @property
    def told(self) -> list[str]:
        """Topics and whom they are about, in order: "exit web", "exec-started web/shell"."""
        return [_told(event) for event in self.events]


def _told(event: Message) -> str:
    topic = events.TOPICS[type(event)].removeprefix("/tasks/")
    fields: Any = event
    name = getattr(fields, "exec_id", "") or getattr(fields, "id", "")
    about = fields.container_id if name in ("", fields.container_id) else f"{fields.container_id}/{name}"
    status = f" {fields.exit_status}" if isinstance(event, events.TaskExit | events.TaskDelete) else ""
    return f"{topic} {about}{status}"


class PodOfTest:
    """The pod, what it was given, and short ways to ask it for things."""

    def __init__(self, pod: Pod, guest: Guest, recorder: Recorder, anchors: Sleepers, bundles: Path) -> None:
        self.pod = pod
        self.guest = guest
        self.recorder = recorder
        self.anchors = anchors
        self.bundles = bundles

    @property
    def agent(self) -> GuestAgent:
        return self.guest.agent

    @property
    def told(self) -> list[str]:
        return self.recorder.told

    def new(self, name: str = POD, document: object = None, **changes: Any) -> NewContainer:
        """What Create asks for; the bundle is written."""
        bundle = self.bundles / name
        (bundle / "rootfs").mkdir(parents=True, exist_ok=True)
        written = bundle / "config.json.new"
        written.write_text(json.dumps(config() if document is None else document))
        written.rename(bundle / "config.json")  # at once: an earlier Create may be reading it
        given: dict[str, Any] = {"mounts": (), "terminal": False, "stdin": "", "stdout": "", "stderr": ""}
        return NewContainer(container_id=name, bundle=str(bundle), **given | changes)

    async def create(self, name: str = POD, **changes: Any) -> Container:
        return await self.pod.create(self.new(name, **changes))

    async def run(self, name: str = POD, **changes: Any) -> Container:
        await self.create(name, **changes)
        return await self.pod.start(name)

    def add_exec(self, exec_id: str, name: str = POD, **changes: Any) -> Process:
        given: dict[str, Any] = {"terminal": False, "stdin": "", "stdout": "", "stderr": ""}
        process = Process(name, exec_id, **given | changes)
        self.pod.add_exec(name, process, b'{"args": ["true"]}')
        return process

    async def exit(self, name: str = POD, exec_id: str = "", status: int = 0) -> None:
        """The program ends, and the shim has taken note."""
        await self.agent.exit(name, exec_id, status)
        await self.pod.container(name).process(exec_id).exited.wait()

    def state(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.pod.paths.state.read_text())
        return document


def config(**changes: Any) -> dict[str, Any]:
    """A config.json as containerd writes them, as far as it matters here."""
    return {
        "ociVersion": "1.1.0",
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": NAMESPACES},
    } | changes


@contextmanager
def host(directory: Path) -> Iterator[None]:
    """No file of this machine's casemate is looked at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASEMATE_RUN_DIR", str(directory / "run"))
        patch.setenv("CASEMATE_CONFIG_DIR", str(directory / "etc"))
        yield


class NoNetwork(PodNetwork):
    """These pods are in the network of this machine, which is no guest's."""

    def __init__(self, machine: Machine, profile: Profile) -> None:
        pass

    def heed(self, resolv_conf: Path) -> None:
        pass

    async def settle(self) -> None:
        pass

    def follow(self) -> None:
        pass

    async def close(self) -> None:
        pass


def empty_pod(directory: Path, recorder: Publisher, anchors: Anchors) -> Pod:
    """A pod without a machine; begin() or refuse() comes next. Within host()."""
    paths = PodPaths("default", POD, directory / "run")
    paths.directory.mkdir(parents=True, exist_ok=True)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    identity = Identity("default", POD, os.getpid(), system.start_time("self"), proc)
    trace = Trace("default", POD, 1_700_000_000.0)
    standby = Standby(directory / "run/cache/hint", -1)
    journal, settings = Journal(paths.journal), load()
    devices = Devices(identity, settings, journal, trace)
    means = Means(identity, anchors, paths, journal, trace, Disks(paths.directory), devices)
    return Pod(means, settings, standby, Listener(recorder), NoNetwork)


async def close(pod: Pod) -> None:
    await pod.stop()
    pod.means.journal.close()
    os.close(pod.identity.host_proc)


@asynccontextmanager
async def running_pod(directory: Path, *, begun: bool = True) -> AsyncIterator[PodOfTest]:
    """A pod whose machine answers; stopped at the end, in whatever state the test left it. begun: whether its
    machine is there, or is once the test has called begin().
    """
    recorder, anchors = Recorder(), Sleepers()
    (directory / "bundles").mkdir()
    with host(directory), pytest.MonkeyPatch.context() as patch:
        pod = empty_pod(directory, recorder, anchors)
        async with running_guest(pod.paths.directory) as guest:

            async def source(_: MachineRequest, trace: Trace, __: sources.Wanted) -> Machine:
                return guest.machine

            # Where a machine comes from is a seam: this is one more source.
            patch.setattr(sources, "obtain", source)
            if begun:
                pod.begin(config(), 0.0)
                await pod.machine()
            try:
                yield PodOfTest(pod, guest, recorder, anchors, directory / "bundles")
            finally:
                await close(pod)
                anchors.close()
