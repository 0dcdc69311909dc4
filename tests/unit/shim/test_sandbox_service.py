"""containerd's Sandbox API over a real socket, on a pod with a small guest: its states, and out of turn."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rpc.api import agent as agent_api
from rpc.api import cri
from rpc.api import sandbox as api
from rpc.api import task as task_api
from rpc.api.cgroups import CPUStat, Metrics
from rpc.api.types import Any as AnyMessage
from rpc.client import Client
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unimplemented,
)
from rpc.method import Method
from rpc.server import Server
from shim.main import SANDBOX_SERVICE
from shim.oci import Document
from shim.process import KILLED
from shim.sandboxlife import SandboxLife
from shim.services.sandbox import SandboxService
from shim.services.task import TaskService
from tests.unit.rpc.wires import pass_time, run, until
from tests.unit.shim.pods import POD, PodOfTest, config, running_pod

METRICS = Metrics(cpu=CPUStat(usage_usec=7))
HOSTS = Path("/etc/hosts").read_text()
NODE = cri.NamespaceMode.NODE


class Containerd:
    """Asks as containerd's controller does."""

    def __init__(self, client: Client, tested: PodOfTest, bundle: Path) -> None:
        self.client = client
        self.tested = tested
        self.bundle = bundle
        self.shutdown = asyncio.Event()
        self.documents: list[Document] = []
        """With which a machine was asked for."""
        self.failure: CasemateError | None = None

    async def bring_up(self, document: Document, network: int | None) -> None:
        assert network is None
        self.documents.append(document)
        if self.failure is not None:
            raise self.failure
        self.tested.pod.begin(document, 0.0)

    async def ask(self, method: Method[Any, Any], sandbox_id: str = POD, **fields: Any) -> Any:
        return await self.client.call(method, method.request(sandbox_id=sandbox_id, **fields), timeout_s=25)

    async def create(self, config: cri.PodSandboxConfig | None = None, **fields: Any) -> None:
        said = config or cri.PodSandboxConfig(hostname="keep", dns_config=cri.DNSConfig(servers=["10.0.0.1"]))
        given: dict[str, Any] = {"bundle_path": str(self.bundle), "options": AnyMessage.pack(said)} | fields
        await self.ask(api.CREATE, **given)

    async def run(self) -> api.StartSandboxResponse:
        await self.create()
        answer: api.StartSandboxResponse = await self.ask(api.START)
        return answer

    async def status(self, *, verbose: bool = False) -> api.SandboxStatusResponse:
        answer: api.SandboxStatusResponse = await self.ask(api.STATUS, verbose=verbose)
        return answer


@asynccontextmanager
async def containerd(directory: Path, spec: Document | None = None) -> AsyncIterator[Containerd]:
    async with running_pod(directory, begun=False) as tested:
        server, path, bundle = Server(), directory / "shim.sock", directory / "bundles" / "sandbox"
        bundle.mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        await server.listen_unix(listener)
        async with await Client.connect_unix(str(path), "shim") as client:
            asking = Containerd(client, tested, bundle)
            life = SandboxLife(tested.pod, spec, asking.bring_up)
            SandboxService(life, tested.pod, lambda: METRICS, asking.shutdown.set).register(server)
            try:
                yield asking
            finally:
                await life.close()
                await server.close()


def container_of(pid: int, **changes: Any) -> Document:
    """A config.json of CRI's, for a container of the pod that this pid stands for."""
    shared = [{"type": kind, "path": f"/proc/{pid}/ns/{kind}"} for kind in ("network", "ipc", "uts")]
    namespaces = [*({"type": "pid"}, {"type": "mount"}), *shared]
    return config(linux={"namespaces": namespaces}, **changes)


