"""The first words between the shim and a guest's agent: who may connect, what is asked, what is answered.

It must not know what starts the machine, nor what the machine is for.
"""

import asyncio
import errno
import logging
import os
import secrets
import socket
import time

from rpc.api import agent as api
from rpc.channel import BUFFER_BYTES
from rpc.client import Client
from rpc.errors import FailedPrecondition, Unavailable

ENTROPY_BYTES = 64
PORTS = range(1 << 20, 1 << 31)
PORT_TRIES = 16
BACKLOG = 128
log = logging.getLogger("casemate")


async def greet(
    pod_id: str, hostname: str, listener: socket.socket, cid: int | None, timeout_s: float
) -> tuple[Client, api.HelloResponse]:
    """The agent's connection and its first answer. On virtio-serial the question waits for the guest.

    Closes the listener as soon as it has the connection: nobody else is to come.
    """
    connection = await _accept(listener, cid)
    listener.close()
    reader, writer = await asyncio.open_connection(sock=connection, limit=BUFFER_BYTES)
    client = Client(reader, writer, "the guest's agent")
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


def question(pod_id: str, hostname: str) -> api.HelloRequest:
    return api.HelloRequest(
        protocol=api.PROTOCOL,
        pod_id=pod_id,
        hostname=hostname,
        realtime_ns=time.time_ns(),
        entropy=os.urandom(ENTROPY_BYTES),
    )


async def _accept(listener: socket.socket, cid: int | None) -> socket.socket:
    """The guest's connection. Any VM of the host can reach a vsock port: another's is turned away."""
    loop = asyncio.get_running_loop()
    refused = 0
    try:
        while True:
            connection, peer = await loop.sock_accept(listener)
            if cid is None or peer[0] == cid:
                return connection
            connection.close()
            refused += 1
            if refused == 1:  # and no line for each: they who send them decide how many
                log.warning("refused a connection from vsock context %s: this pod's is %s", peer[0], cid)
    finally:
        if refused > 1:
            log.warning("refused %d connections from other vsock contexts", refused)


def listen_vsock() -> socket.socket:
    """On a port that nobody else has and nobody can guess; _accept() checks who connects.

    The kernel's own choice of a port is one more than its last, to whoever asks (net/vmw_vsock/af_vsock.c).
    """
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        for _ in range(PORT_TRIES):
            try:
                listener.bind((socket.VMADDR_CID_ANY, secrets.choice(PORTS)))
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        else:
            raise Unavailable(f"no free vsock port was found in {PORT_TRIES} tries")
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
