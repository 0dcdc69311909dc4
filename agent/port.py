"""An asyncio transport over one character device that is both read and written: a virtio-serial port.

asyncio's own pipe transports do one system call per turn of the event loop, and this device gives 4 KiB
and takes 32 KiB a call; here a turn moves whatever the device has. Knows nothing of framing.
"""

from __future__ import annotations

import asyncio
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

READ_CALL_BYTES = 32 * 1024
READ_TURN_BYTES = 256 * 1024
WRITE_CALL_BYTES = 32 * 1024  # the driver takes no more at once
HIGH_WATER = 256 * 1024
LOW_WATER = 64 * 1024


class PortTransport(asyncio.Transport):
    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, protocol: asyncio.Protocol) -> None:
        super().__init__()
        os.set_blocking(fd, False)
        self._loop = loop
        self._fd = fd
        self._protocol: asyncio.BaseProtocol = protocol
        self._incoming = protocol
        self._unsent = bytearray()
        self._writer_added = False
        self._paused_protocol = False
        self._reading = True
        self._closing = False
        protocol.connection_made(self)
        loop.add_reader(fd, self._readable)

    # reading

    def _readable(self) -> None:
        chunks: list[bytes] = []
        size = 0
        ended = False
        failure: OSError | None = None
        try:
            while size < READ_TURN_BYTES:
                chunk = os.read(self._fd, READ_CALL_BYTES)
                if not chunk:
                    ended = True
                    break
                chunks.append(chunk)
                size += len(chunk)
        except BlockingIOError:
            pass
        except OSError as error:
            failure = error
        if chunks:
            self._incoming.data_received(b"".join(chunks))
        if ended:
            self._incoming.eof_received()
        if ended or failure:
            self._finish(failure)

    def pause_reading(self) -> None:
        if self._reading and not self._closing:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    # writing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closing:
            return  # as asyncio's transports do: the reader learns of the end
        if self._unsent:
            self._unsent += data
        else:
            rest = self._push(memoryview(data))
            if rest is None:
                return
            self._unsent += rest
            if self._unsent and not self._writer_added:
                self._writer_added = True
                self._loop.add_writer(self._fd, self._writable)
        if len(self._unsent) > HIGH_WATER and not self._paused_protocol:
            self._paused_protocol = True
            self._protocol.pause_writing()

    def _push(self, view: memoryview) -> memoryview | None:
        """Writes until the device is full; what is left, or None when the device failed."""
        try:
            while view:
                view = view[os.write(self._fd, view[:WRITE_CALL_BYTES]) :]
        except BlockingIOError:
            pass
        except OSError as error:
            self._finish(error)
            return None
        return view

    def _writable(self) -> None:
        view = memoryview(self._unsent)
        rest = self._push(view)
        if rest is None:
            return
        left = len(rest)
        rest.release()
        view.release()
        del self._unsent[: len(self._unsent) - left]
        if left <= LOW_WATER and self._paused_protocol:
            self._paused_protocol = False
            self._protocol.resume_writing()
        if not left:
            self._writer_added = False
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._finish(None)

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def can_write_eof(self) -> bool:
        return False

    # the end

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Sends what is left, then closes."""
        if self._closing:
            return
        if self._unsent:
            self._closing = True
            self._loop.remove_reader(self._fd)
        else:
            self._finish(None)

    def abort(self) -> None:
        self._finish(None)

    def _finish(self, failure: OSError | None) -> None:
        if self._fd < 0:
            return
        self._closing = True
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        self._unsent = bytearray()  # not clear(): _push may still hold a view of it
        fd, self._fd = self._fd, -1
        self._loop.call_soon(self._lost, fd, failure)

    def _lost(self, fd: int, failure: OSError | None) -> None:
        os.close(fd)
        self._protocol.connection_lost(failure)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol
        if isinstance(protocol, asyncio.Protocol):
            self._incoming = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol
