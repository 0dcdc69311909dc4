"""The guest's console, read as it comes: the last lines for an error message, a bounded file for a person.

What it reads was written by a hostile guest: it is bytes to keep, never anything to act upon, but for the
agent's word that it waits for the shim, which is no more than a reason to try.
"""

import asyncio
import os
import re
import socket
from pathlib import Path

from rpc.api import agent as api
from rpc.errors import printable

TAIL_BYTES = 16 << 10
READ_BYTES = 64 << 10
PANIC = b"Kernel panic"
WAITING = api.WAITING.encode()
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")


class Console:
    """Takes one connection of QEMU's on a unix socket of its own."""

    def __init__(self, socket_path: Path, file: Path, most_bytes: int, owner: int) -> None:
        self._path = socket_path
        self._listener = listen(socket_path, owner)
        self._connection: socket.socket | None = None
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._most = most_bytes
        self._written = 0
        self._tail = b""
        self.ended = asyncio.Event()
        self.agent_waits = asyncio.Event()

    async def read(self) -> None:
        """Until QEMU closes it. Always read: a guest whose console stalls is a guest that stalls."""
        loop = asyncio.get_running_loop()
        try:
            self._connection, _ = await loop.sock_accept(self._listener)
            while data := await loop.sock_recv(self._connection, READ_BYTES):
                self._keep(data)
        finally:
            self.ended.set()

    def _keep(self, data: bytes) -> None:
        if WAITING in self._tail[-len(WAITING) :] + data:
            self.agent_waits.set()
        self._tail = (self._tail + data)[-TAIL_BYTES:]
        try:
            if self._written + len(data) > self._most:
                # The newest lines explain a failure; a guest that floods loses its own oldest.
                os.ftruncate(self._file, 0)
                os.lseek(self._file, 0, os.SEEK_SET)
                self._written = 0
                data = self._tail[-self._most :]
            self._written += os.write(self._file, data)
        except OSError:
            # A full disk costs the file, never the pod; the tail in memory is still there.
            self._most = 0

    @property
    def panicked(self) -> bool:
        return PANIC in self._tail

    def words(self, lines: int = 12) -> str:
        """For an error message: the last lines, or what led to a panic rather than the trace after it."""
        text = _ESCAPES.sub("", self._tail.decode("utf-8", "replace")).replace("\r", "")
        kept = printable(text, keeping="\n").strip().splitlines()
        if not kept:
            return "the guest's console is empty"
        panic = next((number for number, line in enumerate(kept) if PANIC.decode() in line), len(kept) - 1)
        chosen = kept[max(0, panic + 1 - lines) : panic + 1]
        return "the guest's console ends with:\n" + "\n".join(line[:200] for line in chosen)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._listener.close()
        self._path.unlink(missing_ok=True)
        os.close(self._file)


def listen(path: Path, owner: int) -> socket.socket:
    """A listening unix socket, mode 0600, that only root and owner can connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        os.fchmod(listener.fileno(), 0o600)  # as in shim/bootstrap.py
        listener.bind(str(path))
        os.chown(path, owner, -1)
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener
