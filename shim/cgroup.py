"""The pod's place among the host's cgroups: below the parent that the client names, so that its limits hold.

A client names a cgroup for each container (linux.cgroupsPath); the parent of it is the pod's, as kubelet has
it, and what is limited there is limited for all that the pod runs on the host. Beside the container's own a
directory of ours is made, in every hierarchy; no limit is set in it. It must not know what the processes are.
"""

import errno
import os
import posixpath
import select
import time
from contextlib import suppress
from pathlib import Path

from rpc.errors import FailedPrecondition, InvalidArgument
from shim import system
from shim.journal import Entry, Journal, Kind

CGROUPS = "/sys/fs/cgroup"
PREFIX = "casemate-"
# What a process needs of a v1 cpuset before it can be in it (cgroup-v1/cpusets.rst); a new one has neither.
CPUSET = ("cpuset.cpus", "cpuset.mems")
DEFAULT_SLICE = "system.slice"  # as runc, for ":prefix:name"
KILL_TIMEOUT_S = 4.0
EMPTY_S, POLL_S = 2.0, 0.01


class Hierarchy:
    """A mounted tree of cgroups, and in which directory of it this process is.

    Not a dataclass: `delete`, which only removes directories, would pay 6 ms for the import of inspect.
    """

    __slots__ = ("mounted", "origin")

    def __init__(self, mounted: Path, origin: Path) -> None:
        self.mounted = mounted
        self.origin = origin

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hierarchy) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Hierarchy({self.mounted}, {self.origin})"

    def _key(self) -> tuple[Path, Path]:
        return self.mounted, self.origin


class Place:
    """The directories of one pod, and the way into them and out again."""

    def __init__(self, key: str) -> None:
        self._name = PREFIX + key
        self._entered: list[tuple[Path, Hierarchy]] = []
        self._made: list[Path] = []
        self._left: set[Path] = set()

    @property
    def directories(self) -> list[Path]:
        """Empty where the client names no cgroup."""
        return [directory for directory, _ in self._entered]

    def enter(self, document: object, journal: Journal, pids: "Sequence[int]") -> None:
        """Moves processes to where a config.json wants them. Their children are born there.

        Raises InvalidArgument for a path that is none, FailedPrecondition if the kernel does not let them.
        """
        wanted = named(document)
        if not wanted:
            return
        parent = parent_of(wanted)
        found = hierarchies()
        if not found:
            raise FailedPrecondition(
                f"cgroup {wanted}: no cgroups are mounted at {CGROUPS}", hint="casemate check"
            )
        for hierarchy in found:
            directory = hierarchy.mounted / parent.lstrip("/") / self._name
            try:
                self._make(directory, hierarchy.mounted, journal)
                self._entered.append((directory, hierarchy))
                for pid in pids:
                    _move(pid, directory)
            except OSError as error:
                raise FailedPrecondition(
                    f"cgroup {directory}: {error.strerror}",
                    hint="the container's cgroup path must be one below which processes may be",
                ) from error
            except ValueError as error:  # a NUL, or what cannot be a file's name
                raise InvalidArgument(f"cgroup {wanted!r}: {error}") from error

    def step_out(self) -> None:
        """This process returns to where it was before. Raises OSError."""
        for directory, hierarchy in self._entered:
            if directory not in self._left:
                origin = hierarchy.origin if hierarchy.origin.is_dir() else hierarchy.mounted
                _move(os.getpid(), origin)
                self._left.add(directory)

    def leave(self) -> None:
        """Steps out, ends every other process in there, and removes what was made.

        Raises OSError, or FailedPrecondition if a process outlives its SIGKILL.
        """
        self.step_out()
        for directory, _ in self._entered:
            _end_others(directory)
        for directory in reversed(self._made):
            remove(str(directory))
        self._entered.clear()
        self._made.clear()
        self._left.clear()

    def _make(self, directory: Path, top: Path, journal: Journal) -> None:
        """Parents that have to be made stay, as with runc: others may use them in the same moment."""
        chain = [directory, *directory.parents]
        for path in reversed(chain[: chain.index(top)]):
            if path == directory:
                journal.add(Entry(Kind.CGROUP, str(path)))
                self._made.append(path)
            path.mkdir(exist_ok=True)
            _fill_cpuset(path)


def named(document: object) -> str:
    """The cgroup that a config.json names, in either form; empty if it names none. Raises InvalidArgument."""
    from shim import oci  # for `start` alone, see Hierarchy

    return oci.parse(document if document is not None else {}).cgroups_path


def parent_of(path: str) -> str:
    """Absolute, from the root of a hierarchy: the parent of a linux.cgroupsPath, of either form.

    A path, or systemd's "slice:prefix:name" (runc's docs/systemd.md). Raises InvalidArgument.
    """
    if "/" not in path and path.count(":") == 2:
        return expand_slice(path.partition(":")[0] or DEFAULT_SLICE)
    # Never above the root, and never the root itself: a ".." has nowhere to go.
    return posixpath.dirname(posixpath.normpath("/" + path.lstrip("/")))


