"""Where devices are in the host: NUMA node, root port, switches, device, its VFs; as a tree.

Arranges what the inventory has, and reads nothing. It must not know who has a device, nor how it is drawn.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from vfio.address import PciAddress
from vfio.configspace import PortType
from vfio.inventory import Device, Inventory

_PORTS = {PortType.ROOT_PORT: "root port", PortType.UPSTREAM: "switch"}
BRIDGE = "bridge"  # of conventional PCI
UNKNOWN = "port"  # only root may read what it is
DEVICE = "device"


@dataclass(slots=True)
class Branch:
    """what: a word of _PORTS, BRIDGE, UNKNOWN or DEVICE. below: for a device, its VFs that are shown."""

    what: str
    address: PciAddress
    below: "list[Branch]" = field(default_factory=list)


def tree(found: Inventory, shown: Collection[PciAddress]) -> dict[int | None, list[Branch]]:
    """Of the devices that are shown, by NUMA node; None is where those are of which the host names none."""
    nodes: dict[int | None, list[Branch]] = {}
    devices: dict[PciAddress, Branch] = {}
    # VFs last, whatever their addresses are: they are below their physical function.
    devices_first = sorted(shown, key=lambda each: (found.functions[each].physfn is not None, each))
    for device in map(found.functions.__getitem__, devices_first):
        branch = devices[device.address] = Branch(DEVICE, device.address)
        if device.physfn in devices:
            devices[device.physfn].below.append(branch)
        else:
            _level(nodes.setdefault(device.numa_node, []), found, device).append(branch)
    return dict(sorted(nodes.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def _level(at: list[Branch], found: Inventory, device: Device) -> list[Branch]:
    """What is right below the last port above a device; ports that are not there yet are made."""
    for address in device.path:
        port = found.functions.get(address)
        if port is None or not port.config.whole:
            what = UNKNOWN
        elif port.config.port_type is PortType.DOWNSTREAM:
            continue  # has one device below it, and tells nothing that its switch does not
        else:
            what = _PORTS.get(port.config.port_type, BRIDGE) if port.config.port_type else BRIDGE
        branch = next((each for each in at if each.address == address), None)
        if branch is None:
            at.append(branch := Branch(what, address))
        at = branch.below
    return at
