"""The transport over one descriptor: every byte once, in order, with back-pressure both ways."""

import asyncio
import os
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.port import HIGH_WATER, LOW_WATER, PortTransport
from tests.unit.agent.waiting import until


def streams(fd: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 16)
    protocol = asyncio.StreamReaderProtocol(reader)
    return reader, asyncio.StreamWriter(PortTransport(loop, fd, protocol), protocol, reader, loop)


def pair() -> tuple[int, socket.socket]:
    """A descriptor for the transport, and the other side."""
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs


@settings(max_examples=30)
@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=8))
def test_bytes_go_both_ways_unharmed(sizes: list[int]) -> None:
    async def scenario() -> None:
        fd, theirs = pair()
        reader, writer = streams(fd)
        back, forth = await asyncio.open_connection(sock=theirs)
        data = [os.urandom(size) for size in sizes]

        async def send(to: asyncio.StreamWriter) -> None:
            for chunk in data:
                to.write(chunk)
                await to.drain()

        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            group.create_task(send(writer))
            group.create_task(send(forth))
            got = group.create_task(back.readexactly(sum(sizes)))
            here = group.create_task(reader.readexactly(sum(sizes)))
        assert got.result() == here.result() == b"".join(data)
        writer.close()
        await writer.wait_closed()
        assert await back.read() == b""
        forth.close()
        await forth.wait_closed()

    asyncio.run(scenario())


class Counter(asyncio.Protocol):
    def __init__(self) -> None:
        self.paused = 0
        self.resumed = 0
        self.received = 0
        self.ended = False
        self.lost: list[Exception | None] = []

    def pause_writing(self) -> None:
        self.paused += 1

    def resume_writing(self) -> None:
        self.resumed += 1

    def data_received(self, data: bytes) -> None:
        self.received += len(data)

    def eof_received(self) -> None:
        self.ended = True

    def connection_lost(self, failure: Exception | None) -> None:
        self.lost.append(failure)


def test_writer_is_paused_and_resumed() -> None:
    async def scenario() -> None:
        fd, theirs = pair()
        theirs.setblocking(False)
        protocol = Counter()
        transport = PortTransport(asyncio.get_running_loop(), fd, protocol)
        total = 0
        while not protocol.paused:
            transport.write(bytes(100_000))
            total += 100_000
        assert transport.get_write_buffer_size() > HIGH_WATER
        got = 0
        while got < total:
            await asyncio.sleep(0)
            try:
                got += len(theirs.recv(1 << 16))
            except BlockingIOError:
                continue
        await until(lambda: protocol.resumed)
        assert transport.get_write_buffer_size() <= LOW_WATER
        assert (protocol.paused, protocol.resumed) == (1, 1)
        transport.close()
        transport.close()
        await asyncio.sleep(0)
        assert protocol.lost == [None]
        theirs.close()

    asyncio.run(scenario())


def test_paused_reading_leaves_bytes_where_they_are() -> None:
    async def scenario() -> None:
        fd, theirs = pair()
        protocol = Counter()
        transport = PortTransport(asyncio.get_running_loop(), fd, protocol)
        transport.pause_reading()
        assert not transport.is_reading()
        theirs.send(b"waiting")
        await asyncio.sleep(0.02)
        assert protocol.received == 0
        transport.resume_reading()
        assert transport.is_reading()
        await until(lambda: protocol.received)
        assert protocol.received == 7
        transport.abort()
        await asyncio.sleep(0)
        theirs.close()

    asyncio.run(scenario())


def test_close_sends_what_is_left() -> None:
    async def scenario() -> None:
        fd, theirs = pair()
        theirs.setblocking(False)
        protocol = Counter()
        transport = PortTransport(asyncio.get_running_loop(), fd, protocol)
        transport.write(bytes(2_000_000))
        transport.close()
        transport.write(b"too late")
        assert transport.is_closing()
        got = 0
        async with asyncio.timeout(10):
            while not protocol.lost:
                await asyncio.sleep(0)
                try:
                    got += len(theirs.recv(1 << 16))
                except BlockingIOError:
                    continue
        theirs.setblocking(True)
        while chunk := theirs.recv(1 << 16):
            got += len(chunk)
        assert got == 2_000_000
        assert protocol.lost == [None]
        theirs.close()

    asyncio.run(scenario())


def test_peer_that_goes_ends_the_connection() -> None:
    async def scenario() -> None:
        fd, theirs = pair()
        protocol = Counter()
        PortTransport(asyncio.get_running_loop(), fd, protocol)
        theirs.send(b"last")
        theirs.close()
        await until(lambda: protocol.lost)
        assert protocol.received == 4
        assert protocol.ended

    asyncio.run(scenario())


def test_device_that_fails_while_writing_loses_the_connection() -> None:
    async def scenario() -> None:
        fd, theirs = pair()
        protocol = Counter()
        transport = PortTransport(asyncio.get_running_loop(), fd, protocol)
        transport.pause_reading()
        while not transport.get_write_buffer_size():
            transport.write(bytes(100_000))
        theirs.close()
        await until(lambda: protocol.lost)
        assert isinstance(protocol.lost[0], BrokenPipeError | ConnectionResetError)
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)

    asyncio.run(scenario())
