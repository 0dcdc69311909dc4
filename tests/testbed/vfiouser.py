"""The server's side of vfio-user: a PCI device of ours in a QEMU that connects to its socket.

The protocol is that of QEMU's docs/interop/vfio-user.rst. Must not know what the device is.
"""

import errno
import json
import os
import socket
import struct
import threading
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

CONFIG_REGION = 7  # 0 to 5 are the BARs (VFIO_PCI_CONFIG_REGION_INDEX, linux/vfio.h)
MSI = 1
_REGIONS, _INTERRUPTS = 9, 5
_HEADER = struct.Struct("<HHIII")  # id, command, size with the header, flags, errno
_REPLY, _NO_REPLY, _ERROR = 0x01, 0x10, 0x20
_RESETTABLE_PCI = 0x3
_READ_WRITE = 0x3
_WRITABLE = 0x2
_UNMAP_ALL = 0x2
_EVENTFD = 0x4
_EVENTFD_KIND = 0x1  # of an interrupt: VFIO_IRQ_INFO_EVENTFD
_CAPABILITIES = {"capabilities": {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20, "pgsizes": 4096}}
_JOIN_S = 10.0


class Command(IntEnum):
    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    GET_INFO = 4
    GET_REGION_INFO = 5
    GET_IRQ_INFO = 7
    SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    RESET = 13


class Device(Protocol):
    """Called by one thread. regions: sizes in bytes, by index; one that is not there has none."""

    @property
    def regions(self) -> Mapping[int, int]: ...

    def connected(self) -> None: ...

    def read(self, region: int, offset: int, size: int) -> bytes: ...

    def write(self, region: int, offset: int, data: bytes) -> None: ...

    def reset(self) -> None:
        """By the bus that it is on."""

    def interrupt_by(self, eventfd: int | None) -> None:
        """Its MSI from now on, or none. The device owns it."""

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        """Memory that it reaches: of a file, which the caller closes; None is memory without one."""

    def unmap(self, iova: int, size: int) -> None: ...

    def unmap_all(self) -> None: ...


class Server:
    """A device at a socket, from enter to exit. What goes wrong in its thread is raised at the exit."""

    def __init__(self, path: Path, device: Device) -> None:
        self._device = device
        self._failure: Exception | None = None
        self._closing = False
        self._connection: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, name=f"vfio-user {path.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        for end in (self._listener, self._connection):
            if end is not None:
                try:
                    end.shutdown(socket.SHUT_RDWR)  # wakes the thread, which close() would not
                except OSError as problem:
                    if problem.errno not in (errno.ENOTCONN, errno.EBADF):
                        raise
        self._thread.join(_JOIN_S)
        self._listener.close()
        if self._failure is not None and error is None:
            raise self._failure

    def _run(self) -> None:
        try:
            while not self._closing:
                connection, _ = self._listener.accept()
                with connection:
                    self._connection = connection
                    self._device.connected()
                    self._converse(connection)
        except (BrokenPipeError, ConnectionResetError):
            pass  # QEMU was killed
        except OSError as failure:
            if not self._closing:  # which ends accept() and recvmsg()
                self._failure = failure
        except Exception as failure:  # noqa: BLE001 # raised at the exit
            self._failure = failure

    def _converse(self, connection: socket.socket) -> None:
        while header := self._exactly(connection, _HEADER.size):
            data, fds = header
            number, command, size, flags, _ = _HEADER.unpack(data)
            body, more = self._exactly(connection, size - _HEADER.size) or (b"", [])
            try:
                answer = self._answer(command, body, fds)
            finally:
                for fd in (*fds, *more):  # those that nobody took
                    os.close(fd)
            if not flags & _NO_REPLY:
                told, error = (_REPLY, 0) if answer is not None else (_REPLY | _ERROR, errno.ENOSYS)
                said = answer or b""
                connection.sendall(
                    _HEADER.pack(number, command, _HEADER.size + len(said), told, error) + said
                )

    @staticmethod
    def _exactly(connection: socket.socket, size: int) -> tuple[bytes, list[int]] | None:
        """So many bytes, and the files that came with them; None at the end. More at once, and the files of
        the next message would be taken for this one's."""
        data, fds = b"", []
        while len(data) < size:
            part, files, _, _ = socket.recv_fds(connection, size - len(data), 8)
            if not part:
                return None
            data += part
            fds += files
        return data, fds

    def _answer(self, command: int, body: bytes, fds: list[int]) -> bytes | None:
        """None to a command that no server of ours knows: QEMU asks for some only to learn that."""
        device = self._device
        match command:
            case Command.REGION_READ:
                offset, region, size = struct.unpack_from("<QII", body)
                return body[:16] + device.read(region, offset, size)
            case Command.REGION_WRITE:
                offset, region, size = struct.unpack_from("<QII", body)
                device.write(region, offset, body[16 : 16 + size])
                return body[:16]
            case Command.DMA_MAP:
                _, flags, offset, iova, size = struct.unpack_from("<IIQQQ", body)
                device.map(iova, size, fds[0] if fds else None, offset, bool(flags & _WRITABLE))
                return b""
            case Command.DMA_UNMAP:
                _, flags, iova, size = struct.unpack_from("<IIQQ", body)
                if flags & _UNMAP_ALL:
                    device.unmap_all()
                else:
                    device.unmap(iova, size)
                return body[:24]
            case Command.SET_IRQS:
                _, flags, index, _, _ = struct.unpack_from("<IIIII", body)
                if index == MSI:
                    device.interrupt_by(fds.pop(0) if flags & _EVENTFD and fds else None)
                return b""
            case Command.RESET:
                device.reset()
                return b""
            case Command.GET_REGION_INFO:
                (index,) = struct.unpack_from("<8xI", body)
                size = device.regions.get(index, 0)
                return struct.pack("<IIIIQQ", 32, _READ_WRITE if size else 0, index, 0, size, 0)
            case Command.GET_IRQ_INFO:
                (index,) = struct.unpack_from("<8xI", body)
                has = index == MSI
                return struct.pack("<IIII", 16, _EVENTFD_KIND if has else 0, index, int(has))
            case Command.GET_INFO:
                return struct.pack("<IIII", 16, _RESETTABLE_PCI, _REGIONS, _INTERRUPTS)
            case Command.VERSION:
                return struct.pack("<HH", 0, 0) + json.dumps(_CAPABILITIES).encode() + b"\0"
        return None
