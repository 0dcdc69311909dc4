"""Directories and files that only root may change, whatever the caller's umask is.

On the shim's hot path: imports next to nothing.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def make_directory(path: Path, mode: int = 0o755) -> None:
    """Creates a directory if it is missing, and its parents, writable for their owner only."""
    if path.is_dir():
        return
    make_directory(path.parent)
    with suppress(FileExistsError):  # made by another just now
        path.mkdir(mode=mode)


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file that must not exist yet; a link in its place is not followed. Left out if it fails."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        with open(fd, "wb") as file:
            file.write(content)
    except BaseException:
        path.unlink()
        raise


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Until the end of the block nobody else is in one for this file, which is made if it is missing."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
