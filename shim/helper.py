"""Processes that a pod's shim starts itself, watched by event: spawn, exit, kill.

Not asyncio's subprocess: its child watcher costs a thread a child, and waits for children that libvirt
means to wait for. It must not know what the programs do.
"""

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from rpc.errors import Unavailable, printable
from shim import procfs, system
from shim.namespaces import HostNamespaces

T = TypeVar("T")
# By pid, how those ended that reap_orphans() has reaped of late: wait statuses.
_orphans: dict[int, int] = {}
_MOST_ORPHANS = 16
PLAIN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}


class Watched:
    """A process that may end at any moment: `exited` is set when it has, whoever reaps it."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid
        self.exited = asyncio.Event()
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._pidfd = -1
            self.exited.set()
            return
        asyncio.get_running_loop().add_reader(self._pidfd, self._on_exit)

    def host_pid(self, host_proc: int) -> int:
        """Its pid as the host counts it; 0 once it has ended."""
        return 0 if self._pidfd < 0 else system.host_pid_of(self._pidfd, host_proc)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self._pidfd >= 0 and not self.exited.is_set():
            system.kill_process(self._pidfd, number)

    async def end(self) -> None:
        """Kills it, and returns when it is gone."""
        self.kill()
        await self.exited.wait()

    def how(self) -> str:
        """How it ended, for an error message; empty if that is not known, as it is no orphan of ours."""
        reap_orphans()
        status = _orphans.get(self.pid)
        return "" if status is None else _in_words(os.waitstatus_to_exitcode(status))

    def _on_exit(self) -> None:
        self._forget()
        self.exited.set()

    def _forget(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1


class Helper(Watched):
    """A child of ours. status is its exit status, or 128 + signal, once exited is set."""

    def __init__(self, name: str, pid: int, log: str | None = None) -> None:
        super().__init__(name, pid)
        self.status: int | None = None
        self._code = 0  # negative for a signal, which an exit status above 128 is not
        self.log = log
        if self.exited.is_set():
            self._reap()

    def _on_exit(self) -> None:
        self._reap()
        super()._on_exit()

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)  # it has exited: this does not wait
        self._code = os.waitstatus_to_exitcode(status)
        self.status = self._code if self._code >= 0 else 128 - self._code

    def how(self) -> str:
        """How it ended, for an error message."""
        return _in_words(self._code)

    def words(self) -> str:
        """The end of what it wrote to its log, for an error message."""
        return tail(self.log) if self.log else ""


def _in_words(code: int) -> str:
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}"


def spawn(
    name: str,
    argv: Sequence[str],
    *,
    program: int | None = None,
    fds: Mapping[int, int] | None = None,
    log: str | None = None,
    env: Mapping[str, str] | None = None,
    within: HostNamespaces | None = None,
) -> Helper:
    """Starts a program with default signals; stdin is empty, stdout and stderr go to log (or nowhere).

    program: a descriptor of its file, if argv does not begin with its path. fds: what each descriptor in the
    child is here. within: for a program of the host's. Raises Unavailable if the program cannot be executed.
    """
    actions: list[tuple[int, ...] | tuple[int, int, str, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log or "/dev/null", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # A dup2 onto itself would leave close-on-exec set; numbers in the child never overlap ours here
    # because what we hand out is moved up first.
    moved = {target: _above(source) for target, source in (fds or {}).items()}
    actions += [(os.POSIX_SPAWN_DUP2, source, target) for target, source in moved.items()]
    opened = [] if program is None else [_above(program)]
    start = partial(
        os.posix_spawn,
        f"/proc/self/fd/{opened[0]}" if opened else argv[0],
        list(argv),
        dict(PLAIN_ENVIRONMENT if env is None else env),
        file_actions=actions,
        setsigdef=[signal.SIGPIPE, signal.SIGINT, signal.SIGTERM],
        setsigmask=[],
    )
    try:
        pid = start() if within is None else within.run(start)
    except OSError as error:
        raise Unavailable(f"{name}: cannot run {argv[0]}", details=error.strerror) from error
    finally:
        for fd in (*moved.values(), *opened):
            os.close(fd)
    return Helper(name, pid, log)


def _above(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 64)


def tail(path: str, most_bytes: int = 2048) -> str:
    """The last lines of a log, printable; empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - most_bytes))
            text = file.read().decode("utf-8", "replace").strip()
    except FileNotFoundError:
        return ""
    return printable(text, keeping="\n")


def reap_orphans() -> None:
    """Ends the zombies that nobody else will: daemons whose parents are gone.

    As first process of a PID namespace the shim inherits them, QEMU above all, and libvirt waits for QEMU
    to vanish before it believes that it is dead. libvirt's own children must be left to libvirt: those
    are in our session, or lead one of their own until they have forked the daemon.
    """
    session = os.getsid(0)
    for pid, (state, parent, _, its_session, *_) in procfs.processes():
        if pid != 1 and state == b"Z" and parent == b"1" and int(its_session) not in (session, pid):
            try:
                _, _orphans[pid] = os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue
            while len(_orphans) > _MOST_ORPHANS:
                del _orphans[next(iter(_orphans))]


def in_thread(function: Callable[[], T]) -> "asyncio.Future[T]":
    """Not the loop's executor: its threads are waited for at exit, and one of these may hang."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: list[T], error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result[0])

    def run() -> None:
        result: list[T] = []
        error: BaseException | None = None
        try:
            result.append(function())
        except BaseException as raised:  # noqa: BLE001 - it is raised where it is awaited
            error = raised
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:
            if not loop.is_closed():  # else nobody waits for it any more
                raise

    threading.Thread(target=run, daemon=True).start()
    return future
