"""Connections to a port of the pod's that are made on the host, in its network namespace, over the loopback.

CRI's port-forward dials localhost there, where nothing of the pod listens: the programs are in the guest.
Each such connection is continued in it by the agent. It must not know of containers.
"""

import asyncio
import itertools
import logging
import os
import socket
import struct

from rpc.api import agent as api
from rpc.errors import CasemateError, DataLoss
from shim.catchall import catch_all
from shim.tasks import Tasks
from shim.vm.guest import Machine

READ_BYTES = 64 << 10
MOST = 64
"""Connections at a time. More wait until one has ended."""
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets

log = logging.getLogger("casemate")


class PortForward:
    """Of the network namespace that the calling thread is in when it is made, and of the pod of this id.

    host_network: a descriptor of the one that must never be it.
    """

    def __init__(self, machine: Machine, pod_id: str, host_network: int) -> None:
        self._machine = machine
        self._pod_id = pod_id
        self._numbers = itertools.count(1)
        self._room = asyncio.Semaphore(MOST)
        self._link = -1
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._tasks = Tasks("forwarding to a port of the pod failed")
        try:
            self._listener.setblocking(False)
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                if os.path.sameopenfile(namespace, host_network):
                    raise OSError("this network namespace is the host's")
                self._link = catch_all(self._listener.fileno(), namespace)
            finally:
                os.close(namespace)
        except OSError as error:
            self._listener.close()
            log.warning("no port of the pod can be forwarded to: %s", error)
            return
        self._tasks.start(self._accept())

    async def close(self) -> None:
        """Hangs up, and lets go of the namespace's ports."""
        await self._tasks.cancel()
        self._listener.close()
        if self._link >= 0:
            os.close(self._link)
            self._link = -1

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            connection, _ = await loop.sock_accept(self._listener)
            self._tasks.start(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        port = connection.getsockname()[1]  # the one that was asked for, not the listener's
        ids = {"container_id": self._pod_id, "exec_id": f"port-{port}-{next(self._numbers)}"}
        try:
            await self._machine.call(api.CONNECT, api.ConnectRequest(**ids, port=port))
            try:
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._to_guest(connection, ids))
                    both.create_task(self._from_guest(connection, ids))
            finally:
                await self._machine.call(api.DELETE, api.DeleteRequest(**ids, kill=True))
        except* (CasemateError, OSError) as errors:
            log.info("a connection to port %d ended: %s", port, errors.exceptions[0])
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        finally:
            connection.close()
            self._room.release()

    async def _to_guest(self, connection: socket.socket, ids: "dict[str, str]") -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(connection, READ_BYTES):
            await self._machine.call(api.WRITE_STDIN, api.WriteStdinRequest(**ids, data=data), patient=True)
        await self._machine.call(api.CLOSE_STDIN, api.CloseStdinRequest(**ids))

    async def _from_guest(self, connection: socket.socket, ids: "dict[str, str]") -> None:
        loop = asyncio.get_running_loop()
        request = api.ReadOutputRequest(**ids, stream=api.STDOUT, max_bytes=READ_BYTES)
        while True:
            answer = await self._machine.call(api.READ_OUTPUT, request, patient=True)
            if len(answer.data) > READ_BYTES or not (answer.data or answer.eof):
                raise DataLoss("the guest answered more than was asked for, or nothing")
            await loop.sock_sendall(connection, answer.data)
            if answer.eof:
                connection.shutdown(socket.SHUT_WR)
                return
