"""Every PCI function of the host, and what is to be known of it before it is given to a pod.

Reads sysfs and nothing else, decides nothing: whether a device may be given to a stranger is isolation.py's,
who has it the ledger's. A function that is never given is in the inventory, too, with the reason.

pyudev would tell no more than these files and costs its import and a library; uevents are another matter.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rpc.errors import FailedPrecondition, InvalidArgument, NotFound
from vfio import configspace, kinds, sysfs
from vfio.address import PciAddress
from vfio.configspace import ConfigSpace
from vfio.kinds import Kind
from vfio.names import PciNames

SYSFS = "/sys"
# Flags of a line of `resource` (include/linux/ioport.h).
_IO, _MEMORY, _PREFETCH, _64_BIT = 0x100, 0x200, 0x2000, 0x100000
_BARS, _ROM = 6, 6  # lines 0 to 5, and the line of the ROM
_NO_NODE = -1
NOIOMMU = "vfio-noiommu"  # what VFIO calls the groups that it makes up (drivers/vfio/group.c)


@dataclass(frozen=True, slots=True)
class Bar:
    """A region of memory or of I/O ports that the device has. index is the register's: 0 to 5, ROM is 6."""

    index: int
    size_bytes: int
    is_io: bool
    prefetchable: bool
    is_64_bit: bool

    @property
    def is_rom(self) -> bool:
        return self.index == _ROM

    @property
    def is_low(self) -> bool:
        """Whether a bridge has room for it below 4 GiB alone: its window beyond is for what can be prefetched
        (PCI-to-PCI Bridge Architecture, 3.2.5.8 and 3.2.5.9)."""
        return not self.is_io and not self.is_rom and not (self.is_64_bit and self.prefetchable)


@dataclass(frozen=True, slots=True)
class Link:
    """The PCI Express link, in the kernel's words: "32.0 GT/s PCIe". Widths in lanes; 0 where it is down."""

    speed: str
    width: int
    most_speed: str
    most_width: int


@dataclass(frozen=True, slots=True)
class MdevType:
    """A mediated device that the driver would make of this one (vGPU before Linux 6.8, Intel GVT-g)."""

    name: str
    description: str
    available: int


@dataclass(frozen=True, slots=True)
class Partitions:
    """How an AMD Instinct is divided, and how it could be (amdgpu: SPX, DPX, CPX ...)."""

    current: str
    available: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Device:
    """One PCI function. Names are "" where no pci.ids has them; None stands for what sysfs does not say."""

    address: PciAddress
    kind: Kind
    class_code: int  # 24 bits
    vendor_id: int
    device_id: int
    subsystem_vendor_id: int
    subsystem_device_id: int
    vendor: str
    name: str
    driver: str | None
    driver_override: str | None
    numa_node: int | None
    group: int | None  # the IOMMU group's number
    path: tuple[PciAddress, ...]  # bridges from the root port down; empty on a root bus
    root_bus: str  # "pci0000:16": functions of one root complex have it in common
    config: ConfigSpace
    bars: tuple[Bar, ...]
    reset_methods: tuple[str, ...]  # the kernel's words, the one that it tries first first
    link: Link | None
    total_vfs: int  # 0 without SR-IOV
    vfs: tuple[PciAddress, ...]  # those that exist
    physfn: PciAddress | None  # of a VF, the function that it is one of
    mdev_types: tuple[MdevType, ...]
    vgpu_types: tuple[str, ...]  # of an NVIDIA VF since Linux 6.8: nvidia/creatable_vgpu_types
    partitions: Partitions | None
    boot_vga: bool
    vfio_cdev: str | None  # "vfio3": its /dev/vfio/devices/ while vfio-pci has it

    @property
    def skipped(self) -> str | None:
        """Why it is never given to a pod, whatever surrounds it; None of one that may be."""
        return kinds.SKIPPED.get(self.kind)

    @property
    def title(self) -> str:
        """A name for people, from ids where there is no better one."""
        ids = f"{self.vendor_id:04x}:{self.device_id:04x}"
        return f"{self.vendor or f'{self.vendor_id:04x}'} {self.name}" if self.name else ids


