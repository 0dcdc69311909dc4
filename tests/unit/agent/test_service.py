"""The agent's API from end to end, over a connection, with a stand-in for crun that isolates nothing."""

import asyncio
import json
import os
import socket
import stat
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.cgroups import OomWatch
from agent.containers import Guest
from agent.crun import Crun
from agent.reaper import Reaper
from agent.services import AgentService
from agent.spans import Spans
from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.api.types import Empty
from rpc.client import Client, Stream
from rpc.errors import AlreadyExists, FailedPrecondition, Internal, InvalidArgument, NotFound
from rpc.server import Server
from tests.unit.agent.waiting import as_subreaper
from tests.unit.rpc.wires import until as at_once


@pytest.fixture(autouse=True)
def subreaper() -> Iterator[None]:
    """What crun leaves behind becomes ours, as it becomes PID 1's in a guest."""
    with as_subreaper():
        yield


class Shim:
    """The other end: the calls that the tests make."""

    def __init__(self, client: Client, service: AgentService, guest: Guest, directory: Path) -> None:
        self.client = client
        self.service = service
        self.guest = guest
        self.directory = directory
        self._stream: Stream[api.EventsRequest, api.Event] | None = None

    async def create(
        self, name: str, *args: str, stdin: bool = False, fail: str = "", linux: object = None
    ) -> int:
        spec = {
            "process": {"args": list(args), "env": ["PATH=/usr/bin:/bin"], "cwd": "/"},
            "root": {"path": "/"},
            "annotations": {"fail": fail} if fail else {},
            **({} if linux is None else {"linux": linux}),
        }
        request = api.CreateContainerRequest(
            container_id=name, spec_json=json.dumps(spec).encode(), stdin=stdin
        )
        return (await self.client.call(api.CREATE_CONTAINER, request)).pid

    async def start(self, name: str) -> None:
        await self.client.call(api.START_CONTAINER, api.ContainerRequest(container_id=name))

    async def exec(self, name: str, exec_id: str, *args: str) -> int:
        process = {"args": list(args), "env": ["PATH=/usr/bin:/bin"]}
        request = api.ExecRequest(
            container_id=name, exec_id=exec_id, process_json=json.dumps(process).encode()
        )
        return (await self.client.call(api.EXEC, request)).pid

    async def call(self, method: Any, **fields: Any) -> Any:
        return await self.client.call(method, method.request(**fields))

    async def output(self, name: str, exec_id: str = "", stream: int = api.STDOUT) -> bytes:
        data = b""
        while True:
            answer = await self.call(api.READ_OUTPUT, container_id=name, exec_id=exec_id, stream=stream)
            if answer.eof:
                return data
            data += answer.data

    async def events(self, count: int) -> list[api.Event]:
        """The next ones of the one stream that there is."""
        if self._stream is None:
            self._stream = self.client.stream(api.EVENTS, api.EventsRequest())
            await self._stream.__aenter__()
        return [await anext(self._stream) for _ in range(count)]


Scenario = Callable[[Shim], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Scenario], None]:
    crun = tmp_path / "crun"
    source = Path(__file__).with_name("minicrun.py").read_text()
    crun.write_text(f"#!{sys.executable} -IS\n{source}")
    crun.chmod(crun.stat().st_mode | stat.S_IXUSR)

    async def main(scenario: Scenario) -> None:
        loop = asyncio.get_running_loop()
        reaper = Reaper()
        reaper.install(loop)
        oom_watch = OomWatch(loop)
        ours, theirs = socket.socketpair()
        async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
            guest = Guest(
                Crun(reaper, str(tmp_path / "state"), str(crun)),
                reaper,
                oom_watch,
                tasks,
                str(tmp_path / "bundles"),
                str(tmp_path / "cgroup"),
                str(tmp_path / "sys"),
            )
            service = AgentService(guest, Spans(0), None)
            server = Server()
            service.register(server)
            serving = tasks.create_task(server.serve(*await asyncio.open_connection(sock=ours)))
            client = Client(*await asyncio.open_connection(sock=theirs))
            try:
                await scenario(Shim(client, service, guest, tmp_path))
            finally:
                await client.close()
                await serving
                oom_watch.close()
                reaper.close(loop)

    return lambda scenario: asyncio.run(main(scenario))


def test_a_host_name_of_a_containers_own_begins_as_the_pods(run: Callable[[Scenario], None]) -> None:
    async def made_of(shim: Shim, *namespaces: dict[str, str]) -> Any:
        await shim.create("c", "sleep", "100", linux={"namespaces": list(namespaces)})
        spec = json.loads((shim.directory / "bundles/c/config.json").read_text())
        await end(shim, "c")
        return spec.get("hostname")

    async def scenario(shim: Shim) -> None:
        assert await made_of(shim, {"type": "uts"}) is None
        await shim.call(api.HELLO, protocol=api.PROTOCOL, hostname="pod")
        assert await made_of(shim, {"type": "ipc"}, {"type": "uts"}) == "pod"
        assert await made_of(shim, {"type": "uts", "path": "/proc/1/ns/uts"}) is None
        assert await made_of(shim, {"type": "ipc"}) is None
        given: dict[str, Any] = {"hostname": "own", "linux": {"namespaces": [{"type": "uts"}]}}
        shim.guest.name_host(given)
        assert given["hostname"] == "own"

    run(scenario)


