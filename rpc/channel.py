"""Frames over an asyncio byte stream, and one stream's bounded inbox: common to client and server.

The peer may be hostile: memory is bounded whatever it sends, and whatever goes wrong with the connection
is Disconnected. It must not know what the frames mean.
"""

from __future__ import annotations

import asyncio
from collections import deque

from rpc.errors import CasemateError, Disconnected
from rpc.ttrpc import HEADER, MAX_BODY_BYTES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    # stream id, type, flags, body; no body: it was larger than the protocol allows, and was discarded
    Frame: TypeAlias = tuple[int, int, int, bytes | None]

BUFFER_BYTES = 256 << 10
"""For the readers of connections made here; a StreamReader holds up to twice as much unread."""
INBOX_MESSAGES = 256
INBOX_BYTES = 8 << 20
_DISCARD_BYTES = 64 << 10
_FRAMES_PER_TURN = 64


class Channel:
    """Reads and writes whole frames. One task may read; writers take turns."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._turn = _FRAMES_PER_TURN
        self.lock = asyncio.Lock()
        """Held around drain and put: one frame at most is buffered beyond what the transport likes."""

    async def read(self) -> Frame:
        """The next frame. Disconnected: the connection is gone, also in the middle of a frame."""
        self._turn -= 1
        if not self._turn:  # a flood of small frames that are here already must not starve the other tasks
            self._turn = _FRAMES_PER_TURN
            await asyncio.sleep(0)
        try:
            size, stream_id, kind, flags = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if size > MAX_BODY_BYTES:
                await self._discard(size)
                return stream_id, kind, flags, None
            body = await self._reader.readexactly(size) if size else b""
        except asyncio.IncompleteReadError as error:
            cut = " in the middle of a message" if error.partial else ""
            raise Disconnected(f"connection closed{cut}") from None
        except OSError as error:
            raise Disconnected("connection lost", str(error)) from None
        return stream_id, kind, flags, body

    async def _discard(self, size: int) -> None:
        while size:
            piece = await self._reader.read(min(size, _DISCARD_BYTES))
            if not piece:
                raise Disconnected("connection closed in the middle of a message")
            size -= len(piece)
            await asyncio.sleep(0)

    async def send(self, data: bytes) -> None:
        """Write one frame, once the peer has taken most of what was written before. Disconnected: it is gone.

        Waiting comes first: who gives up waiting has written nothing."""
        async with self.lock:
            await self.drain()
            self.put(data)

    def put(self, data: bytes) -> None:
        if self._writer.is_closing():
            raise Disconnected("connection closed")
        self._writer.write(data)

    async def drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError as error:
            raise Disconnected("connection lost", str(error)) from None

    async def until_peer_closes(self, limit_s: float) -> None:
        """Drops what still comes. Nobody else may be reading."""
        try:
            async with asyncio.timeout(limit_s):
                while await self._reader.read(_DISCARD_BYTES):
                    pass
        except (TimeoutError, OSError):
            return

    async def close(self, flush_s: float) -> None:
        """Close; what was written is given to the peer, if it takes it within flush_s."""
        self._writer.close()
        try:
            async with asyncio.timeout(flush_s):
                await self._writer.wait_closed()
        except TimeoutError:
            self.abort()
        except OSError:
            pass  # the connection is gone, which is what was asked for

    def abort(self) -> None:
        self._writer.transport.abort()


class Inbox:
    """Messages of one stream that nobody has taken yet.

    ttrpc has no flow control of its own: when an inbox is full, the connection's reader waits for space,
    and so do the connection's other streams. Nothing is lost, and the memory is bounded.
    """

    def __init__(self) -> None:
        self._waiting: deque[bytes | memoryview] = deque()
        self._size = 0
        self.error: CasemateError | None = None
        self.ended = False
        self._filled = asyncio.Event()
        self._space = asyncio.Event()
        self._space.set()

    @property
    def full(self) -> bool:
        return not self._space.is_set()

    def put(self, body: bytes | memoryview) -> None:
        if self.ended:
            return
        self._waiting.append(body)
        self._size += len(body)
        self._filled.set()
        if len(self._waiting) >= INBOX_MESSAGES or self._size >= INBOX_BYTES:
            self._space.clear()

    def end(self, error: CasemateError | None = None) -> None:
        """Nothing follows what is here."""
        if not self.ended:
            self.ended, self.error = True, error
            self._filled.set()
            self._space.set()

    def discard(self) -> None:
        """Nobody will take anything any more."""
        self.end()
        self._waiting.clear()

    async def space(self) -> None:
        await self._space.wait()

    async def take(self) -> bytes | memoryview | None:
        """The next message, None at the end; raises the error that ended the stream, every time."""
        while not self._waiting:
            if self.ended:
                if self.error is not None:
                    raise self.error
                return None
            self._filled.clear()
            await self._filled.wait()
        body = self._waiting.popleft()
        self._size -= len(body)
        if len(self._waiting) < INBOX_MESSAGES // 2 and self._size < INBOX_BYTES // 2:
            self._space.set()
        return body
