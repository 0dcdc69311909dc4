"""The first words with a guest's agent: who may speak, in which version, what is left if it goes wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest

from rpc.api import agent as api
from rpc.errors import CasemateError, DeadlineExceeded, Disconnected, FailedPrecondition, Unavailable
from shim.vm import hello
from shim.vm.console import listen
from shim.vm.hello import greet, listen_vsock
from tests.unit.rpc.wires import run
from tests.unit.shim.guests import GuestAgent


@asynccontextmanager
async def port(directory: Path) -> AsyncIterator[tuple[socket.socket, GuestAgent]]:
    """A listening socket of the shim's, and an agent that has connected to it."""
    path = directory / "agent.sock"
    agent = GuestAgent()
    with listen(path, os.getuid()) as listener:
        serving = asyncio.create_task(_connect(agent, path))
        try:
            yield listener, agent
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def _connect(agent: GuestAgent, path: Path) -> None:
    await agent.server.serve(*await asyncio.open_unix_connection(path))


def test_the_agent_is_told_who_it_is_and_what_time_it_is(tmp_path: Path) -> None:
    async def life() -> None:
        async with port(tmp_path) as (listener, agent):
            client, answer = await greet("web", "web-host", listener, None, 5)
            assert answer.kernel_release == "6.1.0-cloud"
            assert (agent.hello.pod_id, agent.hello.hostname) == ("web", "web-host")
            assert abs(agent.hello.realtime_ns - time.time_ns()) < 10**10
            assert len(agent.hello.entropy) == hello.ENTROPY_BYTES
            await client.close()

    run(life())


def test_the_guests_clock_is_that_of_an_answer_that_did_not_wait(tmp_path: Path) -> None:
    """The first question waits for the guest's boot, and the time in it with it."""

    async def life() -> None:
        async with port(tmp_path) as (listener, agent):
            asked: list[api.HelloRequest] = []

            async def answer(request: api.HelloRequest) -> api.HelloResponse:
                asked.append(request)
                return api.HelloResponse(protocol=api.PROTOCOL, version="1", monotonic_ns=len(asked))

            agent.answer(api.HELLO, answer)
            client, said = await greet("web", "web", listener, None, 5)
            assert said.monotonic_ns == 2
            assert asked[0].realtime_ns < asked[1].realtime_ns
            assert asked[0].entropy != asked[1].entropy
            await client.close()

    run(life())


def test_an_agent_of_another_version_is_turned_away_with_what_to_do(tmp_path: Path) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with port(tmp_path) as (listener, agent):
            agent.protocol = 99
            with pytest.raises(FailedPrecondition, match=r"speaks protocol 99, this casemate 1") as caught:
                await greet("web", "web", listener, None, 5)
            assert caught.value.hint == "casemate image build"
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


def test_an_agent_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    async def life() -> None:
        async with port(tmp_path) as (listener, agent):
            agent.hold(api.HELLO)
            with pytest.raises(DeadlineExceeded):
                await greet("web", "web", listener, None, 0.1)

    run(life())


def test_an_agent_that_hangs_up_is_told_from_one_that_answers_badly(tmp_path: Path) -> None:
    async def life() -> None:
        path = tmp_path / "agent.sock"
        with listen(path, os.getuid()) as listener:
            greeting = asyncio.create_task(greet("web", "web", listener, None, 5))
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()
            await writer.wait_closed()
            with pytest.raises(Disconnected):
                await greeting
        async with port(tmp_path / "second") as (listener, agent):
            agent.fails["Hello"] = CasemateError("no clock")
            with pytest.raises(CasemateError, match="no clock"):
                await greet("web", "web", listener, None, 5)

    (tmp_path / "second").mkdir()
    run(life())


def test_whoever_gives_up_waiting_leaves_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with listen(tmp_path / "agent.sock", os.getuid()) as listener:
            greeting = asyncio.create_task(greet("web", "web", listener, None, 5))
            await asyncio.sleep(0)
            greeting.cancel()
            await asyncio.gather(greeting, return_exceptions=True)
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


STRANGERS = 300  # more than the queue of a listener holds


def test_other_vms_of_the_host_are_turned_away_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """Loopback addresses stand for context ids here, as not every host has vsock."""

    async def life() -> None:
        agent = GuestAgent()
        with socket.socket() as listener:
            listener.setblocking(False)
            listener.bind(("127.0.0.1", 0))
            listener.listen(hello.BACKLOG)
            own_cid = cast("int", "127.0.0.3")
            greeting = asyncio.create_task(greet("web", "web", listener, own_cid, 5))
            number = listener.getsockname()[1]
            for _ in range(STRANGERS):
                stranger, refused = await asyncio.open_connection(
                    "127.0.0.1", number, local_addr=("127.0.0.2", 0)
                )
                assert await stranger.read() == b""
                refused.close()
                await refused.wait_closed()
            assert not greeting.done()
            own = await asyncio.open_connection("127.0.0.1", number, local_addr=("127.0.0.3", 0))
            serving = asyncio.create_task(agent.server.serve(*own))
            client, _ = await greeting
            await client.close()
            await serving

    run(life())
    assert [record.getMessage() for record in caplog.records if record.name == "casemate"] == [
        "refused a connection from vsock context 127.0.0.2: this pod's is 127.0.0.3",
        f"refused {STRANGERS} connections from other vsock contexts",
    ]


def test_nobody_can_connect_once_the_agent_has(tmp_path: Path) -> None:
    async def life() -> None:
        async with port(tmp_path) as (listener, _):
            client, _ = await greet("web", "web", listener, None, 5)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_unix_connection(tmp_path / "agent.sock")
            await client.close()

    run(life())


@pytest.fixture
def vsock() -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        pytest.skip("the kernel has no vsock")


@pytest.mark.usefixtures("vsock")
def test_a_vsock_port_tells_nothing_of_the_next() -> None:
    """The kernel's own choice counts upwards."""
    numbers = []
    for _ in range(8):
        with listen_vsock() as listener:
            numbers.append(listener.getsockname()[1])
    assert all(number in hello.PORTS for number in numbers)
    assert min(abs(one - other) for one, other in pairwise(numbers)) > 1


@pytest.mark.usefixtures("vsock")
def test_a_vsock_port_that_is_taken_is_not_the_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with listen_vsock() as first:
        taken = first.getsockname()[1]
        monkeypatch.setattr(hello, "PORTS", range(taken, taken + 2))
        with listen_vsock() as second:
            assert second.getsockname()[1] == taken + 1
            with pytest.raises(Unavailable, match="no free vsock port"):
                listen_vsock()
