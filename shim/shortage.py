"""Whether memory is what a pod lacks: what its cgroup may have, and whether the kernel has killed in it.

Of a process that the kernel kills nobody hears why; and where it is the shim, nobody hears anything. It only
reads, and must not know what the processes are.
"""

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import CasemateError, ResourceExhausted
from shim import cgroup
from shim.cgroup import Hierarchy

MIB = 1 << 20
# What a shim and a QEMU have of their own before a guest has anything. With less it would be the shim that
# the kernel takes, as nothing else is there yet: seen with 48 MiB and less.
LEAST_BYTES = 64 * MIB
# Of v1 and v2: what a cgroup may have, and where the kernel counts whom it killed (cgroup-v1/memory.rst,
# cgroup-v2.rst).
LIMITS = ("memory.limit_in_bytes", "memory.max")
KILLS = ("memory.oom_control", "memory.events")
# Sizes of huge pages in the names of their files (mm/hugetlb_cgroup.c, mem_fmt).
_UNITS = (("GB", 1 << 30), ("MB", MIB), ("KB", 1 << 10))
HINT = "a limit on a pod holds for its whole machine, guest and QEMU, and not only for what runs in it"


@dataclass(frozen=True, slots=True)
class Limit:
    """The least that a cgroup or one above it may have."""

    size_bytes: int
    directory: Path

    def __str__(self) -> str:
        return f"{self.directory} may have {self.size_bytes / MIB:.0f} MiB"


def check_room(copied_bytes: int = 0, hierarchies: Sequence[Hierarchy] | None = None) -> None:
    """copied_bytes: what a machine has from its first moment on. Raises ResourceExhausted if it cannot be."""
    limit = limit_of(hierarchies)
    least = LEAST_BYTES + copied_bytes
    if limit is not None and limit.size_bytes < least:
        raise ResourceExhausted(
            f"the cgroup {limit}: a machine takes {least / MIB:.0f} MiB before it runs anything", hint=HINT
        )


def explained(error: CasemateError, hierarchies: Sequence[Hierarchy] | None = None) -> CasemateError:
    """The error as it is, or that the kernel killed a process of the pod's, if it did."""
    if not has_killed(hierarchies):
        return error
    limit = limit_of(hierarchies)
    why = f"the cgroup {limit}" if limit else "no cgroup of it has a limit: the host has no more"
    return ResourceExhausted(
        f"the kernel killed a process of the pod for lack of memory; {why}", details=str(error), hint=HINT
    )


def has_killed(hierarchies: Sequence[Hierarchy] | None = None) -> bool:
    """Whether the kernel has killed a process of the pod's, where the pod has a cgroup of its own to tell."""
    place = _counted(hierarchies)
    return place is not None and place.origin.name.startswith(cgroup.PREFIX) and _kills(place.origin) > 0


def limit_of(hierarchies: Sequence[Hierarchy] | None = None) -> Limit | None:
    """Where the least is said of what all of this process's cgroup may have; None where nothing is."""
    place = _counted(hierarchies)
    return None if place is None else _least(place, LIMITS)


def huge_pages_limit(page_bytes: int, hierarchies: Sequence[Hierarchy] | None = None) -> Limit | None:
    """What all of this process's cgroup may have at most of huge pages of a size; None where nothing is said.

    A kubelet lets a pod that asks for none have none (hugetlb.rst).
    """
    size = next(f"{page_bytes // unit}{name}" for name, unit in _UNITS if page_bytes >= unit)
    names = (f"hugetlb.{size}.limit_in_bytes", f"hugetlb.{size}.max")
    found: Limit | None = None
    for place in cgroup.hierarchies() if hierarchies is None else hierarchies:
        if _is_inside(place) and (limit := _least(place, names)) is not None:
            found = limit
    return found


def _is_inside(place: Hierarchy) -> bool:
    return posixpath.commonpath((place.mounted, place.origin)) == str(place.mounted)


def _least(place: Hierarchy, names: Sequence[str]) -> Limit | None:
    """Of all from the hierarchy's root on."""
    found: Limit | None = None
    chain = [place.origin, *place.origin.parents]
    for directory in chain[: chain.index(place.mounted) + 1]:
        said = _read(directory, names).strip()
        # v1 has a number of pages near 2^63 for "none".
        if said.isdigit() and int(said) < 1 << 60 and (found is None or int(said) < found.size_bytes):
            found = Limit(int(said), directory)
    return found


def room_bytes() -> int | None:
    """What all of this process's cgroup may have at most; None where nothing is said."""
    limit = limit_of()
    return None if limit is None else limit.size_bytes


def _counted(hierarchies: Sequence[Hierarchy] | None) -> Hierarchy | None:
    """The hierarchy that has the memory controller, if this process is somewhere in it."""
    for one in cgroup.hierarchies() if hierarchies is None else hierarchies:
        if _is_inside(one) and any((one.origin / name).exists() for name in KILLS):
            return one
    return None


def _kills(directory: Path) -> int:
    words = _read(directory, KILLS).split()
    return int(words[words.index("oom_kill") + 1]) if "oom_kill" in words else 0


def _read(directory: Path, names: Sequence[str]) -> str:
    for name in names:
        try:
            return (directory / name).read_text()
        except FileNotFoundError:
            continue  # of the other version; and v2's root has none
    return ""
