"""Reading sysfs and /proc: one value per file, and files that come and go with devices.

Knows which errors mean "there is none" and which must be heard of. It must not know what a value means.
"""

import errno
import os

# ENODEV, ENXIO: the device went while its file was open. EINVAL: the attribute does not apply to this device
# (the link of one without PCI Express). EIO: its driver has no answer, as while it is suspended.
_NONE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO, errno.EINVAL, errno.EIO})
_MOST_BYTES = 1 << 16


def data(path: str, most_bytes: int = _MOST_BYTES) -> bytes | None:
    """What is in the file, or None where there is nothing to be had. Raises OSError, as PermissionError."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    try:
        return os.read(descriptor, most_bytes)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    finally:
        os.close(descriptor)


def text(path: str) -> str | None:
    """The same as text without the line's end; bytes that are no UTF-8 are replaced."""
    read = data(path)
    return None if read is None else read.decode(errors="replace").strip()


def lines(path: str) -> list[str]:
    """A table of /proc, of any length, which the kernel gives piece by piece; [] where there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().splitlines()
    except OSError as error:
        if error.errno in _NONE:
            return []
        raise


def number(path: str) -> int | None:
    """A number as sysfs writes it: 12, -1, 0x10de. None where there is none, or something else is written."""
    found = text(path)
    try:
        return None if found is None else int(found, 0)
    except ValueError:
        return None


def link(path: str) -> str | None:
    """The last component of what a symbolic link names (a driver, a group), or None."""
    found = target(path)
    return None if found is None else os.path.basename(found)


def target(path: str) -> str | None:
    """What a symbolic link names, as it is written, or None."""
    try:
        return os.readlink(path)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise


def names(path: str) -> list[str]:
    """The entries of a directory, sorted; none where there is no such directory."""
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        if error.errno in _NONE:
            return []
        raise


def switched_on(path: str) -> bool:
    """A module's parameter of type bool, which is Y or N. One of a module that is not loaded is off."""
    return text(path) == "Y"
