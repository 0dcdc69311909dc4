"""The phases of the guest's boot: name, start, end, on the guest's CLOCK_MONOTONIC (nanoseconds)."""

from __future__ import annotations

import re
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

    def all(self) -> Iterator[tuple[str, int, int]]:
        return iter(sorted(self._spans, key=lambda span: span[1:]))


def kernel_spans(log: bytes, first_byte_ns: int) -> list[tuple[str, int, int]]:
    """Before the agent: the kernel until it ran the first program, then whatever ran until this Python did.

    The kernel's log has the moment in the line "Run /init as init process"; without it (it was not the kernel
    that logged this far back) all of it counts as the kernel's.
    """
    match = re.search(rb"\[ *(\d+)\.(\d{6})\] Run \S+ as init process", log)
    if match is None:
        return [("kernel", 0, first_byte_ns)]
    init_ns = min(int(match[1]) * 10**9 + int(match[2]) * 1000, first_byte_ns)
    return [("kernel", 0, init_ns), ("init until python", init_ns, first_byte_ns)]
