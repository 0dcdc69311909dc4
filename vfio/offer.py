"""What the ledger can choose from: the inventory's devices as candidates, the host's NUMA nodes as it is now.

It must not know who has what, nor judge a device: which ones may be given away is the caller's to say.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from config.cpulist import numbers
from vfio import sysfs
from vfio.address import PciAddress
from vfio.configspace import PortType
from vfio.inventory import SYSFS, Device, Inventory
from vfio.kinds import Kind
from vfio.ledger.demand import Candidate, Host, HostNode, Pages, Partition

_KIB = 1 << 10


def offer(
    found: Inventory,
    *,
    refused: Collection[PciAddress] = (),
    partitions: Iterable[Partition] = (),
    reserved_cpus: Collection[int] = (),
    sys: str = SYSFS,
) -> Host:
    """refused: devices that no pod may have, and then none that they would come along with either.

    reserved_cpus: those of the host's own; a core with one of them is nobody's. partitions: see configured(),
    sysfs does not say them; offered are those of GPUs that are there.
    """
    partitions = tuple(partitions)
    wrong = not_gpus(partitions, found)
    candidates = (candidate(found, each) for each in found.devices)
    return Host(
        tuple(c for c in candidates if c.address not in refused and not c.companions.intersection(refused)),
        tuple(each for each in partitions if each.name not in wrong),
        tuple(nodes(sys, reserved_cpus)),
    )


def configured(partitions: Mapping[str, Iterable[str]]) -> tuple[Partition, ...]:
    """Of the operator's vfio.partitions, in the order that they have there."""
    return tuple(
        Partition(name, frozenset(map(PciAddress.parse, members))) for name, members in partitions.items()
    )


def not_gpus(partitions: Iterable[Partition], found: Inventory) -> dict[str, dict[PciAddress, str]]:
    """By name of the partition, what in it is no GPU that could be given away, and what it is instead."""
    wrong: dict[str, dict[PciAddress, str]] = {}
    gpus = {each.address for each in found.devices if each.kind is Kind.GPU}
    for partition in partitions:
        for address in sorted(partition.members - gpus):
            device = found.functions.get(address)
            what = "not there" if device is None else f"no GPU but of kind {device.kind.value}"
            wrong.setdefault(partition.name, {})[address] = what
    return wrong


def candidate(found: Inventory, device: Device) -> Candidate:
    return Candidate(
        address=device.address,
        vendor=device.vendor_id,
        device=device.device_id,
        name=device.title,
        kind=device.kind.value,
        node=device.numa_node,
        switch=_switch(found, device),
        companions=found.companions(device.address),
    )


def _switch(found: Inventory, device: Device) -> PciAddress | None:
    """The upstream port nearest to it. Without root, which alone may read what a port is, there is none."""
    for address in reversed(device.path):
        port = found.functions.get(address)
        if port is not None and port.config.port_type is PortType.UPSTREAM:
            return address
    return None


def nodes(sys: str = SYSFS, reserved_cpus: Collection[int] = ()) -> Iterator[HostNode]:
    """Each NUMA node's cores and huge pages; a kernel without NUMA has one, and pages that none names."""
    base = f"{sys}/devices/system/node"
    reserved = set(reserved_cpus)
    online = sysfs.text(f"{base}/online")
    if online is None:
        cores = _cores(sys, numbers(sysfs.text(f"{sys}/devices/system/cpu/online") or ""))
        yield HostNode(0, tuple(core for core in cores if reserved.isdisjoint(core)))
    for number in numbers(online or ""):
        cores = _cores(sys, numbers(sysfs.text(f"{base}/node{number}/cpulist") or ""))
        pages = {}
        for name in sysfs.names(f"{base}/node{number}/hugepages"):
            kib = name.removeprefix("hugepages-").removesuffix("kB")
            at = f"{base}/node{number}/hugepages/{name}"
            pages[int(kib) * _KIB] = Pages(
                sysfs.number(f"{at}/nr_hugepages") or 0, sysfs.number(f"{at}/free_hugepages") or 0
            )
        yield HostNode(number, tuple(core for core in cores if reserved.isdisjoint(core)), pages)


def _cores(sys: str, cpus: Iterable[int]) -> list[tuple[int, ...]]:
    """The CPUs as the threads of their cores. One that is offline is in nobody's list."""
    cores = set()
    for cpu in cpus:
        at = f"{sys}/devices/system/cpu/cpu{cpu}/topology"
        # core_cpus_list is what thread_siblings_list is called since Linux 5.2.
        threads = sysfs.text(f"{at}/core_cpus_list") or sysfs.text(f"{at}/thread_siblings_list") or str(cpu)
        cores.add(tuple(numbers(threads)))
    return sorted(cores)
