"""What a PCI function is, by its class and, where the class says nothing, its vendor: one table.

NVSwitches have the class of a bridge, GPUs that of a display or of an accelerator: whoever masks classes
loses some. Here every function gets a kind; those that are not given to pods have the reason with it.
"""

from enum import Enum

NVIDIA, AMD = 0x10DE, 0x1002
_CHIPSET_MAKERS = (0x8086, 0x1022)  # Intel, AMD


class Kind(Enum):
    GPU = "gpu"
    NVSWITCH = "nvswitch"
    ACCELERATOR = "accelerator"
    NIC = "nic"
    NVME = "nvme"
    STORAGE = "storage"
    AUDIO = "audio"
    USB = "usb"
    OTHER = "other"
    BRIDGE = "bridge"
    PLATFORM = "platform"


# Why functions of these kinds are never given to a pod.
SKIPPED = {
    Kind.BRIDGE: "a bridge: what other devices are reached by",
    Kind.PLATFORM: "part of the host's chipset",
}

GIVEN = {kind.value: kind for kind in Kind if kind not in SKIPPED}
"""By its word, every kind that pods are given."""

_BRIDGE_OTHER = 0x0680
# Base class and subclass, PCI Code and ID Assignment Specification, chapter 1.
_BY_SUBCLASS = {
    0x0001: Kind.GPU,  # a VGA device from before there were classes
    0x0108: Kind.NVME,
    0x0C00: Kind.OTHER,  # FireWire
    0x0C03: Kind.USB,
    0x0C04: Kind.STORAGE,  # Fibre Channel
    0x0C06: Kind.NIC,  # InfiniBand of before 0207
    0x0880: Kind.OTHER,  # no class of its own: DMA engines, SD hosts
}
# Management engines, performance counters, thermal and power controllers: of these makers only.
_CHIPSETS = frozenset({0x0780, 0x1101, 0x1180})
_BY_BASE = {
    0x01: Kind.STORAGE,
    0x02: Kind.NIC,
    0x03: Kind.GPU,
    0x04: Kind.AUDIO,
    0x05: Kind.PLATFORM,  # memory controllers
    0x06: Kind.BRIDGE,
    0x08: Kind.PLATFORM,  # interrupt controllers, IOMMUs, timers
    0x0B: Kind.PLATFORM,  # processors
    0x0C: Kind.PLATFORM,  # SMBus, IPMI and other wires of the board
    0x12: Kind.ACCELERATOR,
    0x13: Kind.PLATFORM,  # instrumentation
}


def kind_of(class_code: int, vendor_id: int, *, is_bridge: bool) -> Kind:
    """From the 24 bits of the class code. is_bridge: the header is that of a PCI-to-PCI bridge."""
    if is_bridge:
        return Kind.BRIDGE
    subclass = class_code >> 8
    if subclass == _BRIDGE_OTHER:
        # 10de:22a3 and its predecessors are 0680 (lspci of HGX boards). Others of that class, with the header
        # of a device, are sideband bridges of chipsets.
        return Kind.NVSWITCH if vendor_id == NVIDIA else Kind.PLATFORM
    if subclass >> 8 == 0x12 and vendor_id in (NVIDIA, AMD):
        return Kind.GPU  # MI300X is 1200
    if subclass in _CHIPSETS and vendor_id in _CHIPSET_MAKERS:
        return Kind.PLATFORM
    return _BY_SUBCLASS.get(subclass) or _BY_BASE.get(subclass >> 8, Kind.OTHER)
