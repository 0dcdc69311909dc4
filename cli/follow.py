"""Follows growing files of a pod until it is over: inotify and a pidfd, no polling.

Knows files and a process, not what is in the files (logs.py).
"""

import ctypes
import os
import select
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

_IN_MODIFY, _IN_MOVED_FROM, _IN_MOVED_TO, _IN_CREATE = 0x002, 0x040, 0x080, 0x100
_IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x200, 0x400, 0x800
_IN_IGNORED, _IN_ONLYDIR = 0x8000, 0x01000000
_WATCHED = (
    _IN_MODIFY | _IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE | _IN_DELETE_SELF | _IN_MOVE_SELF
)
_GONE = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_IGNORED
_HEADER = struct.Struct("iIII")
_CHUNK = 1 << 16


class _File:
    """One file read from where it was left; begun anew when it is replaced or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._descriptor = self._opened()

    def _opened(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None

    def read(self) -> Iterator[bytes]:
        """What has been added since. A file that was moved away is read to its end first."""
        yield from self._rest()
        if self._replaced():
            self.close()
            self._descriptor, self._offset = self._opened(), 0
            yield from self._rest()

    def _replaced(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        return self._descriptor is None or not os.path.samestat(there, os.fstat(self._descriptor))

    def _rest(self) -> Iterator[bytes]:
        if self._descriptor is None:
            return
        if os.fstat(self._descriptor).st_size < self._offset:
            self._offset = 0
        while data := os.pread(self._descriptor, _CHUNK, self._offset):
            self._offset += len(data)
            yield data

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def follow(directory: Path, files: Sequence[Path], process: int) -> Iterator[tuple[Path, bytes]]:
    """Yields (path, bytes) of files, from their beginning until directory or process is gone.

    All files are in directory; process is a pidfd. What was written last is yielded before the end,
    also from a file that was moved away after the first yield.
    """
    with ExitStack() as undo:
        watch = _watch(directory)
        if watch is not None:
            undo.callback(os.close, watch)
        opened = [_File(path) for path in files]
        for file in opened:
            undo.callback(file.close)
        over = watch is None
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if watch is not None:
            poll.register(watch, select.POLLIN)
        while True:
            # Read after the watch is set and once more after the end: nothing falls in between.
            for file in opened:
                for data in file.read():
                    yield file.path, data
            if over:
                return
            ready = {descriptor for descriptor, _ in poll.poll()}
            over = process in ready
            if watch is not None and watch in ready:
                over = _is_gone(os.read(watch, _CHUNK)) or over


def _watch(directory: Path) -> int | None:
    """A descriptor that reports what happens in directory, or None if it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.inotify_init1(os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify is not available: " + os.strerror(ctypes.get_errno()))
    if libc.inotify_add_watch(descriptor, os.fsencode(directory), _WATCHED | _IN_ONLYDIR) < 0:
        number = ctypes.get_errno()
        os.close(descriptor)
        try:
            raise OSError(number, os.strerror(number), str(directory))
        except FileNotFoundError:
            return None
    return descriptor


def _is_gone(events: bytes) -> bool:
    """Whether these inotify events say that the directory itself went away."""
    at = 0
    while at < len(events):
        _, mask, _, length = _HEADER.unpack_from(events, at)
        if mask & _GONE:
            return True
        at += _HEADER.size + length
    return False
