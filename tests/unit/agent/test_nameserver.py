"""Questions to a name server's place on the loopback, and the answers that the host's side has."""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

import pytest

from agent import nameserver
from agent.nameserver import NameServer
from agent.stdio import STDOUT
from rpc.api.agent import NAME_HEADER, Asked
from rpc.errors import AlreadyExists

ADDRESS = "127.0.0.11"
Scenario = Callable[[NameServer, int], Awaitable[None]]


def run(scenario: Scenario) -> None:
    """At a port that nobody else has; nothing stays open."""

    async def main() -> None:
        with socket.socket() as free:
            free.bind((ADDRESS, 0))
            port = free.getsockname()[1]
        async with asyncio.timeout(30):
            server = await nameserver.serve(ADDRESS, port)
            try:
                await scenario(server, port)
            finally:
                server.close()
                await asyncio.sleep(0)  # a turn of the loop, in which what was closed lets go of its sockets

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert len(os.listdir("/proc/self/fd")) == before


async def asked(server: NameServer) -> tuple[int, int, bytes]:
    data = await server.stdio.output(STDOUT).read(1 << 16)
    number, how, length = NAME_HEADER.unpack_from(data)
    assert len(data) == NAME_HEADER.size + length, "more than one question, or less"
    return number, how, data[NAME_HEADER.size :]


async def answer(server: NameServer, number: int, content: bytes) -> None:
    await server.stdin().write(NAME_HEADER.pack(number, 0, len(content)) + content)


async def datagram(port: int) -> socket.socket:
    asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    asking.connect((ADDRESS, port))
    return asking


def test_each_datagram_is_answered_to_who_sent_it() -> None:
    async def scenario(server: NameServer, port: int) -> None:
        loop = asyncio.get_running_loop()
        with await datagram(port) as one, await datagram(port) as other:
            numbers = []
            for asking, question in ((one, b"first?"), (other, b"second?")):
                await loop.sock_sendall(asking, question)
                number, how, content = await asked(server)
                assert (how, content) == (Asked.BY_DATAGRAM, question)
                numbers.append(number)
            await answer(server, numbers[1], b"2")
            await answer(server, numbers[0], b"1")
            await answer(server, numbers[0], b"again")  # nobody waits for it any more
            await answer(server, 9999, b"nobody's")
            assert await loop.sock_recv(one, 100) == b"1"
            assert await loop.sock_recv(other, 100) == b"2"

    run(scenario)


def test_a_connection_may_ask_more_than_once() -> None:
    async def scenario(server: NameServer, port: int) -> None:
        reader, writer = await asyncio.open_connection(ADDRESS, port)
        for content in (b"a" * 40_000, b"b"):
            writer.write(len(content).to_bytes(2, "big") + content)
            number, how, question = await whole(server)
            assert (how, question) == (Asked.BY_CONNECTION, content)
            await answer(server, number, content[::-1] + b"!")
            assert await reader.readexactly(2 + len(content) + 1) == (
                (len(content) + 1).to_bytes(2, "big") + content[::-1] + b"!"
            )
        writer.close()

    async def whole(server: NameServer) -> tuple[int, int, bytes]:
        data = b""
        while len(data) < NAME_HEADER.size or len(data) < NAME_HEADER.size + NAME_HEADER.unpack_from(data)[2]:
            data += await server.stdio.output(STDOUT).read(1 << 16)
        number, how, _ = NAME_HEADER.unpack_from(data)
        return number, how, data[NAME_HEADER.size :]

    run(scenario)


def test_the_oldest_of_too_many_that_wait_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nameserver, "MOST_WAITING", 2)

    async def scenario(server: NameServer, port: int) -> None:
        loop = asyncio.get_running_loop()
        numbers = []
        with await datagram(port) as asking:
            for question in (b"1", b"2", b"3"):
                await loop.sock_sendall(asking, question)
                numbers.append((await asked(server))[0])
            for number in numbers:
                await answer(server, number, b"to %d" % number)
            for number in numbers[1:]:
                assert await loop.sock_recv(asking, 100) == b"to %d" % number

    run(scenario)


def test_a_place_that_is_taken_is_said_to_be() -> None:
    async def scenario(server: NameServer, port: int) -> None:
        with pytest.raises(AlreadyExists, match=ADDRESS):
            await nameserver.serve(ADDRESS, port)

    run(scenario)
