"""The few system calls that Python's standard library lacks: mount, unshare, setns, finit_module, reboot,
openat2.

The only module of the agent that knows ctypes. It knows nothing of what the calls are for.
"""

import ctypes
import os
from struct import pack

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
RESOLVE_IN_ROOT = 0x10
_OPENAT2 = 437  # the same number on every architecture (Linux 5.6)
_FINIT_MODULE = {"x86_64": 313, "aarch64": 273}
_MODULE_INIT_COMPRESSED_FILE = 4
_POWER_OFF = 0x4321FEDC

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, name: str | None = None) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str = "") -> None:
    _check(
        _libc.mount(
            source.encode(),
            target.encode(),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        target,
    )


def umount(target: str) -> None:
    _check(_libc.umount2(target.encode(), 0), target)


def unshare(flags: int) -> None:
    """CLONE_NEWPID: of children to come, not of the caller."""
    _check(_libc.unshare(flags))


def setns(fd: int, kind: int) -> None:
    """kind: the CLONE_NEW... that the namespace is."""
    _check(_libc.setns(fd, kind))


def load_module(path: str, options: str = "") -> None:
    """Inserts a kernel module; a compressed one is decompressed by the kernel (Linux 5.17). options: its
    parameters, as NAME=VALUE NAME=VALUE."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = 0 if path.endswith(".ko") else _MODULE_INIT_COMPRESSED_FILE
        number = _FINIT_MODULE[os.uname().machine]
        _check(_libc.syscall(number, fd, options.encode(), flags), path)
    finally:
        os.close(fd)


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """Opens path as a process whose root directory is root_fd would: no symbolic link leads out."""
    how = pack("QQQ", flags | os.O_CLOEXEC, 0, RESOLVE_IN_ROOT)
    return _check(int(_libc.syscall(_OPENAT2, root_fd, path.encode(), how, len(how))), path)


def adjtime(microseconds: int) -> None:
    """The clock goes slower or faster until it has moved by so much (adjtime(3))."""
    seconds, rest = divmod(microseconds, 1_000_000)
    _check(_libc.adjtime(pack("=qq", seconds, rest), None), "adjtime")


def power_off() -> None:
    """Switches the machine off at once. Does not sync."""
    _check(_libc.reboot(_POWER_OFF))
