"""A connection to a port of the loopback, in the shape of a process' streams."""

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable

import pytest

from agent.forward import connect
from agent.stdio import STDOUT
from rpc.errors import FailedPrecondition

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def serve(talk: Talk, scenario: Callable[[int], Awaitable[None]], address: str = "127.0.0.1") -> None:
    """scenario is told the port at which `talk` answers."""

    async def main() -> None:
        async with asyncio.timeout(30), await asyncio.start_server(talk, address, 0) as server:
            await scenario(server.sockets[0].getsockname()[1])

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert len(os.listdir("/proc/self/fd")) == before


async def turn_round(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Says everything back when it has heard all of it."""
    writer.write((await reader.read())[::-1])
    writer.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_end_of_what_is_sent_leaves_what_comes_back(address: str) -> None:
    async def scenario(port: int) -> None:
        forward = await connect(port)
        await forward.stdin().write(b"abc")
        await forward.stdin().finish()
        assert await forward.stdio.output(STDOUT).read(100) == b"cba"
        assert await forward.stdio.output(STDOUT).read(100) == b""
        forward.close()

    serve(turn_round, scenario, address)


def test_a_connection_that_is_reset_has_ended() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async def scenario(port: int) -> None:
        forward = await connect(port)
        await forward.stdin().write(b"x")
        assert await forward.stdio.output(STDOUT).read(100) == b""
        with pytest.raises(FailedPrecondition):
            await forward.stdin().write(b"y")
        forward.close()

    serve(reset, scenario)


def test_a_port_where_nobody_listens_is_an_error_that_names_it() -> None:
    with socket.socket() as taken:  # so that nobody begins to listen there, nor is it the client's own port
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(FailedPrecondition, match=f"port {port} of the pod"):
            asyncio.run(connect(port))
