"""The phases of the guest's boot: name, start, end, on the guest's CLOCK_MONOTONIC (nanoseconds)."""

from __future__ import annotations

import os
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Spans:
    """Consecutive phases: each ends where the next begins."""

    def __init__(self, start_ns: int) -> None:
        self._spans: list[tuple[str, int, int]] = []
        self._last_ns = start_ns

    def add(self, name: str, start_ns: int, end_ns: int) -> None:
        self._spans.append((name, start_ns, end_ns))

    def done(self, name: str) -> None:
        """The phase called name ends now."""
        now = time.monotonic_ns()
        self._spans.append((name, self._last_ns, now))
        self._last_ns = now

    def forget(self) -> None:
        """What follows is another machine's life."""
        self._spans.clear()
        self._last_ns = time.monotonic_ns()

    def all(self) -> Iterator[tuple[str, int, int]]:
        return iter(sorted(self._spans, key=lambda span: span[1:]))


MARKS_VARIABLE = "CASEMATE_BOOT_MARKS"
_TIMESPEC = struct.Struct("qq")
_BEFORE_MARKS = ("kernel", "initramfs modules", "initramfs mounts", "python start")


def early_spans(first_byte_ns: int, marks_fd: str | None) -> Iterator[tuple[str, int, int]]:
    """The phases before the agent's first byte, from the marks that the initramfs left behind.

    marks_fd names a file of struct timespec: /init starts, its modules are loaded, the root is mounted
    (Python is executed next). Without it all the time counts as the kernel's.
    """
    ends = []
    if marks_fd is not None:
        fd = int(marks_fd)
        for seconds, nanoseconds in _TIMESPEC.iter_unpack(os.pread(fd, 3 * _TIMESPEC.size, 0)):
            ends.append(seconds * 10**9 + nanoseconds)
        os.close(fd)
    start_ns = 0
    for name, end_ns in zip(_BEFORE_MARKS, [*ends, first_byte_ns], strict=False):
        yield name, start_ns, end_ns
        start_ns = end_ns
