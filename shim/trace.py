"""Where the time of a pod went: spans on the host's monotonic clock, guest's included.

Collects and writes JSON; drawing is the command line's. It must not know what the phases mean.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from config.whole import write_whole
from rpc.errors import printable

SHIM = "shim"
GUEST = "guest"
CONTAINERD = "containerd"
# A pod that execs all day must not grow its trace without end.
MOST_SPANS = 512
MOST_WORDS = 64
"""Characters of a name that a guest chose."""


@dataclass(frozen=True, slots=True)
class Span:
    """One phase. Times are seconds of CLOCK_MONOTONIC of the host."""

    name: str
    start_s: float
    end_s: float
    where: str = SHIM
    parent: str | None = None
    detail: str = ""


class Trace:
    """The spans of one pod, in the order in which they ended."""

    def __init__(self, namespace: str, pod_id: str, created_at: float) -> None:
        self.namespace = namespace
        self.pod_id = pod_id
        self.created_at = created_at
        self.accel = ""
        self.spans: list[Span] = []
        self.dropped = 0

    def add(
        self,
        name: str,
        start_s: float,
        end_s: float,
        where: str = SHIM,
        parent: str | None = None,
        detail: str = "",
    ) -> None:
        if len(self.spans) >= MOST_SPANS:
            self.dropped += 1
            return
        self.spans.append(Span(name, start_s, end_s, where, parent, detail))

    @contextmanager
    def span(self, name: str, parent: str | None = None, detail: str = "") -> Iterator[None]:
        """Times its body; one that raises leaves a span too, marked as failed."""
        start = time.monotonic()
        try:
            yield
        except BaseException as error:
            self.add(
                name,
                start,
                time.monotonic(),
                SHIM,
                parent,
                f"failed: {type(error).__name__} {detail}".strip(),
            )
            raise
        self.add(name, start, time.monotonic(), SHIM, parent, detail)

    def add_guest(
        self, spans: list[tuple[str, int, int]], guest_now_ns: int, host_now_s: float, parent: str
    ) -> None:
        """Spans of the guest's monotonic clock, moved onto the host's.

        guest_now_ns was read in the guest at the host's host_now_s, within half a round trip.
        What a guest claims is clipped to the life of the pod: it may lie, but not before or after it.
        """
        offset = host_now_s - guest_now_ns / 1e9
        earliest = min((span.start_s for span in self.spans), default=host_now_s)
        for name, start_ns, end_ns in spans[:64]:
            start = min(max(start_ns / 1e9 + offset, earliest), host_now_s)
            end = min(max(end_ns / 1e9 + offset, start), host_now_s)
            self.add(printable(name, MOST_WORDS), start, end, GUEST, parent)

    def write(self, path: Path) -> None:
        """Replaces the file at once, so that a reader sees the old or the new one."""
        document = {
            "namespace": self.namespace,
            "id": self.pod_id,
            "accel": self.accel,
            "created_at": self.created_at,
            "dropped": self.dropped,
            "spans": [asdict(span) for span in self.spans],
        }
        write_json(path, document)


def write_json(path: Path, document: object) -> None:
    """Atomically, mode 0600, also beside other writers of the same file. Raises OSError."""
    write_whole(path, json.dumps(document, separators=(",", ":")).encode())
