"""What is said to a port of the pod's network namespace, its guest hears."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import FailedPrecondition
from shim.portforward import PortForward
from tests.unit.rpc.wires import until
from tests.unit.shim.guests import Guest, running_guest
from tests.unit.shim.networks import in_a_network_of_its_own

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network")
NAME = "port-8000-1"
Scenario = Callable[[Guest], Awaitable[None]]


@pytest.fixture
def host_network() -> Iterator[int]:
    """This thread's, which is not the one that a test makes for itself."""
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def run(tmp_path: Path, host_network: int) -> Callable[[Scenario], None]:
    @asynccontextmanager
    async def forwarding() -> AsyncIterator[Guest]:
        async with running_guest(tmp_path) as guest:
            forward = PortForward(guest.machine, "web", host_network)
            try:
                yield guest
            finally:
                await forward.close()

    async def main(scenario: Scenario) -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with asyncio.timeout(30), forwarding() as guest:
            await scenario(guest)
        assert len(os.listdir("/proc/self/fd")) <= before

    return lambda scenario: in_a_network_of_its_own(lambda: asyncio.run(main(scenario)))


def test_a_connection_goes_on_in_the_guest_to_the_end_of_either_side(run: Callable[[Scenario], None]) -> None:
    async def scenario(guest: Guest) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", 8000)
        await guest.agent.reached(api.CONNECT)
        process = guest.agent.process("web", NAME)
        assert process.document == b"8000"
        writer.write(b"to the guest")
        writer.write_eof()
        await process.stdin_closed.wait()
        assert process.stdin == b"to the guest"
        await guest.agent.print("web", b"from it", NAME)
        await process.pipes[api.STDOUT].close()
        assert await reader.read() == b"from it"
        await until(lambda: "Delete" in guest.agent.calls)
        writer.close()

    run(scenario)


def test_a_port_where_nobody_listens_is_hung_up(run: Callable[[Scenario], None]) -> None:
    async def scenario(guest: Guest) -> None:
        guest.agent.fails["Connect"] = FailedPrecondition("port 8000 of the pod", "Connection refused")
        reader, writer = await asyncio.open_connection("127.0.0.1", 8000)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        assert "Delete" not in guest.agent.calls
        del guest.agent.fails["Connect"]
        _, writer = await asyncio.open_connection("127.0.0.1", 8001)
        await guest.agent.reached(api.CONNECT)
        assert guest.agent.process("web", "port-8001-2").document == b"8001"
        writer.close()

    run(scenario)


def test_a_guest_that_answers_more_than_was_asked_for_is_hung_up_on(run: Callable[[Scenario], None]) -> None:
    async def scenario(guest: Guest) -> None:
        async def flood(_: object) -> api.ReadOutputResponse:
            return api.ReadOutputResponse(data=bytes(1 << 20))

        guest.agent.answer(api.READ_OUTPUT, flood)
        reader, writer = await asyncio.open_connection("127.0.0.1", 8000)
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()
        await until(lambda: "Delete" in guest.agent.calls)

    run(scenario)


def test_the_hosts_own_network_is_never_touched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        async with running_guest(tmp_path) as guest:
            await PortForward(guest.machine, "web", own).close()
        os.close(own)

    asyncio.run(life())
    assert "this network namespace is the host's" in caplog.text
