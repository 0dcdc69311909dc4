"""What one pod cost: the spans of its trace and the memory of its processes on the host.

It reads what a shim wrote and what the kernel counts. How a pod is started is bench/stand.py's.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import FailedPrecondition
from shim import phases
from shim.trace import Span

_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) ")


@dataclass(frozen=True, slots=True)
class Waterfall:
    """The trace of one pod."""

    spans: tuple[Span, ...]

    @property
    def begin_s(self) -> float:
        return min(span.start_s for span in self.spans)

    def seconds(self, name: str) -> float:
        """How long all spans of this name took together, 0 if there is none."""
        return sum(span.end_s - span.start_s for span in self.spans if span.name == name)

    def first(self, name: str) -> Span:
        return next(span for span in self.spans if span.name == name)

    @property
    def guest_boot_s(self) -> float:
        """From QEMU running the guest to the agent's answer."""
        return self.seconds(phases.GUEST_BOOT)

    @property
    def guest_run_s(self) -> float:
        """What the guest did for the container: share mounted, container made, started, and run to its end.

        The end is the client's call to Delete, so that the way of the exit's event through containerd counts
        as the container's run.
        """
        started = self.first(phases.START_TASK)
        run_s = self.first(phases.DELETE).start_s - started.start_s
        return self.seconds(phases.GUEST_SHARE) + self.seconds(phases.GUEST_CREATE) + run_s


def read_waterfall(path: Path) -> Waterfall:
    return Waterfall(tuple(Span(**span) for span in json.loads(path.read_text())["spans"]))


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Bytes of proportional set size. guest_ram_bytes: the part of it that is the guest's own RAM."""

    name: str
    pss_bytes: int
    guest_ram_bytes: int
    pid: int = 0


def memory_of(
    pids: Iterable[int], guest_memory_bytes: int, procfs: Path = Path("/proc")
) -> tuple[ProcessMemory, ...]:
    """Of each process, largest first. A guest's RAM is the mapping of its size, in QEMU and in virtiofsd.

    Raises FailedPrecondition where the kernel was built without the counts.
    """
    if not (procfs / "self" / "smaps_rollup").exists():
        raise FailedPrecondition(
            "this kernel does not say what memory a process has", hint="CONFIG_PROC_PAGE_MONITOR=y"
        )
    found = []
    for pid in pids:
        proc = procfs / str(pid)
        try:
            rollup = re.search(r"^Pss:\s+(\d+) kB", (proc / "smaps_rollup").read_text(), re.MULTILINE)
            if rollup is None:
                continue  # a zombie has no memory
            ram = _pss_of_mappings((proc / "smaps").read_text(), guest_memory_bytes)
            name = (proc / "comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        found.append(ProcessMemory(name, int(rollup[1]) << 10, ram, pid))
    return tuple(sorted(found, key=lambda memory: -memory.pss_bytes))


def _pss_of_mappings(smaps: str, size_bytes: int) -> int:
    """The guest's RAM may be split in two around the PCI hole: mappings of one file add up to its size."""
    sizes: dict[str, int] = {}
    pss: dict[str, int] = {}
    name = ""
    for line in smaps.splitlines():
        mapping = _MAPPING.match(line)
        if mapping is not None:
            words = line.split(maxsplit=5)
            name = words[5] if len(words) > 5 else ""
            sizes[name] = sizes.get(name, 0) + int(mapping[2], 16) - int(mapping[1], 16)
        elif line.startswith("Pss:"):
            pss[name] = pss.get(name, 0) + (int(line.split()[1]) << 10)
    return sum(pss[name] for name, size in sizes.items() if size == size_bytes)
