"""What a pod asks of a host's devices, processors and huge pages, and what a host has of them: plain records.

The inventory's findings become Candidates, what a pod's spec says becomes Wanted. It must not know sysfs, nor
who has what.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from rpc.errors import InvalidArgument
from vfio.address import PciAddress

MOST_DEVICES = 64  # of one request; a q35 has root ports for fewer


class Same(Enum):
    """What all devices of a request, or of a pod, are to have in common."""

    NODE = "node"  # the NUMA node
    SWITCH = "switch"  # the PCIe switch right above them


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that may be given away. kind: what the inventory calls it, "gpu", "nic" and so on.

    node: its NUMA node, or None where the host names none. switch: the upstream port of the PCIe switch that
    it is below, or None. companions: what can only go together with it, to one pod: the other functions of
    the device, the other devices of its IOMMU group. They are claimed with it, and not given to the pod
    unless asked for.
    """

    address: PciAddress
    vendor: int
    device: int
    name: str
    kind: str
    node: int | None = None
    switch: PciAddress | None = None
    companions: frozenset[PciAddress] = frozenset()


@dataclass(frozen=True, slots=True)
class Partition:
    """GPUs that a fabric manager can join by NVLink, and nothing else: the whole of it or none of it."""

    name: str
    members: frozenset[PciAddress]


@dataclass(frozen=True, slots=True)
class Pages:
    """Huge pages of one size of a NUMA node: nr_hugepages and free_hugepages of its sysfs directory."""

    total: int
    free: int


@dataclass(frozen=True, slots=True)
class HostNode:
    """A NUMA node. cores: those that pods may be pinned to, each with the CPUs (threads) that share it.

    pages: by their size in bytes.
    """

    node: int
    cores: tuple[tuple[int, ...], ...] = ()
    pages: Mapping[int, Pages] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Host:
    """All that may be claimed, whoever has it now."""

    candidates: tuple[Candidate, ...] = ()
    partitions: tuple[Partition, ...] = ()
    nodes: tuple[HostNode, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """So many devices that are alike in what is named here. addresses: these, and no others.

    model: words that the device's name has, in any case of letters. partition: they are to be exactly one
    NVLink partition. Raises InvalidArgument for what contradicts itself.
    """

    count: int = 1
    kind: str | None = None
    vendor: int | None = None
    device: int | None = None
    model: str | None = None
    same: Same | None = None
    partition: bool = False
    addresses: tuple[PciAddress, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_DEVICES:
            raise InvalidArgument(f"{self.count} devices: from 1 to {MOST_DEVICES} can be asked for")
        if self.addresses and len(set(self.addresses)) != self.count:
            given = ", ".join(map(str, self.addresses))
            raise InvalidArgument(f"{self.count} devices are asked for by the addresses {given}")

    @classmethod
    def at(cls, *addresses: PciAddress) -> "Request":
        return cls(count=len(addresses), addresses=addresses)

    def matches(self, candidate: Candidate) -> bool:
        """Whether it could be one of them."""
        name = candidate.name.lower()
        return (
            (not self.addresses or candidate.address in self.addresses)
            and self.kind in (None, candidate.kind)
            and self.vendor in (None, candidate.vendor)
            and self.device in (None, candidate.device)
            and (self.model is None or all(word in name for word in self.model.lower().split()))
        )

    def __str__(self) -> str:
        """In words: `2 x gpu, vendor 10de, on one NUMA node`."""
        if self.addresses:
            return ", ".join(map(str, self.addresses))
        words = [f"{self.count} x {self.kind or 'device'}"]
        if self.vendor is not None:
            words.append(f"vendor {self.vendor:04x}")
        if self.device is not None:
            words.append(f"device {self.device:04x}")
        if self.model is not None:
            words.append(f"model {self.model!r}")
        words += _shared(self.same)
        if self.partition:
            words.append("one NVLink partition")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class HugePages:
    """Memory in huge pages: how many, and their size in bytes."""

    count: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """All that one pod asks for: it gets the whole of it or nothing.

    same: what the devices of all requests have in common. cpus: how many CPUs are its own, in whole cores.
    nearest: pages are not worth devices that are farther from each other than they could be; CPUs are.
    """

    requests: tuple[Request, ...] = ()
    same: Same | None = None
    cpus: int = 0
    pages: HugePages | None = None
    nearest: bool = False

    def __str__(self) -> str:
        words = ["; ".join(map(str, self.requests)), *_shared(self.same)]
        if self.cpus:
            words.append(f"{self.cpus} CPUs of its own")
        if self.pages is not None:
            words.append(f"{self.pages.count} huge pages of {self.pages.size_bytes >> 10} KiB")
        return "; ".join(word for word in words if word)


def _shared(same: Same | None) -> Iterable[str]:
    match same:
        case Same.NODE:
            return ["on one NUMA node"]
        case Same.SWITCH:
            return ["below one PCIe switch"]
    return []
