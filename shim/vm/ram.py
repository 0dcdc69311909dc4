"""A guest's RAM as a file: one of its own, filled from a template's, or the template's, mapped.

It must not know what is in it.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shim import system
from shim.cleanup import remove_tree

BLOCK_BYTES = 4096
COPY_BYTES = 8 << 20
SLACK_BYTES = 1 << 20  # for what the file system itself needs


@contextmanager
def ram_directory(path: Path, size_bytes: int) -> Iterator[None]:
    """A file system in memory for one guest's RAM and nothing more, gone with the context.

    It may be there already: libvirt, which keeps guests' RAM there, makes it too, and some of its own below.
    """
    path.mkdir(mode=0o711, exist_ok=True)
    try:
        options = system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
        system.mount("casemate", str(path), "tmpfs", options, f"size={size_bytes},nr_inodes=16,mode=0711")
        try:
            yield
        finally:
            system.umount(str(path), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
    finally:
        remove_tree(path)


def make_ram(file: Path, size_bytes: int, owner: int) -> int:
    """An empty file of the guest's size that belongs to the user QEMU runs as. Returns a descriptor of it."""
    file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
        os.fchown(fd, owner, -1)
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def mapped(source: int, file: Path) -> Iterator[None]:
    """The file behind the descriptor `source`, to be read and never written under the name `file`."""
    with ram_directory(file.parent, SLACK_BYTES):
        file.touch(mode=0)
        options = system.MS_RDONLY | system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
        system.mount(f"/proc/self/fd/{source}", str(file), None, system.MS_BIND)
        system.mount("none", str(file), None, system.MS_BIND | system.MS_REMOUNT | options)
        yield


def fill(source: int, target: int) -> None:
    """Copies what `source` has data of to the same places in `target`; the rest of both is zeros.

    sendfile(2) copies between page caches, outside Python's lock. Raises OSError, also if their sizes differ.
    """
    found, expected = os.fstat(source).st_size, os.fstat(target).st_size
    if found != expected:
        raise OSError(f"the template's RAM has {found} bytes, expected {expected}")
    for start, end in extents(source):
        os.lseek(target, start, os.SEEK_SET)
        while start < end:
            copied = os.sendfile(target, source, start, min(end - start, COPY_BYTES))
            if copied == 0:
                raise OSError(f"the template's RAM ended at {start}, expected {end}")
            start += copied


def extents(fd: int) -> Iterator[tuple[int, int]]:
    """The parts of a sparse file that are data: (start, end) in bytes."""
    end, size = 0, os.fstat(fd).st_size
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return  # nothing but a hole is left
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def data_bytes(fd: int) -> int:
    """How much of a sparse file is data."""
    return sum(end - start for start, end in extents(fd))


def copy_without_zeros(source: int, target: int) -> int:
    """As fill(), leaving out every block of zeros, so that the copy is small. Returns the bytes it has.

    Slow (it looks at every byte): for making a template, not for using one. Raises OSError.
    """
    zeros = bytes(BLOCK_BYTES)
    written = 0
    os.ftruncate(target, os.fstat(source).st_size)
    for start, end in extents(source):
        for offset in range(start, end, COPY_BYTES):
            chunk = memoryview(os.pread(source, min(COPY_BYTES, end - offset), offset))
            for begin, stop in _runs(chunk, zeros):
                _write(target, chunk[begin:stop], offset + begin)
                written += stop - begin
    return written


def _write(fd: int, data: memoryview, offset: int) -> None:
    """All of it: a disk that becomes full takes a part first."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def _runs(chunk: memoryview, zeros: bytes) -> Iterator[tuple[int, int]]:
    """Runs of blocks of which none is all zeros."""
    begin = None
    for position in range(0, len(chunk), BLOCK_BYTES):
        block = chunk[position : position + BLOCK_BYTES]
        empty = block == zeros[: len(block)]
        if empty and begin is not None:
            yield begin, position
            begin = None
        elif not empty and begin is None:
            begin = position
    if begin is not None:
        yield begin, len(chunk)