def expand_slice(name: str) -> str:
    """ "a-b.slice" is /a.slice/a-b.slice (systemd.slice(5))."""
    stem = name.removesuffix(".slice")
    if stem == "-":
        return "/"
    words = stem.split("-")
    if stem == name or not all(words):
        raise InvalidArgument(f"cgroup: {name!r} is not a systemd slice")
    return "".join(f"/{'-'.join(words[:count])}.slice" for count in range(1, len(words) + 1))


def hierarchies(mountinfo: str | None = None, own: str | None = None) -> list[Hierarchy]:
    """Those that can count or limit: every one of v1, and v2 where it has a controller or is the only one.

    mountinfo, own: as of /proc/self/mountinfo and /proc/self/cgroup (proc(5), cgroups(7)).
    """
    first, unified = _mounted(mountinfo, own)
    return first + [one for one in unified if not first or _has_controllers(one.mounted)]


def follow(others: str, pids: "Sequence[int]" = ()) -> None:
    """Moves this process, and pids, to where another one is, in every hierarchy. others: its
    /proc/PID/cgroup. pids: processes that are where this one is.

    Raises FailedPrecondition if it is not there afterwards, OSError if the kernel does not let it.
    """
    here, there = (first + unified for first, unified in (_mounted(), _mounted(own=others)))
    for old, new in zip(here, there, strict=True):
        if old != new:
            for pid in (os.getpid(), *pids):
                _move(pid, new.origin)
    if (now := Path("/proc/self/cgroup").read_text()) != others:
        lines = sorted(set(others.splitlines()) - set(now.splitlines()))
        raise FailedPrecondition(f"cgroup {', '.join(lines)} cannot be entered")


def _mounted(mountinfo: str | None = None, own: str | None = None) -> tuple[list[Hierarchy], list[Hierarchy]]:
    """All of v1, and all (one, or none) of v2."""
    mountinfo = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    own = Path("/proc/self/cgroup").read_text() if own is None else own
    places = {names: path for _, names, path in (line.split(":", 2) for line in own.splitlines())}
    first: list[Hierarchy] = []
    unified: list[Hierarchy] = []
    seen = set()
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        device, root, point = left.split()[2:5]
        kind, _, options = right.split()[:3]
        inside = point == CGROUPS or point.startswith(CGROUPS + "/")
        if kind not in ("cgroup", "cgroup2") or not inside or device in seen:
            continue
        seen.add(device)
        said = set(options.split(","))
        wanted = [path for names, path in places.items() if names and said.issuperset(names.split(","))]
        place = places.get("", "/") if kind == "cgroup2" else next(iter(wanted), "/")
        # A mount may show a part of the tree only, as in a container without a cgroup namespace.
        below = posixpath.relpath(place, root) if posixpath.commonpath((place, root)) == root else "."
        found = Hierarchy(Path(point), Path(posixpath.normpath(f"{point}/{below}")))
        (unified if kind == "cgroup2" else first).append(found)
    return first, unified


def remove(path: str) -> bool:
    """Whether it was there and is gone. Raises FailedPrecondition if there are processes in it.

    A process that has ended may be counted a moment longer: newer kernels let go of it after it was last
    switched out (cgroup_task_dead() in kernel/cgroup/cgroup.c). Of that nobody is told: hence a bounded poll.
    """
    deadline = time.monotonic() + EMPTY_S
    while True:
        try:
            os.rmdir(path)
            return True
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            if time.monotonic() >= deadline or _has_processes(path):
                raise FailedPrecondition(
                    f"cgroup {path} still has processes", hint=f"see {path}/cgroup.procs"
                ) from error
        time.sleep(POLL_S)


def _has_processes(path: str) -> bool:
    """Such as live: those that have ended are not listed."""
    try:
        with open(f"{path}/cgroup.procs") as file:
            return bool(file.read())
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV):  # it has gone meanwhile
            return False
        raise


def _has_controllers(mounted: Path) -> bool:
    return bool((mounted / "cgroup.controllers").read_text().split())


def _fill_cpuset(directory: Path) -> None:
    for name in CPUSET:
        try:
            empty = not (directory / name).read_text().strip()
        except FileNotFoundError:
            return  # another controller's
        if empty and not (directory / "cgroup.controllers").exists():  # v2: empty is as the parent's
            (directory / name).write_text((directory.parent / name).read_text())


def _move(pid: int, directory: Path) -> None:
    """A process with all its threads; one that has ended is no matter. It costs the first of several some
    10 ms: an RCU grace period."""
    with suppress(ProcessLookupError), open(directory / "cgroup.procs", "w") as file:
        file.write(str(pid))


def _end_others(directory: Path) -> None:
    while others := _pids(directory) - {os.getpid()}:
        for pid in others:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                system.kill_process(pidfd)
                gone, _, _ = select.select([pidfd], [], [], KILL_TIMEOUT_S)
            finally:
                os.close(pidfd)
            if not gone:
                raise FailedPrecondition(
                    f"cgroup {directory}: process {pid} did not end within {KILL_TIMEOUT_S:.0f} s of SIGKILL"
                )


def _pids(directory: Path) -> set[int]:
    return set(map(int, (directory / "cgroup.procs").read_text().split()))


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
