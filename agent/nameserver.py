"""A name server's place on the guest's loopback: what is asked there is answered by the host's side.

In the shape of a process with stdin and stdout, as a connection is (forward.py): questions come out of it and
answers go in, each behind a header (rpc/api/agent.py, NAME_HEADER). Must not know what is asked.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import socket
from contextlib import ExitStack, suppress

from agent.forward import Forward
from rpc.api.agent import NAME_HEADER, NAME_PORT, Asked
from rpc.errors import AlreadyExists, FailedPrecondition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MOST_WAITING = 256
"""Questions without an answer; the oldest is forgotten, as a name server forgets."""
MOST_UNREAD_BYTES = 256 << 10
"""Of questions that the host has not taken; more are lost, as datagrams are."""
CONNECTION_S = 30.0
"""That a connection may be idle, or wait for an answer."""


async def serve(address: str, port: int = NAME_PORT) -> NameServer:
    """Raises FailedPrecondition, AlreadyExists where a program has that place."""
    ours, theirs = socket.socketpair()
    server = NameServer(theirs, *await asyncio.open_connection(sock=ours))
    with ExitStack() as undo:
        undo.callback(server.close)
        try:
            await server.listen(address, port)
        except OSError as error:
            kind = AlreadyExists if error.errno == errno.EADDRINUSE else FailedPrecondition
            raise kind(f"name server at {address}", error.strerror) from error
        undo.pop_all()
    return server


class NameServer(Forward, asyncio.DatagramProtocol):
    def __init__(
        self, connection: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        super().__init__(connection)
        self._reader, self._writer = reader, writer
        self._waiting: dict[int, Callable[[bytes], None]] = {}
        self._numbers = itertools.count(1)
        self._datagrams: asyncio.DatagramTransport | None = None
        self._connections: asyncio.Server | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._answering = asyncio.create_task(self._answer())

    async def listen(self, address: str, port: int) -> None:
        """Raises OSError."""
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: self, (address, port))
        self._datagrams = transport
        self._connections = await asyncio.start_server(self._serve, address, port)

    def close(self) -> None:
        super().close()
        for task in (self._answering, *self._serving):
            task.cancel()
        if self._datagrams is not None:
            self._datagrams.close()
        if self._connections is not None:
            self._connections.close()
        self._writer.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        transport = self._datagrams
        if transport is not None and not transport.is_closing():
            self._ask(Asked.BY_DATAGRAM, data, lambda answer: transport.sendto(answer, addr))

    def _ask(self, how: Asked, question: bytes, answer: Callable[[bytes], None]) -> None:
        if self._writer.transport.get_write_buffer_size() > MOST_UNREAD_BYTES:
            return
        while len(self._waiting) >= MOST_WAITING:
            del self._waiting[next(iter(self._waiting))]
        number = next(self._numbers)
        self._waiting[number] = answer
        self._writer.write(NAME_HEADER.pack(number, how, len(question)) + question)

    async def _answer(self) -> None:
        with suppress(asyncio.IncompleteReadError):
            while True:
                number, _, length = NAME_HEADER.unpack(await self._reader.readexactly(NAME_HEADER.size))
                content = await self._reader.readexactly(length)
                if answer := self._waiting.pop(number, None):
                    answer(content)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One question after another; messages have their length in front there (RFC 1035, 4.2.2)."""
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with suppress(asyncio.IncompleteReadError, TimeoutError, ConnectionError):
                while True:
                    async with asyncio.timeout(CONNECTION_S):
                        length = int.from_bytes(await reader.readexactly(2), "big")
                        question = await reader.readexactly(length)
                        answered: asyncio.Queue[bytes] = asyncio.Queue()
                        self._ask(Asked.BY_CONNECTION, question, answered.put_nowait)
                        answer = await answered.get()
                        writer.write(len(answer).to_bytes(2, "big") + answer)
                        await writer.drain()
        finally:
            self._serving.discard(task)
            writer.close()
