"""The byte stream to the shim: a virtio-serial port found by its name, or a vsock connection to the host.

Yields a (reader, writer) pair; must not know what is said on it. Waits for devices by the
kernel's uevents, never by polling; it blocks, because nothing else happens before the shim is there.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import select
import signal
import socket
import time

from agent.port import PortTransport
from rpc.errors import InvalidArgument, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias, TypeVar

    Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
    T = TypeVar("T")

PORT_NAME = "dev.casemate.agent"
PORTS = "/sys/class/virtio-ports"
DEFAULT_VSOCK_PORT = 1024
DEVICE_WAIT_S = 30.0
DIAL_S = 120.0  # the shim's own limit ends the machine, as a rule before
REDIAL_S = 0.02
_KOBJECT_UEVENT = 15  # NETLINK_KOBJECT_UEVENT
_LIMIT = 256 * 1024
_HOST_CID = 2
_TURNED_AWAY = (errno.ECONNRESET, errno.ECONNREFUSED, errno.ETIMEDOUT)


async def connect(settings: dict[str, str]) -> tuple[str, Streams]:
    """Connects as the kernel command line says (casemate.transport, .port); tells which way it took."""
    kind = settings.get("transport", "serial")
    if kind == "serial":
        path = _when_there(lambda: find_port(settings.get("port_name", PORT_NAME)), "virtio-serial port")
        return kind, _open_port(path)
    if kind == "vsock":
        address = _HOST_CID, int(settings.get("port", DEFAULT_VSOCK_PORT))
        connection = _when_there(lambda: dial(socket.AF_VSOCK, address), "vsock device")
        return kind, await asyncio.open_connection(sock=connection, limit=_LIMIT)
    raise InvalidArgument(
        f"casemate.transport={kind} is unknown", hint="the kernel command line takes serial or vsock"
    )


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


def dial(family: int, address: tuple[Any, ...], limit_s: float = DIAL_S) -> socket.socket | None:
    """A connection to the host, tried again for as long as the host turns it away; None without a device.

    Other guests may fill the shim's queue for a while, which the kernel answers with a reset. Nothing tells
    when there is room again. Raises Unavailable after limit_s.
    """
    deadline = time.monotonic() + limit_s
    while True:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            if error.errno in (errno.ENODEV, errno.EADDRNOTAVAIL, errno.ENETUNREACH):
                return None  # the device is still being probed
            if error.errno not in _TURNED_AWAY or time.monotonic() + REDIAL_S > deadline:
                raise Unavailable(
                    f"port {address[-1]} of the host does not accept the agent", os.strerror(error.errno or 0)
                ) from error
            time.sleep(REDIAL_S)
            continue
        connection.setblocking(False)
        return connection


def _when_there(look: Callable[[], T | None], what: str) -> T:
    """look() as soon as it finds something, asked again after each of the kernel's device events."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _KOBJECT_UEVENT) as events:
        events.bind((0, 1))
        deadline = time.monotonic() + DEVICE_WAIT_S
        while (found := look()) is None:
            events.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                events.recv(65536)
            except TimeoutError:
                raise Unavailable(f"no {what} appeared within {DEVICE_WAIT_S:g} s") from None
        return found


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
