"""The first words between the shim and a guest's agent: who may connect, what is asked, what is answered.

It must not know what starts the machine, nor what the machine is for.
"""

import asyncio
import errno
import os
import socket
import struct
import time

from rpc.api import agent as api
from rpc.channel import BUFFER_BYTES
from rpc.client import Client
from rpc.errors import FailedPrecondition, ResourceExhausted, Unavailable

ENTROPY_BYTES = 64
RESERVED_PORTS = 1024
CONNECT_TIMEOUT = 6
"""SO_VM_SOCKETS_CONNECT_TIMEOUT of linux/vm_sockets.h, a struct timeval. Python has no name for it."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any


async def greet(
    pod_id: str, hostname: str, connecting: "Coroutine[Any, Any, socket.socket]", timeout_s: float
) -> tuple[Client, api.HelloResponse]:
    """The agent's connection and its first answer. On virtio-serial the question waits for the guest."""
    client = await client_on(await connecting)
    try:
        hello = await client.call(api.HELLO, question(pod_id, hostname), timeout_s=timeout_s)
        if hello.protocol != api.PROTOCOL:
            raise FailedPrecondition(
                f"the guest image's agent speaks protocol {hello.protocol}, this casemate {api.PROTOCOL}",
                hint="casemate image build",
            )
        # The first question may have waited for the guest's boot, its time with it: this one sets the clock.
        again = await client.call(api.HELLO, question(pod_id, hostname), timeout_s=timeout_s)
        hello.monotonic_ns = again.monotonic_ns
    except BaseException:
        await client.close()
        raise
    return client, hello


async def client_on(connection: socket.socket) -> Client:
    reader, writer = await asyncio.open_connection(sock=connection, limit=BUFFER_BYTES)
    return Client(reader, writer, "the guest's agent")


def question(pod_id: str, hostname: str) -> api.HelloRequest:
    return api.HelloRequest(
        protocol=api.PROTOCOL,
        pod_id=pod_id,
        hostname=hostname,
        realtime_ns=time.time_ns(),
        entropy=os.urandom(ENTROPY_BYTES),
    )


async def accept(listener: socket.socket) -> socket.socket:
    """QEMU's end of a virtio-serial port."""
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    return connection


async def dial(
    cid: int, waits: asyncio.Event | None, limit_s: float, port: int = api.VSOCK_PORT
) -> socket.socket:
    """A vsock connection to a port of the agent of context cid. waits: set once the agent says that it waits
    for one; None: it does already. limit_s: how long a guest may take then.

    From a reserved port, which takes CAP_NET_BIND_SERVICE: an agent takes no other, so that nobody but the
    host's root can be its shim. Raises Unavailable.
    """
    if waits is not None:
        await waits.wait()
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _bind_reserved(connection)
        _wait_up_to(connection, limit_s)
        await asyncio.get_running_loop().sock_connect(connection, (cid, port))
    except OSError as error:
        connection.close()
        raise Unavailable(
            f"the guest's agent cannot be reached at vsock context {cid}", str(error)
        ) from error
    except BaseException:
        connection.close()
        raise
    return connection


def _wait_up_to(connection: socket.socket, limit_s: float) -> None:
    """The kernel itself gives up after 2 s, which a guest on a crowded host may not run for."""
    seconds, rest = divmod(limit_s, 1)
    # To a socket of this family Python gives integers only.
    nameless = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=connection.fileno())
    try:
        timeval = struct.pack("ll", int(seconds), int(rest * 1e6))
        nameless.setsockopt(socket.AF_VSOCK, CONNECT_TIMEOUT, timeval)
    finally:
        nameless.detach()


def _bind_reserved(connection: socket.socket) -> None:
    first = int.from_bytes(os.urandom(4), "little")
    for number in range(RESERVED_PORTS - 1):
        port = 1 + (first + number) % (RESERVED_PORTS - 1)
        try:
            connection.bind((socket.VMADDR_CID_ANY, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            continue
        return
    raise ResourceExhausted("all reserved vsock ports of the host are in use")
