"""A container's cgroup (v2): figures, members, killing, and word of the kernel's out-of-memory killer.

Reads and writes files under /sys/fs/cgroup; must not know of crun or of what a container is.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
from contextlib import suppress

from rpc.api.cgroups import (
    CPUStat,
    HugeTlbStat,
    IOEntry,
    IOStat,
    MemoryEvents,
    MemoryStat,
    Metrics,
    PidsStat,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    from rpc.codec import Message

    M = TypeVar("M", bound=Message)

_log = logging.getLogger("casemate.agent")
NO_LIMIT = (1 << 64) - 1
# memory.stat's names -> the message's, where they differ; several add up
_MEMORY_NAMES = {
    "workingset_refault_anon": "workingset_refault",
    "workingset_refault_file": "workingset_refault",
    "workingset_activate_anon": "workingset_activate",
    "workingset_activate_file": "workingset_activate",
}


class Cgroup:
    def __init__(self, directory: str) -> None:
        self.directory = directory

    def kill(self) -> None:
        """SIGKILL to every process in it and below, forks in flight included (Linux 5.14)."""
        try:
            with open(f"{self.directory}/cgroup.kill", "w") as file:
                file.write("1")
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):  # no cgroup, no process
                raise

    def remove(self) -> None:
        """It and those below it, if they are there. Raises OSError, EBUSY while a process is in one."""
        for directory, _, _ in os.walk(self.directory, topdown=False):
            with suppress(FileNotFoundError):
                os.rmdir(directory)

    def pids(self) -> list[int]:
        found = []
        for directory, _, _ in os.walk(self.directory):
            text = self._read("cgroup.procs", directory)
            found += [int(line) for line in (text or "").split()]
        return found

    def metrics(self) -> Metrics:
        """What the kernel counts; a controller that is not enabled here leaves its part out.

        So does the network, which is the pod's and has no cgroup. runc's shim says nothing of it either, and
        clients ask the host's kernel about the pod's interfaces, which carry what the guest's do.
        """
        metrics = Metrics()
        if (current := self._read("pids.current")) is not None:
            metrics.pids = PidsStat(current=int(current), limit=_limit(self._read("pids.max")))
        if (cpu := self._read("cpu.stat")) is not None:
            metrics.cpu = _fill(CPUStat(), _flat(cpu))
        if (memory := self._read("memory.stat")) is not None:
            metrics.memory = _fill(MemoryStat(), _flat(memory))
            metrics.memory.usage = int(self._read("memory.current") or 0)
            metrics.memory.usage_limit = _limit(self._read("memory.max"))
            metrics.memory.max_usage = int(self._read("memory.peak") or 0)
            metrics.memory.swap_usage = int(self._read("memory.swap.current") or 0)
            metrics.memory.swap_limit = _limit(self._read("memory.swap.max"))
            metrics.memory_events = _fill(MemoryEvents(), _flat(self._read("memory.events") or ""))
        if (io := self._read("io.stat")) is not None:
            metrics.io = IOStat(usage=[_io_entry(line) for line in io.splitlines()])
        metrics.hugetlb = list(self._hugetlb())
        return metrics

    def oom_kills(self) -> int:
        """Processes that the out-of-memory killer took here so far."""
        return _flat(self._read("memory.events") or "").get("oom_kill", 0)

    def _hugetlb(self) -> Iterator[HugeTlbStat]:
        for name in sorted(os.listdir(self.directory)) if os.path.isdir(self.directory) else ():
            if name.startswith("hugetlb.") and name.endswith(".current") and ".rsvd." not in name:
                prefix = name.removesuffix("current")
                yield HugeTlbStat(
                    pagesize=name.split(".")[1],
                    current=int(self._read(name) or 0),
                    max=_limit(self._read(prefix + "max")),
                    failcnt=_flat(self._read(prefix + "events") or "").get("max", 0),
                )

    def _read(self, name: str, directory: str | None = None) -> str | None:
        """A file's content; None if the controller is off, or the cgroup gone meanwhile."""
        try:
            with open(f"{directory or self.directory}/{name}") as file:
                return file.read()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP):
                return None
            raise


class OomWatch:
    """Calls back when a cgroup's memory.events changes.

    The kernel reports a change of the file as POLLPRI, which asyncio's selector cannot ask for; an epoll of
    our own can, and is itself readable when it has something.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._loop = loop
        loop.add_reader(self._epoll.fileno(), self._changed)

    def add(self, cgroup: Cgroup, changed: Callable[[], None]) -> int:
        """Returns what remove() wants; -1 if there is no memory controller."""
        try:
            fd = os.open(f"{cgroup.directory}/memory.events", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
        os.read(fd, 4096)  # changes are counted from here
        self._epoll.register(fd, select.EPOLLPRI)
        self._callbacks[fd] = changed
        return fd

    def remove(self, watch: int) -> None:
        if watch >= 0 and self._callbacks.pop(watch, None) is not None:
            os.close(watch)  # which takes it out of the epoll too

    def close(self) -> None:
        for watch in list(self._callbacks):
            self.remove(watch)
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _changed(self) -> None:
        for fd, _ in self._epoll.poll(0):
            changed = self._callbacks.get(fd)
            if changed is None:
                continue
            try:
                os.pread(fd, 4096, 0)  # without this it would stay ready
            except OSError as error:
                if error.errno != errno.ENODEV:  # which means that the cgroup is gone
                    _log.warning("memory.events cannot be read: %s", error)
                self.remove(fd)
            changed()


def _flat(text: str) -> dict[str, int]:
    """A file of "key value" lines."""
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        values[key] = int(value)
    return values


def _fill(message: M, values: dict[str, int]) -> M:
    known = {field.name for field in message.FIELDS}
    for key, value in values.items():
        name = _MEMORY_NAMES.get(key, key)
        if name in known:
            setattr(message, name, (getattr(message, name) + value) if name != key else value)
    return message


def _limit(text: str | None) -> int:
    """A limit's file, of which `max` means none."""
    word = (text or "max").strip()
    return NO_LIMIT if word == "max" else int(word)


def _io_entry(line: str) -> IOEntry:
    device, _, rest = line.partition(" ")
    major, _, minor = device.partition(":")
    values = dict(word.split("=", 1) for word in rest.split())
    return _fill(
        IOEntry(major=int(major), minor=int(minor)), {key: int(value) for key, value in values.items()}
    )
