"""The process that `start` leaves for a container's hooks, and a shim that asks it: both real."""

import asyncio
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition, Unavailable
from shim import hookserver, oci
from shim.hooks import HostHooks
from shim.journal import Journal, Kind, read_journal
from shim.paths import hooks_socket
from shim.trace import Trace
from tests.unit.shim.conftest import children
from tests.unit.shim.pods import config, host

KINDS = ("prestart", "createRuntime", "poststart", "poststop")


class Side:
    """A pod's socket, as its shim would listen at it, and a container that has these hooks."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.socket = str(directory / "pod.sock")
        self.pod = socket.socket(socket.AF_UNIX)
        self.pod.bind(self.socket)
        self.pod.listen()
        self.journal = Journal(directory / "journal")
        self.before = children()

    def tells(self, kind: str, then: str = "exit 0") -> dict[str, object]:
        words = f"(echo {kind}; cat; echo) >>{self.directory}/log; {then}"
        return {"path": "/bin/sh", "args": ["sh", "-c", words], "env": ["PATH=/usr/bin:/bin"]}

    def offer(self, hooks: dict[str, list[dict[str, object]]]) -> HostHooks:
        document = config(hooks=hooks)
        log = os.open(self.directory / "shim.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            hookserver.offer("default", "web", str(self.directory), document, self.socket, log)
        finally:
            os.close(log)
        trace = Trace("default", "web", 1.0)
        return HostHooks(oci.parse(document), "web", str(self.directory), "default", self.journal, trace)

    def kinds(self) -> list[str]:
        return [line for line in (self.directory / "log").read_text().splitlines() if line in KINDS]

    def server(self) -> int:
        (pid,) = children() - self.before
        return pid

    def end(self) -> None:
        """Its end, which must come by itself."""
        for pid in children() - self.before:
            fd = os.pidfd_open(pid)
            assert select.select([fd], [], [], 10)[0], "it waits on"
            os.close(fd)
            os.waitpid(pid, 0)
        assert (self.directory / "shim.log").read_text() == ""


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with host(tmp_path):
        (tmp_path / "run").mkdir()
        side = Side(tmp_path)
        yield side
        side.pod.close()
        side.journal.close()
        side.end()
        assert not os.path.exists(hooks_socket("default", "web"))


def test_the_hooks_of_a_life_are_run_in_their_order_and_poststop_is_owed_meanwhile(side: Side) -> None:
    hooks = side.offer({kind: [side.tells(kind)] for kind in reversed(KINDS)})

    async def life() -> None:
        await hooks.connect()
        assert not read_journal(side.directory / "journal")
        await hooks.create(4711)
        assert [entry.kind for entry in read_journal(side.directory / "journal")] == [Kind.POSTSTOP]
        assert side.kinds() == ["prestart", "createRuntime"]
        await hooks.started()
        await hooks.gone()
        await hooks.gone()

    asyncio.run(life())
    assert side.kinds() == list(KINDS)
    assert (side.directory / "log").read_text().count('"pid": 4711') == 3
    assert read_journal(side.directory / "journal")[-1].kind is Kind.POSTSTOP_BEGUN


def test_one_that_fails_is_told_and_poststop_follows(side: Side) -> None:
    fails = side.tells("prestart", "echo why >&2; exit 5")
    hooks = side.offer(
        {"prestart": [fails, fails], "createRuntime": [fails], "poststop": [side.tells("poststop")]}
    )

    async def life() -> None:
        await hooks.connect()
        with pytest.raises(FailedPrecondition, match="prestart hook /bin/sh of web: exit status 5") as caught:
            await hooks.create(4711)
        assert caught.value.details == "why"
        await hooks.gone()

    asyncio.run(life())
    assert side.kinds() == ["prestart", "poststop"]


def test_what_was_not_begun_owes_nothing(side: Side) -> None:
    hooks = side.offer({kind: [side.tells(kind)] for kind in KINDS})

    async def life() -> None:
        await hooks.connect()
        await hooks.gone()

    asyncio.run(life())
    assert not (side.directory / "log").exists()


def test_its_end_is_told_and_what_was_owed_stays_begun(side: Side) -> None:
    hooks = side.offer({kind: [side.tells(kind)] for kind in KINDS})

    async def life() -> None:
        await hooks.connect()
        await hooks.create(4711)
        os.kill(side.server(), signal.SIGKILL)
        with pytest.raises(Unavailable, match="poststart hooks of web"):
            await hooks.started()
        await hooks.gone()

    asyncio.run(life())
    assert side.kinds() == ["prestart", "createRuntime"]


def test_nobody_asks_and_the_pod_ends(side: Side) -> None:
    side.offer({kind: [side.tells(kind)] for kind in KINDS})
    path = hooks_socket("default", "web")
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert side.server()  # the fixture sees it end, once the pod's socket is closed


def test_a_later_start_of_the_same_name_has_the_socket(side: Side) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        path = str(side.directory / "other.sock")
        other.bind(path)
        other.listen()
        first, side.socket = side.socket, path
        side.offer({"poststop": [side.tells("prestart")]})
        side.socket = first
        hooks = side.offer({"createRuntime": [side.tells("createRuntime")]})
    deadline = time.monotonic() + 10
    while len(children() - side.before) > 1:
        assert time.monotonic() < deadline
        for pid in children() - side.before:
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)

    async def life() -> None:
        await hooks.connect()
        await hooks.create(1)
        await hooks.gone()

    asyncio.run(life())
    assert side.kinds() == ["createRuntime"]


def test_where_there_are_none_nothing_is_left_and_nothing_asked(side: Side) -> None:
    hooks = side.offer({"createContainer": [{"path": "/x"}]})
    assert children() == side.before

    async def life() -> None:
        await hooks.connect()
        await hooks.create(1)
        await hooks.started()
        await hooks.gone()

    asyncio.run(life())


def test_nobody_is_there(side: Side) -> None:
    hooks = HostHooks(
        oci.parse(config(hooks={"poststop": [{"path": "/x"}]})),
        *("web", str(side.directory), "default", side.journal, Trace("default", "web", 1.0)),
    )
    (side.directory / "shim.log").touch()
    with pytest.raises(Unavailable, match="the process that `start` left to run them is not there"):
        asyncio.run(hooks.connect())


@pytest.mark.parametrize(
    "hooks", [{"prestart": [{"path": "x"}]}, {"prestart": "x"}, {"prestart": []}, [], None]
)
def test_for_hooks_that_are_none_nobody_waits(side: Side, hooks: object) -> None:
    """The shim, which reads the same document, says why."""
    with open(side.directory / "shim.log", "ab") as log:
        given = ("default", "web", str(side.directory), config(hooks=hooks), side.socket, log.fileno())
        hookserver.offer(*given)
    side.end()
