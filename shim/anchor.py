"""The host's stand-in for a container: the pid that containerd and its clients are told.

Tools look at /proc/PID/ns/net and /proc/PID/root of what they believe is the container's init. QEMU's pid
would show them the host's root; this process has the pod's network namespace and the container's own root,
no capability, a user that nothing else of the host runs as, and does nothing until it is killed.

Anchors are forked by a process that was forked itself before the shim had threads and a heap: safe, and
a megabyte each instead of ten.
"""

import os
import signal
import socket
from pathlib import Path
from typing import NoReturn

from rpc.errors import Internal
from shim import network, system
from shim.vm.users import anchor_uid

MOST_FDS = 1 << 20
QUESTION_BYTES = 4096 + 32  # a path, and a number
ANSWER_BYTES = 256
ANSWER_S = 5.0
ENTER = b"network"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class AnchorMaker:
    """Asks the forking process. One question at a time, each answered within milliseconds.

    locks: where uids are taken, one for all anchors of a pod.
    """

    def __init__(self, connection: socket.socket, pid: int, locks: Path) -> None:
        self.pid = pid
        self._locks = locks
        self._uid: int | None = None
        self._connection = connection
        self._lags = False  # a late answer must not be taken for the next question's

    def close(self) -> None:
        """No more anchors: their maker ends."""
        self._connection.close()

    def make(self, root: str) -> tuple[int, int]:
        """(pid here, pid as the host counts) of a new anchor. Raises Internal if it cannot become one."""
        if self._uid is None:
            self._uid = anchor_uid(self._locks)
        said = self._ask(b"%d %s" % (self._uid, os.fsencode(root)))
        numbers = said.split()
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            words = said.decode("utf-8", "replace") or "it ended"
            raise Internal("the container's anchor process failed", details=words)
        return int(numbers[0]), int(numbers[1])

    def enter_network(self, namespace: int) -> None:
        """For anchors to come. namespace: a descriptor. Raises Internal."""
        said = self._ask(ENTER, (namespace,))
        if said != ENTER:
            words = said.decode("utf-8", "replace") or "it ended"
            raise Internal("the anchors' network namespace cannot be entered", details=words)

    def _ask(self, question: bytes, fds: "Sequence[int]" = ()) -> bytes:
        if self._lags:
            raise Internal("the process that makes anchors did not answer before")
        try:
            socket.send_fds(self._connection, [question], fds)
            return self._connection.recv(ANSWER_BYTES)
        except OSError as error:
            self._lags = True
            raise Internal("the process that makes anchors does not answer", details=str(error)) from error


def fork_maker(host_proc: int, locks: Path) -> AnchorMaker:
    """To be called while the process has one thread, in the pod's network namespace."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        _serve(theirs, host_proc)
    theirs.close()
    ours.settimeout(ANSWER_S)
    return AnchorMaker(ours, pid, locks)


def _serve(connection: socket.socket, host_proc: int) -> NoReturn:
    """Until the shim is gone, which is the end of the whole PID namespace anyway."""
    system.set_process_name("casemate-maker")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    os.setsid()
    while True:
        question, fds, _, _ = socket.recv_fds(connection, QUESTION_BYTES, 1)
        if not question:
            os._exit(0)
        if fds:
            connection.sendall(_enter_network(fds[0]))
            continue
        uid, _, root = question.partition(b" ")
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            _be_anchor(os.fsdecode(root), int(uid), host_proc, write)
        os.close(write)
        with open(read, "rb") as pipe:
            said = pipe.read(ANSWER_BYTES)
        connection.sendall(b"%d %s" % (pid, said) if said.isdigit() else said or b"it ended")


def _enter_network(namespace: int) -> bytes:
    try:
        network.enter(namespace)
    except OSError as error:
        return str(error).encode()[:ANSWER_BYTES]
    finally:
        os.close(namespace)
    return ENTER


def _be_anchor(root: str, uid: int, host_proc: int, write: int) -> NoReturn:
    """In the child. Nothing of the shim's stays: descriptors, privileges, root."""
    try:
        said = str(system.host_pid(host_proc)).encode()
        os.chroot(root)
        os.chdir("/")
        system.set_process_name("casemate-anchor")
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        keep = os.dup2(write, 0)
        os.closerange(1, MOST_FDS)
        os.write(keep, said)
        os.close(keep)
        while True:
            signal.pause()
    except BaseException as error:  # noqa: BLE001 - the shim raises what is written here
        os.write(write, f"{type(error).__name__}: {error}".encode()[:ANSWER_BYTES])
    finally:
        os._exit(1)
