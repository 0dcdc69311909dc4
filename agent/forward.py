"""A connection to a port of the guest's loopback, in the shape of a process with stdin and stdout.

Must not know who asked for it.
"""

from __future__ import annotations

import asyncio
import os
import socket

from agent.stdio import STDOUT, Input, Output, Stdio
from rpc.errors import FailedPrecondition

CONNECT_S = 5.0
_FAMILIES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


class _Sending(Input):
    """The end of what is sent is told to the other side, which may go on."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(os.dup(connection.fileno()), terminal=False)
        self._connection = connection

    def close(self) -> None:
        super().close()
        self._connection.close()

    async def finish(self) -> None:
        async with self._turn:
            if self._connection.fileno() >= 0:
                self._connection.shutdown(socket.SHUT_WR)


class Forward:
    def __init__(self, connection: socket.socket) -> None:
        self.stdio = Stdio()
        self.stdio.outputs[STDOUT] = Output(os.dup(connection.fileno()))
        self.stdio.input = self._sending = _Sending(connection)

    def stdin(self) -> Input:
        return self._sending

    def close(self) -> None:
        """Whoever reads or writes is told."""
        self.stdio.close()


async def connect(port: int) -> Forward:
    """Raises FailedPrecondition if nobody listens there."""
    loop = asyncio.get_running_loop()
    problem = ""
    for family, address in _FAMILIES:
        try:
            connection = socket.socket(family)  # a kernel may do without IPv6
        except OSError:
            continue
        try:
            connection.setblocking(False)
            async with asyncio.timeout(CONNECT_S):
                await loop.sock_connect(connection, (address, port))
            return Forward(connection)
        except (OSError, TimeoutError, OverflowError) as error:
            connection.close()
            problem = problem or str(error) or "no answer"
        except BaseException:
            connection.close()
            raise
    raise FailedPrecondition(f"port {port} of the pod", problem)
