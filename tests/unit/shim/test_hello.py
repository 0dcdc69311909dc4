"""The first words with a guest's agent: who may speak, in which version, what is left if it goes wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import CasemateError, DeadlineExceeded, Disconnected, FailedPrecondition, Unavailable
from shim.vm import hello
from shim.vm.console import listen
from shim.vm.hello import accept, greet
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
            client, answer = await greet("web", "web-host", accept(listener), 5)
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
            client, said = await greet("web", "web", accept(listener), 5)
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
            with pytest.raises(FailedPrecondition, match=f"99, this casemate {api.PROTOCOL}") as caught:
                await greet("web", "web", accept(listener), 5)
            assert caught.value.hint == "casemate image build"
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


def test_an_agent_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    async def life() -> None:
        async with port(tmp_path) as (listener, agent):
            agent.hold(api.HELLO)
            with pytest.raises(DeadlineExceeded):
                await greet("web", "web", accept(listener), 0.1)

    run(life())


def test_an_agent_that_hangs_up_is_told_from_one_that_answers_badly(tmp_path: Path) -> None:
    async def life() -> None:
        path = tmp_path / "agent.sock"
        with listen(path, os.getuid()) as listener:
            greeting = asyncio.create_task(greet("web", "web", accept(listener), 5))
            _, writer = await asyncio.open_unix_connection(path)
            writer.close()
            await writer.wait_closed()
            with pytest.raises(Disconnected):
                await greeting
        async with port(tmp_path / "second") as (listener, agent):
            agent.fails["Hello"] = CasemateError("no clock")
            with pytest.raises(CasemateError, match="no clock"):
                await greet("web", "web", accept(listener), 5)

    (tmp_path / "second").mkdir()
    run(life())


def test_whoever_gives_up_waiting_leaves_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with listen(tmp_path / "agent.sock", os.getuid()) as listener:
            greeting = asyncio.create_task(greet("web", "web", accept(listener), 5))
            await asyncio.sleep(0)
            greeting.cancel()
            await asyncio.gather(greeting, return_exceptions=True)
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


@pytest.fixture
def vsock() -> None:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError:
        pytest.skip("the kernel has no vsock")


@pytest.mark.usefixtures("vsock")
def test_the_shim_dials_from_a_port_that_takes_privilege() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as one, socket.socket(socket.AF_VSOCK) as other:
        for connection in (one, other):
            hello._bind_reserved(connection)
        numbers = {connection.getsockname()[1] for connection in (one, other)}
    assert len(numbers) == 2
    assert all(0 < number < hello.RESERVED_PORTS for number in numbers)


@pytest.mark.usefixtures("vsock")
def test_how_long_a_guest_may_take_is_not_the_kernels_to_say() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
        hello._wait_up_to(connection, 600.25)
        assert connection.family == socket.AF_VSOCK
        seen = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=os.dup(connection.fileno()))
        with seen:
            timeval = seen.getsockopt(socket.AF_VSOCK, hello.CONNECT_TIMEOUT, struct.calcsize("ll"))
    seconds, micros = struct.unpack("ll", timeval)
    assert seconds + micros / 1e6 == pytest.approx(600.25, abs=0.02)  # the kernel counts in ticks


@pytest.mark.usefixtures("vsock")
def test_a_guest_that_cannot_be_dialled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Unavailable, match="vsock context 4294967290"):
            await hello.dial(4294967290, None, 1.0)
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


def test_a_guest_is_not_dialled_before_it_says_that_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled: list[int] = []

    def refuse(_: socket.socket) -> None:
        dialled.append(1)
        raise OSError(22, "not today")

    async def life() -> None:
        waits = asyncio.Event()
        dialling = asyncio.create_task(hello.dial(7, waits, 1.0))
        await asyncio.sleep(0)
        assert not dialled
        waits.set()
        with pytest.raises(Unavailable, match="not today"):
            await dialling

    monkeypatch.setattr(hello, "_bind_reserved", refuse)
    monkeypatch.setattr(socket, "AF_VSOCK", socket.AF_UNIX)  # where the kernel has none
    run(life())
    assert dialled