def test_a_life(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            before_ns = time.time_ns()
            await asking.create()
            created = await asking.status()
            assert (created.state, created.pid, created.exited_at) == (api.NOT_READY, 0, None)
            assert created.created_at is not None
            assert before_ns <= created.created_at.ns <= time.time_ns()
            assert asking.documents == []  # the machine is the start's
            started = await asking.ask(api.START)
            assert started.pid > 0
            assert started.created_at == created.created_at
            assert json.loads(started.spec.value) == asking.documents[0]
            assert asking.documents[0]["hostname"] == "keep"
            ready = await asking.status()
            assert (ready.state, ready.pid, ready.info) == (api.READY, started.pid, {})
            await asking.ask(api.PING)
            waiting = asyncio.ensure_future(asking.ask(api.WAIT))
            await asking.ask(api.STOP)
            ended = await waiting
            assert ended.exit_status == 0
            over = await asking.status()
            assert (over.state, over.pid, over.exited_at) == (api.NOT_READY, 0, ended.exited_at)
            assert asking.tested.guest.machine.lost.done()
            with pytest.raises(Unavailable, match="does not run"):
                await asking.ask(api.PING)
            await asking.ask(api.STOP)  # once more
            assert (await asking.ask(api.WAIT)).exited_at == ended.exited_at
            assert not asking.shutdown.is_set()
            await asking.ask(api.SHUTDOWN)
            assert asking.shutdown.is_set()
            assert asking.tested.told == []  # none of it is a task's

    run(life())


def test_every_step_has_its_turn_once(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            with pytest.raises(FailedPrecondition, match="was not created"):
                await asking.ask(api.START)
            for method in (api.STATUS, api.WAIT):
                with pytest.raises(NotFound, match="was not created"):
                    await asking.ask(method)
            await asking.ask(api.STOP)  # there is nothing to stop
            await asking.create()
            with pytest.raises(AlreadyExists, match=POD):
                await asking.create()
            with pytest.raises(AlreadyExists, match=POD):
                await asking.ask(api.CREATE, "other")
            await asking.ask(api.START)
            with pytest.raises(FailedPrecondition, match="before"):
                await asking.ask(api.START)
            await asking.ask(api.STOP)
            with pytest.raises(FailedPrecondition, match="before"):
                await asking.ask(api.START)
            with pytest.raises(AlreadyExists):
                await asking.create()

    run(life())


def test_a_sandbox_that_was_never_started_is_stopped_and_stays_so(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.create()
            await asking.ask(api.STOP)
            assert (await asking.ask(api.WAIT)).exit_status == 0
            with pytest.raises(FailedPrecondition):
                await asking.ask(api.START)
            await asking.ask(api.SHUTDOWN)
            assert asking.shutdown.is_set()
            assert asking.documents == []

    run(life())


def test_the_shim_stays_when_the_last_container_is_gone(tmp_path: Path) -> None:
    """containerd says Shutdown after each task, and asks how the sandbox is."""

    async def life() -> None:
        async with containerd(tmp_path) as asking:
            shutdown = asyncio.Event()
            server = Server()
            TaskService(asking.tested.pod, shutdown.set).register(server)
            _, say_shutdown = server.find(task_api.SERVICE, "Shutdown")
            await asking.run()
            await asking.ask(api.STOP)
            assert asking.tested.pod.containers == {}
            await say_shutdown(task_api.ShutdownRequest(id="app"), None)
            assert not shutdown.is_set()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asking.tested.pod.occupancy.abandoned(0.01), 0.2)
            assert (await asking.status()).state == api.NOT_READY

    run(life())


@pytest.mark.parametrize("method", [method for method in api.METHODS if method is not api.UPDATE], ids=repr)
def test_another_pods_sandbox_is_not_found(tmp_path: Path, method: Method[Any, Any]) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            with pytest.raises(NotFound, match=f"other: this is the shim of {POD}"):
                await asking.ask(method, "other")

    run(life())


def test_containers_have_the_pods_files_and_shared_memory(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            pid = (await asking.run()).pid
            source = tmp_path / "own-hosts"
            source.write_text("of its own")
            mounts = [
                {"destination": "/etc/hosts", "type": "bind", "source": str(source), "options": ["bind"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
            ]
            await asking.tested.run("app", document=container_of(pid, mounts=mounts))
            given = json.loads(asking.tested.agent.process("app").document)
            share = asking.tested.guest.machine.share / "app"
            seen = {
                mount["destination"]: mount["source"].removeprefix("/run/casemate/shared/app/")
                for mount in given["mounts"]
            }
            assert seen.pop("/dev/shm") == "/run/casemate/pod/shm"
            assert {place: (share / name).read_text() for place, name in seen.items()} == {
                "/etc/hosts": "of its own",
                "/etc/hostname": "keep\n",
                "/etc/resolv.conf": "nameserver 10.0.0.1\n",
            }
            assert {entry["type"] for entry in given["linux"]["namespaces"]} == {"pid", "mount", "cgroup"}
            assert (asking.bundle / "casemate/hosts").read_text() == HOSTS
            assert asking.tested.told == ["create app", "start app"]
            await asking.ask(api.STOP)
            assert asking.tested.told[2:] == [f"exit app {KILLED}"]

    run(life())


def test_a_container_that_does_not_share_the_pods_ipc_has_memory_of_its_own(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            own = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=1m"]}
            await asking.tested.run("app", document=config(mounts=[own]))
            given = json.loads(asking.tested.agent.process("app").document)
            assert given["mounts"][0] == own

    run(life())


def test_a_client_that_is_no_cri_gives_its_containers_their_files(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path, {"ociVersion": "1.1.0", "hostname": "plain"}) as asking:
            await asking.create(options=None, annotations={"its": "own"})
            await asking.ask(api.START)
            assert asking.documents[0]["hostname"] == "plain"
            assert asking.documents[0]["annotations"]["its"] == "own"
            await asking.tested.run("app")
            assert json.loads(asking.tested.agent.process("app").document)["mounts"] == []

    run(life())


# --- ends ---


def test_a_machine_that_is_lost_ends_the_sandbox(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            await asking.tested.run("app")
            waiting = asyncio.ensure_future(asking.ask(api.WAIT))
            asking.tested.guest.machine.qemu.kill()
            assert (await waiting).exit_status == KILLED
            status = await asking.status()
            assert (status.state, status.pid) == (api.NOT_READY, 0)
            await asking.ask(api.STOP)
            await asking.ask(api.SHUTDOWN)

    run(life())


def test_a_shutdown_in_the_middle_of_an_end_waits_for_it(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            asking.tested.agent.hold(agent_api.SYNC)
            stopping = asyncio.ensure_future(asking.ask(api.STOP))
            await until(lambda: "Sync" in asking.tested.agent.calls)
            ending = asyncio.ensure_future(asking.ask(api.SHUTDOWN))
            await asyncio.wait([ending], timeout=0.1)
            assert not asking.shutdown.is_set()
            asking.tested.guest.machine.qemu.kill()
            await asyncio.gather(stopping, ending)
            assert asking.shutdown.is_set()
            assert asking.tested.pod.containers == {}

    run(life())


def test_who_kills_what_stands_for_it_on_the_host_ends_its_machine(tmp_path: Path) -> None:
    """A client that has seen its end asks for no stop any more: CRI goes straight to the removal."""

    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            os.kill(asking.tested.anchors.pids[0], signal.SIGKILL)
            assert (await asking.ask(api.WAIT)).exit_status == KILLED
            assert asking.tested.guest.machine.qemu.exited.is_set()

    run(life())


def test_containers_are_asked_to_end_for_as_long_as_a_stop_may_take(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            await asking.tested.run("polite")
            await asking.tested.run("deaf")
            asking.tested.agent.obeys = False
            stopping = asyncio.ensure_future(asking.ask(api.STOP, timeout_secs=15))
            processes = [asking.tested.agent.process(name) for name in ("polite", "deaf")]
            await until(lambda: [each.signals for each in processes] == [[signal.SIGTERM]] * 2)
            await asking.tested.exit("polite", status=3)
            assert (await asking.status()).state == api.READY
            assert not stopping.done()
            pass_time(15)
            await stopping
            assert [line for line in asking.tested.told if line.startswith("exit")] == [
                *("exit polite 3", f"exit deaf {KILLED}")
            ]

    run(life())


def test_a_stop_waits_no_longer_than_the_containers(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.run()
            await asking.tested.run("polite")
            await asking.ask(api.STOP, timeout_secs=1000)
            assert f"exit polite {128 + signal.SIGTERM}" in asking.tested.told

    run(life())


def test_a_start_that_fails_says_why_and_is_the_sandboxs_end(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.create()
            asking.failure = FailedPrecondition("cgroup /none: no such")
            waiting = asyncio.ensure_future(asking.ask(api.WAIT))
            with pytest.raises(FailedPrecondition, match="cgroup /none"):
                await asking.ask(api.START)
            assert (await waiting).exit_status == KILLED
            assert (await asking.status()).state == api.NOT_READY
            await asking.ask(api.STOP)
            await asking.ask(api.SHUTDOWN)
            assert asking.shutdown.is_set()

    run(life())


def test_a_start_that_hangs_does_not_hold_up_the_shutdown(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            await asking.create()
            asking.tested.agent.hold(agent_api.MAKE_POD)
            starting = asyncio.ensure_future(asking.ask(api.START))
            await until(lambda: "MakePod" in asking.tested.agent.calls)
            await asking.ask(api.SHUTDOWN)
            assert asking.shutdown.is_set()
            asking.tested.guest.machine.qemu.kill()
            with pytest.raises(CasemateError):
                await starting

    run(life())


# --- what is refused ---


def test_what_a_machine_cannot_have_is_refused_before_there_is_one(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            context = cri.LinuxSandboxSecurityContext(namespace_options=cri.NamespaceOption(network=NODE))
            said = cri.PodSandboxConfig(linux=cri.LinuxPodSandboxConfig(security_context=context))
            with pytest.raises(Unimplemented, match="host network"):
                await asking.create(said)
            with pytest.raises(InvalidArgument, match="network namespace /nowhere"):
                await asking.create(netns_path="/nowhere")
            with pytest.raises(InvalidArgument, match=r"/etc/hostname: it is none"):
                await asking.create(netns_path="/etc/hostname")
            with pytest.raises(InvalidArgument, match="host's own"):
                await asking.create(netns_path="/proc/thread-self/ns/net")
            with pytest.raises(InvalidArgument, match="bundle_path"):
                await asking.create(bundle_path="")
            with pytest.raises(InvalidArgument, match=r"options of type some\.Other"):
                await asking.create(options=AnyMessage(type_url="some.Other"))
            await asking.create()  # none of these was the pod's creation

    run(life())


def test_a_containers_shim_is_no_sandboxs(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path, config()) as asking:
            with pytest.raises(FailedPrecondition, match=r"config\.json is a container's"):
                await asking.create()

    run(life())


def test_an_update_is_refused_as_containerd_expects(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            with pytest.raises(Unimplemented, match="UpdateSandbox: a virtual machine has what"):
                await asking.ask(api.UPDATE)

    run(life())


# --- what is shown ---


def test_what_is_shown_of_a_sandbox(tmp_path: Path) -> None:
    async def life() -> None:
        async with containerd(tmp_path) as asking:
            pid = (await asking.run()).pid
            info = (await asking.status(verbose=True)).info
            assert (info["pid"], info["state"], info["networkSandboxPath"]) == (str(pid), api.READY, "")
            shown = json.loads(info["info"])
            assert (shown["pid"], shown["processStatus"]) == (pid, "running")
            assert shown["runtimeSpec"] == asking.documents[0]
            assert json.loads(info["casemate"])["containers"][0]["id"] == POD
            platform = (await asking.ask(api.PLATFORM)).platform
            machine = {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine]
            assert (platform.os, platform.architecture) == ("linux", machine)
            metrics = (await asking.ask(api.METRICS)).metrics
            assert (metrics.id, metrics.data) == (POD, AnyMessage.pack(METRICS))
            assert metrics.timestamp.ns > 0

    run(life())


def test_a_shim_that_is_asked_for_no_sandbox_has_none_of_it_in_its_memory() -> None:
    code = "import shim.main, shim.daemon, node.zygote, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    late = {"rpc.api.sandbox", "rpc.api.cri", "shim.sandboxlife", "shim.services.sandbox", "shim.usage"}
    assert late.isdisjoint(loaded.split())
    assert SANDBOX_SERVICE == api.SERVICE