def test_an_agent_that_owns_no_kernel_makes_no_users(run: Callable[[Scenario], None]) -> None:
    line = api.IdRange(inside=0, outside=100000, size=65536)

    async def scenario(shim: Shim) -> None:
        shim.guest.sysctl_root = None
        with pytest.raises(FailedPrecondition, match="does not own its kernel"):
            await shim.call(api.MAKE_USERS, uids=[line], gids=[line])
        refused = ((api.POD_USERS, "it has none"), (f"{api.NAMESPACES}/gone/user", "gone does not exist"))
        for path, words in refused:
            users = {"namespaces": [{"type": "user", "path": path}]}
            with pytest.raises((FailedPrecondition, NotFound), match=words):
                await shim.create("c", "true", linux={**users, **MAPPED})
        own = {"namespaces": [{"type": "user"}], **MAPPED}
        await shim.create("first", "sleep", "100", linux=own)
        users = {"namespaces": [{"type": "user", "path": f"{api.NAMESPACES}/first/user"}]}
        with pytest.raises(InvalidArgument, match="the user namespace that it names has others"):
            await shim.create("c", "true", linux={**users, **MAPPED})  # minicrun has made none
        await end(shim, "first")

    run(scenario)


MAPPED = {
    name: [{"containerID": 0, "hostID": 100000, "size": 65536}] for name in ("uidMappings", "gidMappings")
}


