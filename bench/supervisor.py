"""Holds one private containerd: a mount and a network namespace, a /run of its own, every orphan.

Run as a program by bench/instance.py; speaks JSON lines on stdin and stdout, and kills whatever
descends from it when stdin ends. It knows nothing of containerd or casemate: it starts what it is told.
"""

import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWNET = 0x40000000
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 0x2
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")


def isolate(without_mounts: list[str]) -> None:
    """Our own mounts and network: what the containerd below us leaves behind can be told from anybody
    else's. without_mounts are taken away in our namespace; the host keeps them.
    """
    _check(_libc.unshare(CLONE_NEWNS | CLONE_NEWNET), "unshare")
    _check(_libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "make / private")
    _check(_libc.mount(b"tmpfs", b"/run", b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=0755"), "tmpfs on /run")
    for path in without_mounts:
        _check(_libc.umount2(os.fsencode(path), MNT_DETACH), f"umount {path}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    # Orphans come to us, not to PID 1: "which processes are left" has an exact answer.
    _check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def parents() -> dict[int, int]:
    """Parent pid of every process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    found[int(name)] = int(file.read().rsplit(b")", 1)[1].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked
    return found


def descendants(root: int) -> set[int]:
    """Every process below `root`, without `root`."""
    children: dict[int, list[int]] = {}
    for pid, parent in parents().items():
        children.setdefault(parent, []).append(pid)
    below: set[int] = set()
    todo = [root]
    while todo:
        for child in children.get(todo.pop(), ()):
            below.add(child)
            todo.append(child)
    return below


class Supervisor:
    def __init__(self) -> None:
        self.started: set[int] = set()

    def tell(self, **message: Any) -> None:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()

    def start(self, argv: list[str], env: dict[str, str], log: str, cwd: str) -> int:
        with open(log, "ab") as output:
            # Our children are reaped by reap(), never by this object: give up its claim at once.
            child = subprocess.Popen(
                argv,
                env=env,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        child.returncode = 0
        self.started.add(child.pid)
        return child.pid

    def reap(self) -> bool:
        """Reap what has ended; say which of it we had started. True while children remain."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid in self.started:
                self.started.discard(pid)
                self.tell(event="exit", pid=pid, status=os.waitstatus_to_exitcode(status))

    def kill_all(self) -> None:
        """End every descendant. Orphans of the killed become our children, so that waiting for children is
        enough.
        """
        while True:
            for pid in descendants(os.getpid()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue  # ended by itself
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return

    def serve(self) -> None:
        wake, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        selector = selectors.DefaultSelector()
        selector.register(wake, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        self.tell(event="ready", pid=os.getpid())
        pending = b""
        while True:
            for key, _ in selector.select():
                if key.fd == wake:
                    os.read(wake, 4096)
                    self.reap()
                    continue
                data = os.read(0, 65536)
                if not data:
                    return
                pending += data
                while b"\n" in pending:
                    line, pending = pending.split(b"\n", 1)
                    self.tell(event="started", pid=self.start(**json.loads(line)))


def main() -> None:
    isolate(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a Ctrl-C is for the tests; the end of stdin is for us
    supervisor = Supervisor()
    try:
        supervisor.serve()
    finally:
        supervisor.kill_all()


if __name__ == "__main__":
    main()
