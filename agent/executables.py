"""Finds, before a process is started, why its command cannot be executed, in words a person understands.

Looks at a container's files through its root directory; must not know of crun or of RPC types.
"""

from __future__ import annotations

import errno
import os
import stat

from agent import elf, libc
from agent.ids import Ids
from rpc.errors import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_RUNS_TOO = {"x86_64": ("i386",), "aarch64": ("arm",)}
_HASHBANG_BYTES = 256


class User:
    """Whom the process runs as, as far as a file's mode bits care. ids: of its user namespace."""

    __slots__ = ("gids", "ids", "uid")

    def __init__(self, uid: int = 0, gids: Sequence[int] = (), ids: Ids | None = None) -> None:
        self.uid = uid
        self.gids = gids
        self.ids = ids or Ids()

    def may_execute(self, status: os.stat_result) -> bool:
        uid, gid = self.ids.uid_inside(status.st_uid), self.ids.gid_inside(status.st_gid)
        if self.uid == 0 and uid is not None and gid is not None:  # else root is as others (capabilities(7))
            return bool(status.st_mode & 0o111)
        if self.uid == uid:
            return bool(status.st_mode & 0o100)
        return bool(status.st_mode & (0o010 if gid in self.gids else 0o001))


class Command:
    """What is to be executed: an OCI process, reduced to what decides whether execve will succeed."""

    __slots__ = ("cwd", "name", "path", "user")

    def __init__(self, name: str, cwd: str = "/", path: str = DEFAULT_PATH, user: User | None = None) -> None:
        self.name = name
        self.cwd = cwd or "/"
        self.path = path
        self.user = user or User()

    @classmethod
    def of(cls, process: dict[str, Any], ids: Ids | None = None) -> Command:
        """Of an OCI process that passes check_arguments()."""
        path = DEFAULT_PATH
        for entry in process.get("env") or ():
            if entry.startswith("PATH="):
                path = entry[5:]
        user = process.get("user") or {}
        gids = [user.get("gid", 0), *(user.get("additionalGids") or ())]
        return cls(process["args"][0], process.get("cwd", "/"), path, User(user.get("uid", 0), gids, ids))


def check_arguments(process: dict[str, Any]) -> None:
    args = process.get("args")
    if not args or not isinstance(args, list) or not args[0]:
        raise InvalidArgument("the process has no arguments: there is nothing to execute")


def check(root_fd: int, command: Command) -> None:
    """Raises what is wrong with this command in that root file system, if anything is.

    The words for what is missing are runc's. Looks at the file itself and whether its interpreter exists.
    """
    _check_kind(root_fd, find(root_fd, command))


def find(root_fd: int, command: Command) -> str:
    """The absolute path in the container that executing this command means."""
    name = command.name
    if "/" in name:
        candidate = os.path.join(command.cwd, name)
        number = _refusal(root_fd, candidate, command.user)
        if not number:
            return candidate
        if number == errno.ENOENT:
            raise NotFound(f'exec: "{name}": stat {name}: no such file or directory')
        raise PermissionDenied(f'exec: "{name}": {os.strerror(number).lower()}')
    refused = False
    for directory in command.path.split(":"):
        candidate = os.path.join(command.cwd, directory, name)
        number = _refusal(root_fd, candidate, command.user)
        if not number:
            return candidate
        refused = refused or number == errno.EACCES
    if refused:
        raise PermissionDenied(f'exec: "{name}": permission denied')
    raise NotFound(f'exec: "{name}": executable file not found in $PATH')


def _refusal(root_fd: int, path: str, user: User) -> int:
    """0, or the errno with which executing this path would fail."""
    try:
        fd = libc.open_in_root(root_fd, path, os.O_PATH)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            return errno.EISDIR
        if user.may_execute(status) or _has_acl(fd):
            return 0
        return errno.EACCES
    finally:
        os.close(fd)


def _has_acl(fd: int) -> bool:
    """An access control list may allow what the mode does not: let execve decide then."""
    try:
        return bool(os.getxattr(f"/proc/self/fd/{fd}", "system.posix_acl_access"))
    except OSError:  # no list, no such thing on this file system, or not for us to see
        return False


def _check_kind(root_fd: int, path: str) -> None:
    """Raises what execve would not like about a file that exists and may be executed."""
    try:
        fd = libc.open_in_root(root_fd, path, os.O_RDONLY)
    except PermissionError:
        return  # executable and not readable: nothing more can be found out
    try:
        head = os.pread(fd, _HASHBANG_BYTES, 0)
        program = elf.read(fd)
    finally:
        os.close(fd)
    if head.startswith(b"#!"):
        words = head[2:].split(b"\n", 1)[0].split()
        if not words:
            raise FailedPrecondition(f"exec {path}: exec format error", "its first line names no interpreter")
        _check_interpreter(root_fd, path, os.fsdecode(words[0]))
        return
    if program is None:
        raise FailedPrecondition(f"exec {path}: exec format error", "it is neither a program nor a script")
    here = os.uname().machine
    if program.machine != here and program.machine not in _RUNS_TOO.get(here, ()):
        raise FailedPrecondition(
            f"exec {path}: built for {program.machine}, this machine is {here}",
            hint="the image is of another architecture: pull it for this one (--platform)",
        )
    if program.interpreter:
        _check_interpreter(root_fd, path, program.interpreter)


def _check_interpreter(root_fd: int, path: str, interpreter: str) -> None:
    number = _refusal(root_fd, interpreter, User())
    if number:
        raise NotFound(f"exec {path}: its interpreter {interpreter}: {os.strerror(number).lower()}")
