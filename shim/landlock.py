"""Landlock (landlock(7)): a thread, and whatever it starts, that reaches the files which it is told alone.

What else a kernel knows to keep from it, it is kept from, too (SINCE). Not a socket that has a path: whoever
may write to that, by its mode, connects to it. It must not know who is kept in.
"""

import ctypes
import os
import struct
import threading
from collections.abc import Callable, Mapping
from enum import IntFlag

from shim import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # of every architecture
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_PATH_BENEATH = 1


class Right(IntFlag):
    """linux/landlock.h, LANDLOCK_ACCESS_FS_*."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


READ = Right.READ_FILE | Right.READ_DIR
RUN = READ | Right.EXECUTE
USE = Right.READ_FILE | Right.WRITE_FILE | Right.IOCTL_DEV
"""Of a device's node."""
ALL = Right((1 << 16) - 1)
_OF_FILES = Right.EXECUTE | Right.WRITE_FILE | Right.READ_FILE | Right.TRUNCATE | Right.IOCTL_DEV
# By the version of the interface: the last right of files that it knows.
_LAST = {1: Right.MAKE_SYM, 2: Right.REFER, 3: Right.TRUNCATE, 4: Right.TRUNCATE}
# Since which version, and which Linux, what else is kept from it.
SINCE = (
    (3, "6.2", "cutting files short"),
    (4, "6.7", "TCP"),
    (5, "6.10", "ioctls of devices"),
    (6, "6.12", "signals and abstract sockets of other processes"),
)
_BIND_AND_CONNECT_TCP = 0b11
_ABSTRACT_SOCKETS_AND_SIGNALS = 0b11

_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """Of the kernel's interface; 0 for a kernel without it, or one that was told to do without."""
    found: int = _libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION))
    return max(found, 0)


def kept_in(rules: Mapping[str, Right], function: "Callable[[], T]") -> "T":
    """What function returns or raises, called in a thread that is kept in.

    rules: what may be done with a path and all below it; one that is not there is left out. Where the kernel
    has no Landlock (version()), nothing is kept from it. Raises OSError.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            _restrict(rules)
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="kept-in")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _restrict(rules: Mapping[str, Right]) -> None:
    known = version()
    if not known:
        return
    rights = Right((_LAST.get(known, Right.IOCTL_DEV) << 1) - 1)
    attributes = struct.pack(
        "=QQQ",
        rights,
        _BIND_AND_CONNECT_TCP if known >= 4 else 0,
        _ABSTRACT_SOCKETS_AND_SIGNALS if known >= 6 else 0,
    )[: 24 if known >= 6 else 16 if known >= 4 else 8]
    ruleset = _call(
        "landlock_create_ruleset", _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0
    )
    try:
        for path, wanted in rules.items():
            _add(ruleset, path, wanted & rights)
        _call("landlock_restrict_self", _RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _add(ruleset: int, path: str, rights: Right) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(f"/proc/self/fd/{fd}"):
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, fd)
        _call(path, _ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(fd)


def _call(what: str, number: int, *arguments: object) -> int:
    return system.check(_libc.syscall(number, *arguments), what)
