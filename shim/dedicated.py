"""CPUs that are a pod's alone: which of the host's it may claim, and which of its threads run on which.

Who gets them is the ledger's to say (vfio/ledger/).
"""

import posixpath
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

from config.cpulist import numbers
from config.settings import Settings
from shim import cgroup
from shim.cgroup import Hierarchy
from shim.vm.backing import Cell, allowed_cpus, cpus_of
from shim.vm.pinning import Pinning
from vfio.ledger.demand import Host
from vfio.ledger.records import Claim

# Of v2 and of v1 (cgroup-v2.rst; kernel/cgroup/cpuset-v1.c): without those that are offline.
EFFECTIVE = ("cpuset.cpus.effective", "cpuset.effective_cpus")


@dataclass(frozen=True, slots=True)
class Cpus:
    """Of the host's, those that the pod may run on: claimable by pods, and left to all else."""

    claimable: frozenset[int]
    left: frozenset[int]

    @classmethod
    def of(cls, settings: Settings, proc: str) -> Self:
        """proc: where this process's affinity is read from, for a host without cpusets."""
        may = frozenset(may_run_on(proc))
        if not settings.dedicated_cpus:
            return cls(may, frozenset())
        pods = frozenset(numbers(settings.dedicated_cpus))
        return cls(may & pods, may - pods)

    def within(self, host: Host) -> Host:
        """With those cores alone that are claimable as a whole."""
        return replace(
            host,
            nodes=tuple(
                replace(node, cores=tuple(core for core in node.cores if self.claimable.issuperset(core)))
                for node in host.nodes
            ),
        )

    def pinning(self, claim: Claim, vcpus: int, cells: Sequence[Cell] = ()) -> Pinning:
        """cells: of the guest, whose CPUs are those of its node's.

        QEMU's other threads run where no pod's CPU ever is; if there is no such place, on threads of the
        claimed cores that no guest's CPU has, or else among these: on no other pod's in any case.
        """
        if cells:
            pinned = [
                cpu
                for cell, block in zip(cells, cpus_of(vcpus, len(cells)), strict=True)
                for cpu in claim.cpus.get(cell.host, ())[: len(block)]
            ]
        else:
            pinned = list(claim.own_cpus[:vcpus])
        others = self.left or set(claim.own_cpus).difference(pinned) or pinned
        return Pinning(tuple(pinned), tuple(sorted(others)))


def may_run_on(proc: str, hierarchies: Collection[Hierarchy] | None = None) -> list[int]:
    """On which CPUs the cpuset of this process's cgroup lets it run: also those that the host's scheduler
    leaves alone (isolcpus), which are in nobody's affinity."""
    for place in cgroup.hierarchies() if hierarchies is None else hierarchies:
        if posixpath.commonpath((place.mounted, place.origin)) != str(place.mounted):
            continue
        chain = [place.origin, *place.origin.parents]
        for directory in chain[: chain.index(place.mounted) + 1]:
            for name in EFFECTIVE:
                try:
                    found = numbers((directory / name).read_text())
                except FileNotFoundError:
                    continue  # of the other version, or no controller there
                if found:
                    return found
    return allowed_cpus(proc)
