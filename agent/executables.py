"""Finds, before a process is started, why its command cannot be executed, in words a person understands.

Looks at a container's files through its root directory; must not know of crun or of RPC types.
"""

from __future__ import annotations

import errno
import os

from agent import libc
from rpc.errors import CasemateError, FailedPrecondition, NotFound, PermissionDenied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# e_machine of the ELF header -> the name `uname -m` gives it
_MACHINES = {
    3: "i386", 8: "mips", 20: "ppc", 21: "ppc64le", 22: "s390x", 40: "arm", 62: "x86_64",
    183: "aarch64", 243: "riscv64", 258: "loongarch64",
}  # fmt: skip
_RUNS_TOO = {"x86_64": ("i386",), "aarch64": ("arm",)}
_ELF_PREFIX_BYTES = 20
_HASHBANG_BYTES = 256


def explain(root_fd: int, args: Sequence[str], cwd: str, environment: Sequence[str]) -> CasemateError | None:
    """What is wrong with this command in that root file system; None if it can be executed.

    The words for what is missing are runc's. Follows a script to its interpreter, once, as the kernel does.
    """
    if not args or not args[0]:
        return FailedPrecondition("the process has no arguments: there is nothing to execute")
    try:
        path = find(root_fd, args[0], cwd, search_path(environment))
        return _wrong_kind(root_fd, path)
    except CasemateError as error:
        return error


def search_path(environment: Sequence[str]) -> str:
    for entry in reversed(environment):
        if entry.startswith("PATH="):
            return entry[5:]
    return DEFAULT_PATH


def find(root_fd: int, name: str, cwd: str, path: str) -> str:
    """The absolute path in the container that exec of name means."""
    if "/" in name:
        candidate = os.path.join(cwd or "/", name)
        number = _executable(root_fd, candidate)
        if not number:
            return candidate
        if number == errno.ENOENT:
            raise NotFound(f'exec: "{name}": stat {name}: no such file or directory')
        raise PermissionDenied(f'exec: "{name}": {os.strerror(number).lower()}')
    refused = 0
    for directory in path.split(":"):
        candidate = os.path.join(cwd or "/", directory, name)
        number = _executable(root_fd, candidate)
        if not number:
            return candidate
        if number not in (errno.ENOENT, errno.ENOTDIR):
            refused = refused or number
    if refused == errno.EACCES:
        raise PermissionDenied(f'exec: "{name}": permission denied')
    raise NotFound(f'exec: "{name}": executable file not found in $PATH')


def _executable(root_fd: int, path: str) -> int:
    """0, or the errno with which executing this path would fail."""
    try:
        fd = libc.open_in_root(root_fd, path, os.O_PATH)
    except OSError as error:
        return error.errno or errno.EIO
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if (status.st_mode & 0o170000) == 0o040000:
        return errno.EISDIR
    return 0 if status.st_mode & 0o111 else errno.EACCES


def _head(root_fd: int, path: str) -> bytes:
    try:
        fd = libc.open_in_root(root_fd, path, os.O_RDONLY)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NotFound(f"exec {path}: no such file or directory") from error
        raise PermissionDenied(f"exec {path}: {os.strerror(error.errno or 0).lower()}") from error
    try:
        return os.read(fd, _HASHBANG_BYTES)
    finally:
        os.close(fd)


def _wrong_kind(root_fd: int, path: str) -> CasemateError | None:
    head = _head(root_fd, path)
    if head.startswith(b"#!"):
        interpreter = head[2:].split(b"\n", 1)[0].split()
        if not interpreter:
            return None
        name = os.fsdecode(interpreter[0])
        number = _executable(root_fd, name)
        if number:
            return NotFound(f"exec {path}: its interpreter {name}: {os.strerror(number).lower()}")
        path, head = name, _head(root_fd, name)
    built_for = elf_machine(head)
    here = os.uname().machine
    if built_for is None or built_for == here or built_for in _RUNS_TOO.get(here, ()):
        return None
    return FailedPrecondition(
        f"exec {path}: built for {built_for}, this machine is {here}",
        hint="the image is of another architecture: pull it for this one (--platform)",
    )


def elf_machine(head: bytes) -> str | None:
    """What an ELF file's first bytes say it was built for; None if it is no ELF file."""
    if not head.startswith(b"\x7fELF") or len(head) < _ELF_PREFIX_BYTES:
        return None
    order = "big" if head[5] == 2 else "little"
    number = int.from_bytes(head[18:20], "big" if order == "big" else "little")
    if number == 21 and order == "big":
        return "ppc64"
    return _MACHINES.get(number, f"ELF machine {number}")