@dataclass(frozen=True, slots=True)
class Inventory:
    """All functions by address, and the members of each IOMMU group. vanished: gone while they were read."""

    functions: dict[PciAddress, Device]
    groups: dict[int, tuple[PciAddress, ...]]
    noiommu_groups: frozenset[int]
    vanished: tuple[PciAddress, ...]

    @property
    def devices(self) -> tuple[Device, ...]:
        """What may be given away, by address."""
        return tuple(each for each in self.functions.values() if each.skipped is None)

    @property
    def skipped(self) -> tuple[Device, ...]:
        """What is never given away; each says why."""
        return tuple(each for each in self.functions.values() if each.skipped is not None)

    def function(self, address: PciAddress) -> Device:
        """Whatever is there. Raises NotFound."""
        found = self.functions.get(address)
        if found is None:
            raise NotFound(f"no PCI device {address}", hint="casemate gpu list --all shows what there is")
        return found

    def device(self, address: PciAddress) -> Device:
        """Raises NotFound, and InvalidArgument for one that is never given away."""
        found = self.function(address)
        if found.skipped is not None:
            raise InvalidArgument(f"PCI device {address} is not for pods: {found.skipped}")
        return found

    def siblings(self, address: PciAddress) -> tuple[PciAddress, ...]:
        """The other functions of the same slot: they are one card, and go together. VFs are none of them."""
        mine = self.functions[address]
        if mine.physfn is not None:
            return ()
        # Asked of every device of a large host: so not by looking through all of them each time.
        others = (replace(address, function=number) for number in range(8) if number != address.function)
        return tuple(
            each for each in others if each in self.functions and self.functions[each].physfn is None
        )

    def members(self, address: PciAddress) -> tuple[PciAddress, ...]:
        """All of its IOMMU group, itself included; () where it has none."""
        group = self.functions[address].group
        return () if group is None else self.groups.get(group, ())

    def companions(self, address: PciAddress) -> frozenset[PciAddress]:
        """What a pod gets with it: the card's other functions, and the rest of its group but for bridges."""
        together = {*self.siblings(address), *self.members(address)} - {address}
        return frozenset(each for each in together if self.functions[each].skipped is None)

    def nearest_common(self, addresses: Iterable[PciAddress]) -> PciAddress | None:
        """The bridge nearest to all of them that all are below: the switch that their traffic stays in.

        None where they are in different root ports, whose traffic passes the root complex.
        """
        paths = [self.functions[address].path for address in addresses]
        common = None
        for ports in zip(*paths, strict=False):
            if len(set(ports)) > 1:
                break
            common = ports[0]
        return common


def read(sys: str = SYSFS, names: PciNames | None = None) -> Inventory:
    """All PCI functions of the sysfs at sys. A device that vanishes meanwhile is no error.

    Raises FailedPrecondition where there is no sysfs, or no PCI in it.
    """
    names = names if names is not None else PciNames.read()
    found = sysfs.names(f"{sys}/bus/pci/devices")
    if not found:
        raise FailedPrecondition(f"{sys}/bus/pci/devices lists nothing: no PCI, or no sysfs at {sys}")
    functions, vanished = {}, []
    for address in sorted(map(PciAddress.parse, found)):
        device = _device(sys, address, names)
        if device is None:
            vanished.append(address)
        else:
            functions[address] = device
    groups: dict[int, list[PciAddress]] = {}
    for device in functions.values():
        if device.group is not None:
            groups.setdefault(device.group, []).append(device.address)
    noiommu = frozenset(
        group for group in groups if sysfs.text(f"{sys}/kernel/iommu_groups/{group}/name") == NOIOMMU
    )
    members = {group: tuple(addresses) for group, addresses in groups.items()}
    return Inventory(functions, members, noiommu, tuple(vanished))


def _device(sys: str, address: PciAddress, names: PciNames) -> Device | None:
    """None if it is gone, wholly or half."""
    at = f"{sys}/bus/pci/devices/{address}"
    place = sysfs.target(at)
    uevent = _uevent(sysfs.text(f"{at}/uevent") or "")
    config_bytes = sysfs.data(f"{at}/config", configspace.SIZE)
    if place is None or config_bytes is None or not {"PCI_CLASS", "PCI_ID", "PCI_SUBSYS_ID"} <= uevent.keys():
        return None
    present = set(sysfs.names(at))
    class_code = int(uevent["PCI_CLASS"], 16)
    vendor_id, device_id = _pair(uevent["PCI_ID"])
    subsystem_vendor_id, subsystem_device_id = _pair(uevent["PCI_SUBSYS_ID"])
    config = configspace.decode(config_bytes)
    path, root_bus = _path(place)
    kind = kinds.kind_of(class_code, vendor_id, is_bridge=config.is_bridge)
    given = kind not in kinds.SKIPPED
    numa_node = sysfs.number(f"{at}/numa_node")
    group = sysfs.link(f"{at}/iommu_group") if "iommu_group" in present else None
    physfn = sysfs.link(f"{at}/physfn") if "physfn" in present else None
    override = sysfs.text(f"{at}/driver_override") if given else None
    return Device(
        address=address,
        kind=kind,
        class_code=class_code,
        vendor_id=vendor_id,
        device_id=device_id,
        subsystem_vendor_id=subsystem_vendor_id,
        subsystem_device_id=subsystem_device_id,
        vendor=names.vendor(vendor_id),
        name=names.device(vendor_id, device_id),
        driver=uevent.get("DRIVER"),
        driver_override=None if override in (None, "", "(null)") else override,
        numa_node=None if numa_node == _NO_NODE else numa_node,
        group=int(group) if group is not None and group.isdecimal() else None,
        path=path,
        root_bus=root_bus,
        config=config,
        bars=_bars(sysfs.text(f"{at}/resource") or "") if given else (),
        reset_methods=_reset_methods(at, present) if given else (),
        link=_link(at) if given and "current_link_speed" in present else None,
        total_vfs=sysfs.number(f"{at}/sriov_totalvfs") or 0 if "sriov_totalvfs" in present else 0,
        vfs=_vfs(at, present),
        physfn=PciAddress.parse(physfn) if physfn is not None else None,
        mdev_types=_mdev_types(at) if "mdev_supported_types" in present else (),
        vgpu_types=_vgpu_types(at) if "nvidia" in present else (),
        partitions=_partitions(at) if "available_compute_partition" in present else None,
        boot_vga="boot_vga" in present and sysfs.number(f"{at}/boot_vga") == 1,
        vfio_cdev=next(iter(sysfs.names(f"{at}/vfio-dev")), None) if "vfio-dev" in present else None,
    )


