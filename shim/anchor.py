"""The host's stand-in for a container: the pid that containerd and its clients are told.

Tools look at /proc/PID/ns/net and /proc/PID/root of what they believe is the container's init. QEMU's pid
would show them the host's root; this process has the pod's network namespace and the container's own root,
no capability, and does nothing until it is killed.
"""

import os
import signal
from pathlib import Path

from rpc.errors import Internal
from shim import system
from shim.helper import Helper

NOBODY = 65534
MOST_FDS = 1 << 20


class Anchor(Helper):
    """shown_pid is its pid as the host counts it; pid, as the shim does."""

    def __init__(self, pid: int, shown_pid: int) -> None:
        super().__init__("anchor", pid)
        self.shown_pid = shown_pid

    async def end(self) -> None:
        self.kill()
        await self.exited.wait()


def make_anchor(root: Path, host_proc: int) -> Anchor:
    """Forks. Raises Internal if the child cannot become what it should."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _be_anchor(root, host_proc, write)
    finally:
        os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read(64)
    if not said.isdigit():
        os.waitpid(pid, 0)
        raise Internal("the container's anchor process failed", details=said.decode("utf-8", "replace"))
    return Anchor(pid, int(said))


def _be_anchor(root: Path, host_proc: int, write: int) -> None:
    """In the child. Nothing of the shim's stays: descriptors, privileges, signal handlers, root."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        said = str(system.host_pid(host_proc)).encode()
        os.chroot(root)
        os.chdir("/")
        system.set_process_name("casemate-anchor")
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        keep = os.dup2(write, 0)
        os.closerange(1, MOST_FDS)
        os.write(keep, said)
        os.close(keep)
        while True:
            signal.pause()
    except BaseException as error:  # noqa: BLE001 - the parent raises what is written here
        os.write(write, f"{type(error).__name__}: {error}".encode()[:60])
    finally:
        os._exit(1)
