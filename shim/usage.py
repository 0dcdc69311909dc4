"""What a pod uses of the host: its cgroup's counters, which hold its VM, file server and shim, as containerd
has them for a container (io.containerd.cgroups.v2.Metrics). It must not know what the processes are.

Files: the kernel's cgroup-v2.rst, cgroup-v1/memory.rst, cgroup-v1/cpuacct.rst, cgroup-v1/pids.rst.
"""

from collections.abc import Sequence
from pathlib import Path

from rpc.api.cgroups import CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat
from rpc.errors import FailedPrecondition

UNLIMITED = (1 << 64) - 1
_V1, _V2 = (
    ("cpuacct.usage", "memory.usage_in_bytes", "memory.limit_in_bytes"),
    ("memory.current", "memory.max"),
)
_BOTH = ("cpu.stat", "memory.stat", "memory.events", "memory.oom_control", "pids.current", "pids.max")


def metrics_of(directories: Sequence[Path]) -> Metrics:
    """directories: the pod's, one in every hierarchy. What the host does not count is not in the answer.

    Raises FailedPrecondition for a pod without a cgroup of its own.
    """
    if not directories:
        raise FailedPrecondition(
            "metrics: what the pod uses is not counted apart, as its client named no cgroup for it",
            hint="a kubelet does, by cgroup_parent",
        )
    read = {
        name: path.read_text().strip()
        for directory in directories
        for name in (*_V1, *_V2, *_BOTH)
        if (path := directory / name).exists()
    }
    metrics = Metrics(pids=_pids(read), cpu=_cpu(read), memory=_memory(read))
    killed = _pairs(read.get("memory.events") or read.get("memory.oom_control", ""))
    if "oom_kill" in killed:
        metrics.memory_events = MemoryEvents(oom_kill=killed["oom_kill"])
    return metrics


def _pids(read: dict[str, str]) -> PidsStat | None:
    if "pids.current" not in read:
        return None
    return PidsStat(current=int(read["pids.current"]), limit=_limit(read.get("pids.max", "max")))


def _cpu(read: dict[str, str]) -> CPUStat | None:
    said = _pairs(read.get("cpu.stat", ""))
    if "cpuacct.usage" in read:
        return CPUStat(
            usage_usec=int(read["cpuacct.usage"]) // 1000,
            nr_periods=said.get("nr_periods", 0),
            nr_throttled=said.get("nr_throttled", 0),
            throttled_usec=said.get("throttled_time", 0) // 1000,
        )
    if "usage_usec" not in said:
        return None
    stat = CPUStat()
    for field in CPUStat.FIELDS:
        if field.name in said:
            setattr(stat, field.name, said[field.name])
    return stat


def _memory(read: dict[str, str]) -> MemoryStat | None:
    said = _pairs(read.get("memory.stat", ""))
    if "memory.current" in read:
        usage, limit = read["memory.current"], read.get("memory.max", "max")
        names = {name: name for name in ("anon", "file", "shmem", "inactive_file", "active_file")}
    elif "memory.usage_in_bytes" in read:
        usage, limit = read["memory.usage_in_bytes"], read["memory.limit_in_bytes"]
        names = {"anon": "total_rss", "file": "total_cache", "shmem": "total_shmem"}
        names |= {name: f"total_{name}" for name in ("inactive_file", "active_file")}
    else:
        return None
    stat = MemoryStat(usage=int(usage), usage_limit=_limit(limit))
    for ours, theirs in names.items():
        setattr(stat, ours, said.get(theirs, 0))
    return stat


def _limit(text: str) -> int:
    return UNLIMITED if text == "max" else int(text)


def _pairs(text: str) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}