def _uevent(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def _pair(text: str) -> tuple[int, int]:
    """ "10DE:2330"."""
    first, _, second = text.partition(":")
    return int(first, 16), int(second, 16)


def _path(place: str) -> tuple[tuple[PciAddress, ...], str]:
    """From .../pci0000:16/0000:16:01.0/0000:17:00.0: the bridges, and the root bus.

    A device behind Intel's VMD has a root bus of its own below the VMD's function, which is on its path.
    """
    path: list[PciAddress] = []
    root_bus = ""
    for part in place.split("/"):
        if part.startswith("pci") and ":" in part:
            root_bus = part
        elif ":" in part:
            path.append(PciAddress.parse(part))
    return tuple(path[:-1]), root_bus


def _bars(resource: str) -> tuple[Bar, ...]:
    bars = []
    for index, line in enumerate(resource.splitlines()[: _BARS + 1]):
        first, last, flags = (int(word, 16) for word in line.split())
        if flags & (_IO | _MEMORY):
            bars.append(
                Bar(
                    index,
                    size_bytes=last - first + 1,
                    is_io=bool(flags & _IO),
                    prefetchable=bool(flags & _PREFETCH),
                    is_64_bit=bool(flags & _64_BIT),
                )
            )
    return tuple(bars)


def _reset_methods(at: str, present: set[str]) -> tuple[str, ...]:
    """Since Linux 5.15 they have names; before, there is a file `reset` if there is a way at all."""
    if "reset_method" in present:
        return tuple((sysfs.text(f"{at}/reset_method") or "").split())
    return ("unnamed",) if "reset" in present else ()


def _link(at: str) -> Link | None:
    """None of a function without a link of its own (one that is built into the root complex)."""
    words = [sysfs.text(f"{at}/{name}") for name in ("current_link_speed", "max_link_speed")]
    widths = [sysfs.number(f"{at}/{name}") for name in ("current_link_width", "max_link_width")]
    if words[1] in (None, "", "Unknown") or not widths[1]:
        return None
    return Link(words[0] or "Unknown", widths[0] or 0, words[1] or "", widths[1])


def _vfs(at: str, present: set[str]) -> tuple[PciAddress, ...]:
    links = [sysfs.link(f"{at}/{name}") for name in present if name.startswith("virtfn")]
    return tuple(sorted(PciAddress.parse(link) for link in links if link is not None))


def _mdev_types(at: str) -> tuple[MdevType, ...]:
    types = []
    for name in sysfs.names(f"{at}/mdev_supported_types"):
        base = f"{at}/mdev_supported_types/{name}"
        described = sysfs.text(f"{base}/name") or sysfs.text(f"{base}/description") or ""
        types.append(MdevType(name, described, sysfs.number(f"{base}/available_instances") or 0))
    return tuple(types)


def _vgpu_types(at: str) -> tuple[str, ...]:
    """Below a heading, one line each: its number, a colon, its name."""
    lines = (sysfs.text(f"{at}/nvidia/creatable_vgpu_types") or "").splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return tuple(f"{key.strip()}: {name.strip()}" for key, name in pairs if key.strip().isdecimal())


def _partitions(at: str) -> Partitions | None:
    available = sysfs.text(f"{at}/available_compute_partition")
    if not available:
        return None
    current = sysfs.text(f"{at}/current_compute_partition") or ""
    return Partitions(current, tuple(available.replace(",", " ").split()))
