"""Which CPUs and huge pages a pod gets, on the NUMA nodes of its devices. Pure, as choice.py is.

Whole cores, so that no two pods share one: the threads of a core know too much of each other. What several
nodes give is divided evenly between them. A pod without devices gets all from one node if it can: the one
with the least that suffices; else from all evenly, or, if it is CPUs alone, from as few as will do.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from vfio.ledger.demand import Host, HostNode, Wanted


@dataclass(frozen=True, slots=True)
class Allotment:
    """By number of the node. cpus: all threads of the cores, so perhaps more than were asked for."""

    cpus: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    pages: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shortage:
    """What is missing, in words with numbers, for an error."""

    words: str


@dataclass(frozen=True, slots=True)
class Spoken:
    """What others have: CPUs by number, and how many pages by (node, size in bytes)."""

    cpus: AbstractSet[int] = frozenset()
    pages: Mapping[tuple[int, int], int] = field(default_factory=dict)


def allot(wanted: Wanted, host: Host, near: Sequence[int | None], spoken: Spoken) -> Allotment | Shortage:
    """near: the nodes of the devices that were chosen; None and [] leave the node open."""
    if not wanted.cpus and wanted.pages is None:
        return Allotment()
    known = {node.node: node for node in host.nodes}
    named = sorted({node for node in near if node is not None})
    if unknown := [node for node in named if node not in known]:
        return Shortage(f"nothing is known of the CPUs and memory of NUMA node {unknown[0]}")
    if named:
        return _divided(wanted, [known[node] for node in named], spoken)
    if not known:
        return Shortage("nothing is known of this host's CPUs and memory")
    by_room = sorted(known.values(), key=lambda node: (_room(node, wanted, spoken), node.node))
    for node in by_room:
        alone = _divided(wanted, [node], spoken)
        if isinstance(alone, Allotment):
            return alone
    evenly = _divided(wanted, sorted(known.values(), key=lambda node: node.node), spoken)
    if isinstance(evenly, Shortage) and wanted.pages is None:
        return _gathered(wanted.cpus, by_room[::-1], spoken)
    return evenly


def _divided(wanted: Wanted, nodes: Sequence[HostNode], spoken: Spoken) -> Allotment | Shortage:
    cpus: dict[int, tuple[int, ...]] = {}
    pages: dict[int, int] = {}
    missing: list[str] = []
    for index, node in enumerate(nodes):
        if share := _share(wanted.cpus, index, len(nodes)):
            free = _free_cores(node, spoken)
            cpus[node.node] = _cores_of(free, share)
            if (have := sum(map(len, free))) < share:
                missing.append(f"{share - have} CPUs of NUMA node {node.node} ({share} wanted, {have} free)")
        size = wanted.pages.size_bytes if wanted.pages else 0
        if share := _share(wanted.pages.count if wanted.pages else 0, index, len(nodes)):
            pages[node.node] = share
            if (have := available(node, size, spoken)) < share:
                missing.append(
                    f"{share - have} huge pages of {size >> 10} KiB of NUMA node {node.node} "
                    f"({share} wanted, {have} free)"
                )
    return Shortage("; ".join(missing)) if missing else Allotment(cpus, pages)


def _gathered(count: int, nodes: Sequence[HostNode], spoken: Spoken) -> Allotment | Shortage:
    """CPUs from one node after the other."""
    cpus: dict[int, tuple[int, ...]] = {}
    left = count
    for node in nodes:
        if left > 0 and (taken := _cores_of(_free_cores(node, spoken), left)):
            cpus[node.node] = taken
            left -= len(taken)
    if left > 0:
        known = [node.node for node in nodes if node.cores] or [node.node for node in nodes]
        where = f"NUMA node {known[0]}" if len(known) == 1 else f"{len(known)} NUMA nodes"
        return Shortage(f"{left} CPUs of {where} ({count} wanted, {count - left} free)")
    return Allotment(cpus)


def _share(total: int, index: int, of: int) -> int:
    return total // of + (index < total % of)


def _free_cores(node: HostNode, spoken: Spoken) -> list[tuple[int, ...]]:
    return [core for core in node.cores if spoken.cpus.isdisjoint(core)]


def _cores_of(free: Sequence[tuple[int, ...]], count: int) -> tuple[int, ...]:
    """The first whole cores with so many threads, or all of them."""
    taken: list[int] = []
    for core in free:
        if len(taken) >= count:
            break
        taken += core
    return tuple(taken)


def _room(node: HostNode, wanted: Wanted, spoken: Spoken) -> tuple[int, int]:
    """How much is free there of what is wanted: CPUs, pages."""
    cpus = sum(map(len, _free_cores(node, spoken))) if wanted.cpus else 0
    return cpus, available(node, wanted.pages.size_bytes, spoken) if wanted.pages else 0


def available(node: HostNode, size_bytes: int, spoken: Spoken) -> int:
    """Huge pages that can still be promised.

    Neither more than those of the pool that nobody of ours was promised, whether a guest has touched them yet
    or not; nor more than are free, as others than ours may have some.
    """
    pages = node.pages.get(size_bytes)
    if pages is None:
        return 0
    return max(min(pages.total - spoken.pages.get((node.node, size_bytes), 0), pages.free), 0)
