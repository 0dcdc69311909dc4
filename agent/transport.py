"""The byte stream to the shim: a virtio-serial port found by its name, or a vsock connection to the host.

Yields a (reader, writer) pair; must not know what is said on it. Waits for devices by the
kernel's uevents, never by polling; it blocks, because nothing else happens before the shim is there.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import signal
import socket

from agent.port import PortTransport
from agent.uevents import when_there
from rpc.api import agent as api
from rpc.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

PORT_NAME = "dev.casemate.agent"
CONSOLE = "/dev/console"
PORTS = "/sys/class/virtio-ports"
MOST_FILE_CONNECTIONS = 4
_RESERVED_PORTS = 1024
_LIMIT = 256 * 1024
_HOST_CID = 2
_GET_LOCAL_CID = 0x7B9  # IOCTL_VM_SOCKETS_GET_LOCAL_CID
_NO_CID = b"\xff" * 4


class Line:
    """The way to the shim, as the kernel command line says (casemate.transport, .port_name)."""

    def __init__(self, settings: dict[str, str]) -> None:
        self.kind = settings.get("transport", "serial")
        self._port_name = settings.get("port_name", PORT_NAME)
        self._listener: socket.socket | None = None
        self._files_listener: socket.socket | None = None
        if self.kind not in ("serial", "vsock"):
            raise InvalidArgument(
                f"casemate.transport={self.kind} is unknown",
                hint="the kernel command line takes serial or vsock",
            )

    async def connect(self) -> Streams:
        """A connection of the shim's. Each ends before the next is waited for."""
        if self.kind == "serial":
            return _open_port(when_there(lambda: find_port(self._port_name), "virtio-serial port"))
        if self._listener is None:
            when_there(_vsock_is_there, "vsock device")
            self._files_listener = _listen(api.FILES_PORT, MOST_FILE_CONNECTIONS)
            self._listener = _listen(api.VSOCK_PORT, 1)
            self.say_waiting()
        return await asyncio.open_connection(sock=await _accept(self._listener), limit=_LIMIT)

    async def connect_files(self, timeout_s: float) -> socket.socket:
        """The next connection that the host's file server has the other end of."""
        if self._files_listener is None:
            raise FailedPrecondition("files come over vsock alone, and this guest's line is another one")
        try:
            async with asyncio.timeout(timeout_s):
                return await _accept(self._files_listener)
        except TimeoutError:
            raise DeadlineExceeded(f"no file server connected within {timeout_s:g} s") from None

    def say_waiting(self) -> None:
        """On the console, where the host looks for it: nothing else of the guest's is connected."""
        say(api.WAITING)


def say(line: str, path: str = CONSOLE) -> None:
    """What nobody has asked for. Raises OSError where there is no console."""
    fd = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        os.write(fd, f"{line}\n".encode(errors="replace"))
    finally:
        os.close(fd)


def find_port(name: str, ports: str = PORTS) -> str | None:
    """The device node of the virtio-serial port with this name."""
    try:
        candidates = os.listdir(ports)
    except FileNotFoundError:
        return None
    for port in candidates:
        try:
            with open(f"{ports}/{port}/name") as file:
                if file.read().strip() == name:
                    return f"/dev/{port}"
        except FileNotFoundError:
            continue  # a port whose name the host has not sent yet
    return None


def _vsock_is_there() -> bool | None:
    try:
        cid = os.open("/dev/vsock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if fcntl.ioctl(cid, _GET_LOCAL_CID, bytes(4)) == _NO_CID:
            return None  # the device is still being probed
    finally:
        os.close(cid)
    return True


def _listen(port: int, backlog: int) -> socket.socket:
    """The guest listens and the host dials: no VM can reach another one's port (vhost-vsock connects a guest
    with its host alone), and a guest that is restored is there at once, under whatever context id."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(backlog)
    return listener


async def _accept(listener: socket.socket) -> socket.socket:
    """A connection of the host's root: a reserved port takes CAP_NET_BIND_SERVICE there (vsock(7)).

    Others may dial too: users of the host, and processes of a container by the loopback transport.
    """
    loop = asyncio.get_running_loop()
    while True:
        connection, peer = await loop.sock_accept(listener)
        if peer[0] == _HOST_CID and peer[1] < _RESERVED_PORTS:
            return connection
        connection.close()


def _open_port(path: str) -> Streams:
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    _wait_for_host(fd)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_LIMIT)
    protocol = asyncio.StreamReaderProtocol(reader)
    return reader, asyncio.StreamWriter(PortTransport(loop, fd, protocol), protocol, reader, loop)


def _wait_for_host(fd: int) -> None:
    """Returns when the host's end of the port is open: until then it reads as end of file."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC)  # the driver's word for a change is SIGIO
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while any(state & select.POLLHUP for _, state in poll.poll(0)):
        signal.sigwait({signal.SIGIO})
    fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    while signal.sigtimedwait({signal.SIGIO}, 0) is not None:
        pass
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
