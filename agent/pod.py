"""What the containers of a Kubernetes pod have in common: /dev/shm, process IDs, kernel parameters, ports.

The sandbox container that stands for it on the host has no process here. Must not know of containers.
"""

from __future__ import annotations

import os
import signal

from agent import libc, sysctls
from rpc.errors import AlreadyExists, FailedPrecondition, Internal, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from typing import NoReturn

    from agent.forward import Forward
    from agent.reaper import Exit, Reaper
    from agent.users import Users

_NOBODY = 65534
_WORDS_BYTES = 256
_MOST_FDS = 1 << 16


class Pod:
    """id: of its sandbox container. directory: for what is made here."""

    def __init__(self, pod_id: str, directory: str, reaper: Reaper, users: Users | None = None) -> None:
        self.id = pod_id
        self._users = users
        self._directory = directory
        self._reaper = reaper
        self._init = 0
        self._ended: asyncio.Future[Exit] | None = None
        self._forwards: dict[str, Forward] = {}

    def make(self, shm_path: str, shm_bytes: int, wanted: dict[str, str], sysctl_root: str | None) -> None:
        """Raises FailedPrecondition, InvalidArgument for a kernel parameter; nothing is left then."""
        if os.path.ismount(shm_path):
            raise AlreadyExists(f"{shm_path} is mounted already: a guest is of one pod")
        with sysctls.all_set(wanted, sysctl_root, shared=False):
            if shm_path:
                os.makedirs(shm_path, exist_ok=True)
                flags = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
                libc.mount("shm", shm_path, "tmpfs", flags, f"mode=1777,size={shm_bytes}{self._owner()}")

    def _owner(self) -> str:
        """Options of a file system that is to be the pod's root's, where that is another one than ours."""
        if self._users is None:
            return ""
        uid, gid = self._users.ids.uid_outside(0), self._users.ids.gid_outside(0)
        return "" if uid is None or gid is None else f",uid={uid},gid={gid}"

    async def connect(self, name: str, port: int) -> None:
        """To a port of the loopback. Raises FailedPrecondition if nobody listens there, AlreadyExists."""
        from agent.forward import connect

        if name in self._forwards:
            raise AlreadyExists(f"connection {name} exists already")
        self._forwards[name] = await connect(port)

    def forward(self, name: str) -> Forward:
        """Raises NotFound."""
        try:
            return self._forwards[name]
        except KeyError:
            raise NotFound(f"connection {name} of pod {self.id} does not exist") from None

    def hang_up(self, name: str) -> None:
        """Raises NotFound."""
        self.forward(name).close()
        del self._forwards[name]

    def pid_namespace(self) -> str:
        """A path of the one that containers may join; its first process is made when that is first asked."""
        if self._ended is None:
            root = f"{self._directory}/empty"
            os.makedirs(root, exist_ok=True)
            self._init = _fork_init(root, self._users)
            self._ended = self._reaper.watch(self._init)
        if self._ended.done():
            raise FailedPrecondition("the first process of the pod's PID namespace has ended")
        return f"/proc/{self._init}/ns/pid"


def _fork_init(root: str, users: Users | None) -> int:
    """The pid of a process that is the first of a new PID namespace and does nothing there but reap.

    The process between it and us ends, so that it is a child of PID 1's: before this returns, else an end in
    between would be nobody's to hear of.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    if (parent := os.fork()) == 0:
        _be_parent(root, users, write)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read(_WORDS_BYTES)
    os.waitid(os.P_PID, parent, os.WEXITED | os.WNOWAIT)  # to be collected by the reaper
    if not said.isdigit():
        raise Internal("the pod's PID namespace could not be made", said.decode(errors="replace"))
    return int(said)


def _be_parent(root: str, users: Users | None, write: int) -> NoReturn:
    signal.set_wakeup_fd(-1)  # of the agent's event loop
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # also the first process': the kernel reaps
    try:
        if users is not None:  # whom the namespace of processes then belongs to
            libc.setns(users.fd, libc.CLONE_NEWUSER)
        libc.unshare(libc.CLONE_NEWPID)
        pid = os.fork()
        if pid == 0:
            _be_init(root, _nobody(users))
        os.write(write, b"%d" % pid)
    except BaseException as error:  # noqa: BLE001 - whoever forked us raises what is written here
        os.write(write, f"{type(error).__name__}: {error}".encode()[:_WORDS_BYTES])
    finally:
        os._exit(0)


def _nobody(users: Users | None) -> tuple[int, int]:
    """A user and a group without privileges. Where nobody's have no place, whoever comes last."""
    if users is None:
        return _NOBODY, _NOBODY
    found = []
    for mapping in (users.ids.uids, users.ids.gids):
        last = max(inside + size - 1 for inside, _, size in mapping or ())
        has_nobody = any(inside <= _NOBODY < inside + size for inside, _, size in mapping or ())
        found.append(_NOBODY if has_nobody else last)
    return found[0], found[1]


def _be_init(root: str, user: tuple[int, int]) -> NoReturn:
    """Who forked its parent learns of a failure: the pipe is inherited, and open until all is in place.

    The kernel lets nobody of the namespace kill it, nor send it anything that it does not wait for.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    with open("/proc/self/comm", "wb", buffering=0) as file:
        file.write(b"pause")
    os.setsid()
    os.chroot(root)  # who may look at /proc/1/root sees nothing of the guest's
    os.chdir("/")
    os.setgroups([])
    uid, gid = user
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    os.closerange(0, _MOST_FDS)
    while True:
        signal.pause()
