"""What is about to be created, written down before it is, so that anybody can undo it after a crash.

One JSON object a line, appended. The reader is another process (`delete`, `casemate gc`), perhaps of
another version: an unknown kind is reported, not guessed at. Most of a pod needs no entry: all its
processes are in a PID namespace whose first process is the shim, all its mounts in its mount namespace.
"""

import errno
import json
import os
from collections.abc import Iterable
from enum import Enum

from rpc.errors import DataLoss
from shim.procfs import start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

# Of 64-bit kernels (linux/threads.h, PID_MAX_LIMIT).
MOST_PIDS = 1 << 22


class Kind(Enum):
    """What an entry stands for, and so how it is undone (cleanup.py)."""

    PROCESS = "process"  # value: pid; started: its start time
    SOCKET = "socket"  # value: path
    CGROUP = "cgroup"  # value: directory
    DEVICES = "devices"  # value: directory of the ledger that says which the pod has
    POSTSTOP = "poststop"  # value: the hooks that a container's end will need (shim/hooks.py), as JSON
    POSTSTOP_BEGUN = "poststop-begun"  # value: the id of a container whose hooks are not to be run again


class Entry:
    """One thing. Not a dataclass: those cost every `start` the import of inspect, 5 ms."""

    __slots__ = ("kind", "started", "value")

    def __init__(self, kind: Kind, value: str, started: int = 0) -> None:
        self.kind = kind
        self.value = value
        self.started = started

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entry) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Entry({self.kind}, {self.value!r}, {self.started})"

    def _key(self) -> tuple[Kind, str, int]:
        return self.kind, self.value, self.started


class Journal:
    """Appends entries of one pod. Each is on its way to the file system before the call returns."""

    def __init__(self, path: "str | Path") -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def add(self, entry: Entry) -> None:
        """Raises OSError (a full file system): then nothing must be created."""
        line = json.dumps({"kind": entry.kind.value, "value": entry.value, "started": entry.started})
        data = line.encode() + b"\n"
        before = os.fstat(self._fd).st_size
        written = os.write(self._fd, data)
        if written != len(data):
            os.ftruncate(self._fd, before)  # half a line would spoil the next one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the pod's journal")

    def add_process(self, pid: int, proc: int | None = None) -> None:
        """pid and start time as the host (or the procfs behind the fd proc) has them."""
        self.add(Entry(Kind.PROCESS, str(pid), start_time(pid, proc)))

    def close(self) -> None:
        os.close(self._fd)


def read_journal(path: "Path") -> list[Entry]:
    """The entries, oldest first. A half-written last line was never acted upon, and is left out.

    Raises DataLoss for any other line that cannot be read; no file is an empty journal.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    complete, _, _ = text.rpartition(b"\n")
    return list(_parse(path, complete.splitlines()))


def _parse(path: "Path", lines: Iterable[bytes]) -> Iterable[Entry]:
    for number, line in enumerate(lines, 1):
        try:
            fields = json.loads(line)
            entry = Entry(Kind(fields["kind"]), str(fields["value"]), int(fields["started"]))
            if entry.kind is Kind.PROCESS and not 1 < int(entry.value) < MOST_PIDS:
                raise ValueError(f"{entry.value} is no pid of a pod")
            yield entry
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataLoss(
                f"{path}: line {number} cannot be read",
                details=str(error),
                hint="it was written by another version, or damaged; remove what it names by hand",
            ) from error