def test_a_containers_life(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        pid = await shim.create("c", "sh", "-c", "echo out; echo err >&2; exit 9")
        assert os.path.exists(f"/proc/{pid}")  # noqa: ASYNC240
        assert (shim.directory / "bundles/c/config.json").exists()
        await shim.start("c")
        assert await shim.output("c") == b"out\n"
        assert await shim.output("c", stream=api.STDERR) == b"err\n"
        (event,) = await shim.events(1)
        assert (event.kind, event.container_id, event.exec_id) == (api.EventKind.EXIT, "c", "")
        assert event.exit_status == 9
        assert event.exited_at_ns > 0
        await shim.call(api.DELETE, container_id="c")
        assert list((shim.directory / "bundles").iterdir()) == []
        assert list((shim.directory / "state").iterdir()) == []
        with pytest.raises(NotFound):
            await shim.call(api.DELETE, container_id="c")

    run(scenario)


def test_a_guest_that_has_containers_does_not_become_a_template(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        with pytest.raises(FailedPrecondition, match="cannot become a template"):
            await shim.client.call(api.PREPARE, Empty())
        assert not shim.service.prepared
        assert not shim.service.ending.is_set()
        await end(shim, "c")

    run(scenario)


def test_the_cgroup_is_ours_to_name(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        spec = json.loads((shim.directory / "bundles/c/config.json").read_text())
        assert spec["linux"]["cgroupsPath"] == "/containers/c"
        assert spec["process"]["terminal"] is False
        await end(shim, "c")

    run(scenario)


async def end(shim: Shim, name: str, execs: int = 0) -> None:
    await shim.call(api.SIGNAL, container_id=name, signal=9)
    events = await shim.events(1 + execs)
    assert events[-1].exec_id == ""
    await shim.call(api.DELETE, container_id=name)


def test_the_networks_sysctls_are_the_machines_and_not_cruns(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        ipv4 = shim.directory / "sys/net/ipv4"
        ipv4.mkdir(parents=True)
        start = ipv4 / "ip_unprivileged_port_start"
        start.write_text("1024\n")
        linux = {"sysctl": {f"net.ipv4.{start.name}": "0", "kernel.domainname": "x"}}
        with pytest.raises(Internal, match="out of everything"):
            await shim.create("c", "true", fail="out of everything", linux=linux)
        assert start.read_text() == "1024\n", "a container that is not there has changed nothing"
        await shim.create("c", "sleep", "100", linux=linux)
        assert start.read_text() == "0"
        spec = json.loads((shim.directory / "bundles/c/config.json").read_text())
        assert spec["linux"]["sysctl"] == {"kernel.domainname": "x"}
        with pytest.raises(FailedPrecondition, match="ip_unprivileged_port_start: the containers of a pod"):
            await shim.create("d", "true", linux={"sysctl": {f"net.ipv4.{start.name}": "80"}})
        assert start.read_text() == "0"
        await end(shim, "c")
        await shim.create("d", "sleep", "100", linux={"sysctl": {f"net.ipv4.{start.name}": "80"}})
        assert start.read_text() == "80", "alone again, it may"
        await end(shim, "d")

    run(scenario)


def test_crun_that_fails_leaves_nothing(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        with pytest.raises(Internal, match="crun create failed: out of everything"):
            await shim.create("c", "true", fail="out of everything")
        with pytest.raises(NotFound, match='exec: "nosuch": executable file not found'):
            await shim.create("c", "nosuch", fail="read from sync socket: Connection reset by peer")
        with pytest.raises(NotFound, match='exec: "nosuch": executable file not found'):
            await shim.create("c", "nosuch")  # found out with the process there already
        assert list((shim.directory / "bundles").iterdir()) == []
        assert list((shim.directory / "state").iterdir()) == []
        await shim.create("c", "sleep", "100")
        with pytest.raises(AlreadyExists):
            await shim.create("c", "sleep", "100")
        await end(shim, "c")

    run(scenario)


def test_execs(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        await shim.start("c")
        pid = await shim.exec("c", "e", "sh", "-c", "echo hello; exit 3")
        assert pid > 0
        assert await shim.output("c", "e") == b"hello\n"
        assert (await shim.events(1))[0].exit_status == 3
        with pytest.raises(AlreadyExists):
            await shim.exec("c", "e", "true")
        await shim.call(api.DELETE, container_id="c", exec_id="e")
        with pytest.raises(NotFound, match="executable file not found"):
            await shim.exec("c", "e", "nosuch")
        await shim.exec("c", "e", "sleep", "100")
        with pytest.raises(FailedPrecondition, match="running, it cannot be deleted"):
            await shim.call(api.DELETE, container_id="c", exec_id="e")
        await shim.call(api.SIGNAL, container_id="c", exec_id="e", signal=15)
        (event,) = await shim.events(1)
        assert (event.exec_id, event.exit_status) == ("e", 143)
        await end(shim, "c")

    run(scenario)


def test_an_exec_that_is_not_wanted_is_killed_and_nobody_hears_of_it(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        await shim.start("c")
        pid = await shim.exec("c", "e", "sleep", "100")
        await shim.call(api.DELETE, container_id="c", exec_id="e", kill=True)
        assert not os.path.exists(f"/proc/{pid}")  # noqa: ASYNC240
        with pytest.raises(NotFound):
            await shim.call(api.DELETE, container_id="c", exec_id="e", kill=True)
        await shim.exec("c", "e", "sh", "-c", "exit 3")
        (event,) = await shim.events(1)
        assert (event.exec_id, event.exit_status) == ("e", 3), "of the second only"
        await shim.call(api.DELETE, container_id="c", exec_id="e", kill=True)
        await end(shim, "c")

    run(scenario)


def test_an_exec_that_is_not_wanted_while_it_is_made_never_runs(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        await shim.start("c")
        starting = asyncio.create_task(shim.exec("c", "e", "sleep", "100"))
        await at_once(lambda: "e" in shim.service._guest.container("c").execs)
        await shim.call(api.DELETE, container_id="c", exec_id="e", kill=True)
        assert shim.service._guest.container("c").execs == {}
        await asyncio.gather(starting, return_exceptions=True)
        await end(shim, "c")

    run(scenario)


@pytest.mark.parametrize("started", [False, True])
def test_a_container_that_is_not_wanted_is_killed_and_nobody_hears_of_it(
    run: Callable[[Scenario], None], started: bool
) -> None:
    async def scenario(shim: Shim) -> None:
        pid = await shim.create("c", "sleep", "100")
        if started:
            await shim.start("c")
        with pytest.raises(FailedPrecondition, match="cannot be deleted"):
            await shim.call(api.DELETE, container_id="c")
        await shim.call(api.DELETE, container_id="c", kill=True)
        assert not os.path.exists(f"/proc/{pid}")  # noqa: ASYNC240
        assert list((shim.directory / "bundles").iterdir()) == []
        await shim.create("c", "sh", "-c", "exit 3")
        await shim.start("c")
        (event,) = await shim.events(1)
        assert event.exit_status == 3, "of the second only"
        await shim.call(api.DELETE, container_id="c")

    run(scenario)


def test_a_container_that_is_not_wanted_while_it_is_made_is_not_left(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        for fail in ("", "out of everything"):
            creating = asyncio.create_task(shim.create("c", "sleep", "100", fail=fail))
            await at_once(lambda: "c" in shim.service._guest._containers)
            await shim.call(api.DELETE, container_id="c", kill=True)
            await asyncio.gather(creating, return_exceptions=True)
            assert shim.service._guest._containers == {}
            assert list((shim.directory / "state").iterdir()) == []

    run(scenario)


def test_inits_exit_waits_for_the_execs(run: Callable[[Scenario], None]) -> None:
    """Nothing kills them here, where there is neither namespace nor cgroup: init's exit is held back."""

    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        await shim.start("c")
        await shim.exec("c", "e", "sleep", "100")
        await shim.call(api.SIGNAL, container_id="c", signal=9)
        listening = asyncio.create_task(shim.events(2))
        done, _ = await asyncio.wait([listening], timeout=0.2)
        assert not done
        with pytest.raises(FailedPrecondition, match="stopped"):
            await shim.exec("c", "late", "true")
        await shim.call(api.SIGNAL, container_id="c", exec_id="e", signal=9)
        assert [event.exec_id for event in await listening] == ["e", ""]
        await shim.call(api.DELETE, container_id="c")

    run(scenario)


def test_standard_input(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "cat", stdin=True)
        await shim.start("c")
        await shim.call(api.WRITE_STDIN, container_id="c", data=b"words")
        await shim.call(api.CLOSE_STDIN, container_id="c")
        assert await shim.output("c") == b"words"
        with pytest.raises(FailedPrecondition, match="closed"):
            await shim.call(api.WRITE_STDIN, container_id="c", data=b"words")
        await shim.events(1)
        await shim.call(api.DELETE, container_id="c")

    run(scenario)


def test_pause_resume_and_update(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        await shim.create("c", "sleep", "100")
        await shim.start("c")
        with pytest.raises(FailedPrecondition, match="not paused"):
            await shim.call(api.RESUME, container_id="c")
        await shim.call(api.PAUSE, container_id="c")
        assert (shim.directory / "state/c/pause").exists()
        with pytest.raises(FailedPrecondition, match="paused"):
            await shim.exec("c", "e", "true")
        await shim.call(api.RESUME, container_id="c")
        await shim.call(api.UPDATE, container_id="c", resources_json=b'{"pids": {"limit": 5}}')
        assert json.loads((shim.directory / "state/c/resources").read_text()) == {"pids": {"limit": 5}}
        with pytest.raises(InvalidArgument, match="malformed OCI resources"):
            await shim.call(api.UPDATE, container_id="c", resources_json=b"{")
        await end(shim, "c")

    run(scenario)


def test_cgroup_figures_and_members(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        cgroup = shim.directory / "cgroup/containers/c"
        cgroup.mkdir(parents=True)
        init = await shim.create("c", "sleep", "100")
        await shim.start("c")
        pid = await shim.exec("c", "e", "sleep", "100")
        (cgroup / "cgroup.procs").write_text(f"{init}\n{pid}\n1\n")
        (cgroup / "pids.current").write_text("3\n")
        metrics = Metrics.decode((await shim.call(api.STATS, container_id="c")).metrics)
        assert metrics.pids is not None
        assert metrics.pids.current == 3
        (cgroup / "cgroup.procs").write_text(f"{init}\n{pid}\n")
        await shim.call(api.SIGNAL, container_id="c", signal=15, all=True)
        assert {event.exit_status for event in await shim.events(2)} == {143}
        await shim.call(api.DELETE, container_id="c")

    run(scenario)


@pytest.mark.parametrize(
    ("writes_back", "running", "held"), [(False, "7\n", True), (False, "", False), (True, "", True)]
)
def test_a_sync_is_for_what_the_host_may_lack(
    run: Callable[[Scenario], None], writes_back: bool, running: str, held: bool
) -> None:
    async def scenario(shim: Shim) -> None:
        cgroup = shim.directory / "cgroup/containers/c"
        cgroup.mkdir(parents=True)
        (cgroup / "cgroup.procs").write_text(running)
        await shim.create("c", "true")
        shim.guest.writes_back = writes_back
        assert shim.guest.may_hold_data() is held
        (cgroup / "cgroup.procs").write_text("")
        await end(shim, "c")

    run(scenario)


def test_hello_and_the_end(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        answer = await shim.call(api.HELLO, protocol=api.PROTOCOL)
        assert answer.protocol == api.PROTOCOL
        assert answer.python == sys.version.split()[0]
        assert answer.kernel_release == os.uname().release
        with pytest.raises(InvalidArgument, match="speaks agent protocol 1"):
            await shim.call(api.HELLO, protocol=1)
        assert await shim.call(api.SYNC) == Empty()
        assert not shim.service.ending.is_set()
        assert await shim.call(api.SHUTDOWN) == Empty()
        assert shim.service.ending.is_set()

    run(scenario)


def test_second_listener_is_refused(run: Callable[[Scenario], None]) -> None:
    async def scenario(shim: Shim) -> None:
        async with shim.client.stream(api.EVENTS, api.EventsRequest()):
            with pytest.raises(FailedPrecondition, match="listens to the guest's events already"):
                await shim.events(1)

    run(scenario)
