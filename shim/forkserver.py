"""Asking casemated's fork server for a process with everything imported, to be a pod's daemon.

`start` speaks first, so that a process is forked, compared and put in its place (node/successor.py) while
`start` makes the pod's directory and socket. The words, JSON behind a length of 4 bytes:

    start                                                server's child
    hello: who asks, code, environment, command line,
           request, settings                         ->
                                                      <- ready, or why not
    (the address is printed)
    go: when the socket was bound; listener, log as fds ->
                                                      <- mine: from here on it is the daemon

The child may have one of the pool's machines say the last word in its stead (node/spare.py).

Nothing that cannot be taken back is done before `mine` is sent, and the kernel decides whether it was: a
`start` that waits no longer shuts its side of the connection, after which sending fails and the child ends;
what was sent before is still read. So there is one daemon, and never two. Whatever else goes wrong, `start`
forks by itself. It must not know what a fork server is made of.
"""

import json
import os
import socket
import sys
import time

from config import places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

SOCKET = "casemated.sock"
PROTOCOL = 2
# A child is ready in a few hundredths of a second. What takes longer than this would be no gain.
READY_S = 1.0
MINE_S = 1.0
MOST_BYTES = 16 << 20
MOST_FDS = 3


def server_path() -> str:
    return os.path.join(places.run_dir(), SOCKET)


def code() -> "dict[str, Any]":
    """What has to be the same on both sides: where ours is imported from, and by which Python."""
    return {
        "protocol": PROTOCOL,
        "package": os.path.dirname(os.path.abspath(__file__)),
        "python": os.path.realpath(sys.executable),
        "version": sys.version,
        "path": sys.path,
        "encoding": [sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()],
    }


class Offer:
    """A conversation that was begun. remark: why it came to nothing, for the pod's log."""

    def __init__(self, connection: "socket.socket | None", remark: str = "") -> None:
        self._connection = connection
        self._until_s = time.monotonic() + READY_S
        self.remark = remark

    def take(self, words: "dict[str, Any]", fds: "Sequence[int]") -> bool:
        """Hands over what `start` has made. Whether there is a daemon now; if not, nothing was done."""
        if self._connection is None:
            return False
        connection, self._connection = self._connection, None
        with connection:
            try:
                answer, _ = receive(connection, self._until_s)
                if "declined" in answer:
                    self.remark = str(answer["declined"])
                    return False
                send(connection, words, time.monotonic() + MINE_S, fds)
                receive(connection, time.monotonic() + MINE_S)
            except (OSError, ValueError, RecursionError) as error:
                self.remark = str(error) or type(error).__name__
                return self._is_mine(connection)
        return True

    def close(self) -> None:
        """The child ends: it has nothing yet."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _is_mine(self, connection: socket.socket) -> bool:
        """The last word. Shutting and sending take the same lock (unix_shutdown, unix_stream_sendmsg)."""
        try:
            connection.shutdown(socket.SHUT_RD)
            answer, _ = receive(connection, time.monotonic())
        except (OSError, ValueError):
            return False
        return "mine" in answer


def ask(started_ticks: int, words: "dict[str, Any]") -> Offer:
    """Begins, and does not wait. started_ticks: when this process was executed, as /proc counts. words: what
    the daemon will need to know, but for what take() gets.

    No casemated is no remark: most hosts have none.
    """
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.setblocking(False)
        connection.connect(server_path())
        if peer(connection)[1] != os.geteuid():
            raise PermissionError(f"{server_path()} is another user's")
        hello = {
            **words,
            **code(),
            "pid": os.getpid(),
            "started": started_ticks,
            "argv": [os.fsencode(word).hex() for word in sys.orig_argv],
            "environment": dict(os.environ),
        }
        send(connection, hello, time.monotonic() + READY_S)
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return Offer(None)
    except (OSError, ValueError) as error:
        connection.close()
        return Offer(None, str(error))
    return Offer(connection)


def peer(connection: socket.socket) -> tuple[int, int]:
    """(pid, uid) of who connected, or of who listens (unix(7), SO_PEERCRED)."""
    import struct

    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid


def send(
    connection: socket.socket, words: "dict[str, Any]", until_s: float, fds: "Sequence[int]" = ()
) -> None:
    """Raises OSError: TimeoutError if the other side does not take it in time, EPIPE if it has shut."""
    text = json.dumps(words).encode()
    data = memoryview(len(text).to_bytes(4, "big") + text)
    _wait_at_most(connection, until_s)
    sent = socket.send_fds(connection, [data], list(fds), socket.MSG_NOSIGNAL)
    while sent < len(data):
        _wait_at_most(connection, until_s)
        sent += connection.send(data[sent:], socket.MSG_NOSIGNAL)


def receive(connection: socket.socket, until_s: float | None) -> "tuple[dict[str, Any], list[int]]":
    """The next words and the descriptors that came with them, which are the caller's to close.

    until_s: None waits as long as the other side lives. Raises OSError or ValueError, and then holds none.
    """
    fds: list[int] = []
    try:
        size = int.from_bytes(_read(connection, 4, until_s, fds), "big")
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes are no message")
        words = json.loads(_read(connection, size, until_s, fds))
        if not isinstance(words, dict):
            raise ValueError("not an object of JSON")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return words, fds


def _read(connection: socket.socket, size: int, until_s: float | None, fds: list[int]) -> bytes:
    data = b""
    while len(data) < size:
        _wait_at_most(connection, until_s)
        more, found, _, _ = socket.recv_fds(connection, size - len(data), MOST_FDS)
        for fd in found:
            os.set_inheritable(fd, False)  # Python 3.11 leaves recv_fds's flags out, MSG_CMSG_CLOEXEC too
        fds += found
        if not more:
            raise ConnectionResetError("the other side has left")
        data += more
    return data


def _wait_at_most(connection: socket.socket, until_s: float | None) -> None:
    """For the next call on it: one moment is left even when the time is up."""
    connection.settimeout(None if until_s is None else max(until_s - time.monotonic(), 1e-3))
