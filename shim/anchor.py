"""The host's stand-in for a container: the pid that containerd and its clients are told.

Tools look at /proc/PID/ns/net and /proc/PID/root of what they believe is the container's init. QEMU's pid
would show them the host's root; this process has the pod's network namespace and the container's own root,
no capability, a user that nothing else of the host runs as, and does nothing until it is killed.

It executes a program of a few hundred bytes (shim/anchor_program.py), so it costs no memory worth counting
and has nothing of the shim's.
"""

import asyncio
import os
import socket
from contextlib import ExitStack
from pathlib import Path

from rpc.errors import Internal
from shim import anchor_program
from shim.helper import Watched, spawn
from shim.vm.users import anchor_uid

NAME = "casemate-anchor"
ANSWER_S = 5.0


class Anchors:
    """Makes them. To be made while the process has one thread: a program that another thread's child holds
    open to write, if only until it executes its own, cannot be executed.

    host_proc: a directory descriptor of the host's /proc. locks: where uids are taken, one for all anchors of
    a pod. directory: of a file system that programs are executed from; nothing stays in it. Raises OSError.
    """

    def __init__(self, host_proc: int, locks: Path, directory: Path) -> None:
        self._host_proc = host_proc
        self._locks = locks
        self._uid: int | None = None
        path = directory / NAME
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(path, flags, 0o500), "wb") as file:
            file.write(anchor_program.program())
        try:
            self._program = os.open(path, os.O_PATH | os.O_CLOEXEC)
        finally:
            path.unlink()

    async def make(self, root: str) -> tuple[Watched, int]:
        """A new one, in the caller's network namespace, and its pid as the host counts.

        Raises Internal if it cannot become one, Unavailable if it cannot be executed.
        """
        if self._uid is None:
            self._uid = anchor_uid(self._locks)
        # A stream: of SOCK_SEQPACKET a reader that does not wait may be told the end before what was said
        # last, if both come after it looked and found nothing (__unix_dgram_recvmsg(), net/unix/af_unix.c).
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                anchor = spawn(
                    NAME,
                    [NAME],
                    program=self._program,
                    fds={anchor_program.SOCKET_FD: theirs.fileno()},
                )
            with ExitStack() as undo:
                undo.callback(anchor.kill)
                await _become(ours, self._uid, root)
                pid = anchor.host_pid(self._host_proc)
                if not pid:
                    raise _failed("it ended")
                undo.pop_all()
        return anchor, pid


async def _become(connection: socket.socket, uid: int, root: str) -> None:
    """Returns when it has closed all that it held. Raises Internal."""
    loop = asyncio.get_running_loop()
    connection.setblocking(False)
    try:
        connection.send(anchor_program.UID.pack(uid) + os.fsencode(root) + b"\0", socket.MSG_NOSIGNAL)
        async with asyncio.timeout(ANSWER_S):
            said = await loop.sock_recv(connection, anchor_program.ANSWER.size + 1)
            if said:
                await loop.sock_recv(connection, 1)
    except TimeoutError as error:
        raise _failed(f"it said nothing for {ANSWER_S:.0f} s") from error
    except OSError as error:
        raise _failed(str(error)) from error
    if len(said) != anchor_program.ANSWER.size:
        raise _failed("it ended")
    step, result = anchor_program.ANSWER.unpack(said)
    if step:
        raise _failed(f"{anchor_program.STEPS[step - 1][0]}: {os.strerror(-result)}")


def _failed(words: str) -> Internal:
    return Internal("the container's anchor process failed", details=words)
