"""sysfs and /proc of hosts that we do not have, built as files: what the kernel would show of their devices.

Only the shape of the files is here; which machines there are is machines.py's. Every function gets the files
that Linux 6.12 makes, in its words (drivers/pci/pci-sysfs.c), and a configuration space whose capabilities
can be walked.
"""

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

from vfio.address import PciAddress

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

# Flags of a resource: memory, 64-bit, prefetchable; I/O ports; ROM.
MEM32, MEM64, PREF64, IO, ROM = 0x40200, 0x140204, 0x14220C, 0x40101, 0x46200
# Device/Port types of the PCI Express capability.
ENDPOINT, ROOT_PORT, UPSTREAM, DOWNSTREAM, PCI_BRIDGE, INTEGRATED = 0x0, 0x4, 0x5, 0x6, 0x7, 0x9
ACS_ISOLATING = 0x1D  # SV, RR, CR, UF: what Linux enables

Region = tuple[int, int]  # size in bytes, flags


@dataclass(frozen=True)
class Model:
    """A kind of chip."""

    ids: str  # vendor:device
    class_code: int
    subsystem: str = "0000:0000"
    bars: dict[int, Region] = field(default_factory=dict)
    driver: str | None = None
    resets: str = "flr bus"
    link: tuple[str, int] | None = ("32.0 GT/s PCIe", 16)


@dataclass(frozen=True)
class Acs:
    able: int = ACS_ISOLATING
    enabled: int = ACS_ISOLATING


@dataclass
class Node:
    """A function in the tree. directory is its real one; bus is the one below it, of a bridge."""

    address: PciAddress
    directory: Path
    bus: int | None = None
    slots: int = 0

    def write(self, name: str, text: str) -> None:
        target = self.directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@dataclass
class RootBus:
    domain: int
    bus: int
    directory: Path
    numa: int
    slots: int = 0


class Tree:
    """A host's /sys and /proc below root."""

    def __init__(self, root: Path, *, iommu: bool = True) -> None:
        self.root, self.iommu = root, iommu
        self.sys, self.proc = root / "sys", root / "proc"
        self._next_group = 0
        self._next_bus: dict[int, int] = {}
        self.nodes: dict[PciAddress, Node] = {}
        (self.sys / "bus/pci/devices").mkdir(parents=True)
        self.proc.mkdir()
        self.put("proc/cmdline", "BOOT_IMAGE=/vmlinuz root=/dev/mapper/system-root ro quiet\n")
        if iommu:
            self.put("sys/class/iommu/dmar0/intel-iommu/ecap", "ee9e86f050df\n")
        for number, chip in ((0, "IO-APIC"), (24, "DMAR-MSI"), (120, "PCI-MSIX-0000:01:00.0")):
            remapped = iommu and chip != "DMAR-MSI"
            self.put(f"sys/kernel/irq/{number}/chip_name", f"{'IR-' if remapped else ''}{chip}\n")

    def put(self, path: str, text: str) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        return target

    def link(self, path: str, to: Path) -> None:
        """A relative symbolic link, as sysfs has them."""
        at = self.root / path
        at.parent.mkdir(parents=True, exist_ok=True)
        at.symlink_to(os.path.relpath(to, at.parent))

    def new_group(self) -> int:
        self._next_group += 1
        return self._next_group - 1

    def root_bus(self, bus: int, numa: int, *, domain: int = 0) -> RootBus:
        directory = self.sys / f"devices/pci{domain:04x}:{bus:02x}"
        directory.mkdir(parents=True)
        self._next_bus[domain] = max(self._next_bus.get(domain, 0), bus + 1)
        return RootBus(domain, bus, directory, numa)

    def bridge(
        self,
        parent: "RootBus | Node",
        model: Model,
        port_type: int,
        *,
        secondary: int | None = None,
        acs: Acs | None = None,
        slot: int | None = None,
        function: int = 0,
        group: int | None = None,
        multifunction: bool = False,
    ) -> Node:
        """A port. secondary: the number of the bus below, the next free one unless it is said."""
        node = self.function(
            parent,
            model,
            port_type=port_type,
            acs=acs,
            is_bridge=True,
            slot=slot,
            function=function,
            group=group,
            multifunction=multifunction,
        )
        domain = node.address.domain
        node.bus = self._next_bus[domain] if secondary is None else secondary
        self._next_bus[domain] = max(self._next_bus[domain], node.bus + 1)
        return node

    def function(
        self,
        parent: "RootBus | Node",
        model: Model,
        *,
        slot: int | None = None,
        function: int = 0,
        group: int | None = None,
        port_type: int = ENDPOINT,
        acs: Acs | None = None,
        ats: int | None = None,
        numa: int | None = None,
        is_bridge: bool = False,
        multifunction: bool = False,
    ) -> Node:
        """One function below a root bus or a bridge, in an IOMMU group of its own unless one is said."""
        assert parent.bus is not None, "only bridges have something below"
        if slot is None:
            slot, parent.slots = parent.slots, parent.slots + 1
        domain = parent.domain if isinstance(parent, RootBus) else parent.address.domain
        node = Node(PciAddress(domain, parent.bus, slot, function), Path())
        node.directory = parent.directory / str(node.address)
        node.directory.mkdir()
        vendor, device = model.ids.split(":")
        sub_vendor, sub_device = model.subsystem.split(":")
        uevent = f"DRIVER={model.driver}\n" if model.driver else ""
        uevent += f"PCI_CLASS={model.class_code:X}\nPCI_ID={model.ids.upper()}\n"
        uevent += f"PCI_SUBSYS_ID={model.subsystem.upper()}\nPCI_SLOT_NAME={node.address}\n"
        node.write("uevent", uevent)
        for name, value in (
            ("vendor", vendor),
            ("device", device),
            ("subsystem_vendor", sub_vendor),
            ("subsystem_device", sub_device),
            ("class", f"{model.class_code:06x}"),
        ):
            node.write(name, f"0x{value}\n")
        node.write("driver_override", "(null)\n")
        node.write("numa_node", f"{self._numa(parent) if numa is None else numa}\n")
        node.write("resource", resource(model.bars))
        node.write("power_state", "D0\n")
        if not is_bridge:
            node.write("reset_method", f"{model.resets}\n")
        if model.class_code >> 8 == 0x0300:
            node.write("boot_vga", "0\n")
        if model.link is not None and port_type != INTEGRATED:
            speed, width = model.link
            for prefix in ("current", "max"):
                node.write(f"{prefix}_link_speed", f"{speed}\n")
                node.write(f"{prefix}_link_width", f"{width}\n")
        (node.directory / "config").write_bytes(
            config_space(model, port_type, is_bridge=is_bridge, multifunction=multifunction, acs=acs, ats=ats)
        )
        self.link(f"sys/bus/pci/devices/{node.address}", node.directory)
        if model.driver:
            self.bind(node, model.driver)
        if self.iommu:
            self.join(node, self.new_group() if group is None else group)
        self.nodes[node.address] = node
        return node

    def bind(self, node: Node, driver: str | None) -> None:
        """To another driver, or to none."""
        (node.directory / "driver").unlink(missing_ok=True)
        lines = (node.directory / "uevent").read_text().splitlines(keepends=True)
        uevent = "".join(line for line in lines if not line.startswith("DRIVER="))
        if driver:
            at = self.sys / "bus/pci/drivers" / driver
            at.mkdir(parents=True, exist_ok=True)
            self.link(str((node.directory / "driver").relative_to(self.root)), at)
            uevent = f"DRIVER={driver}\n{uevent}"
        node.write("uevent", uevent)

    def join(self, node: Node, group: int) -> None:
        """Into the IOMMU group."""
        at = self.sys / f"kernel/iommu_groups/{group}"
        (at / "devices").mkdir(parents=True, exist_ok=True)
        self._next_group = max(self._next_group, group + 1)
        self.link(str((at / "devices" / str(node.address)).relative_to(self.root)), node.directory)
        self.link(str((node.directory / "iommu_group").relative_to(self.root)), at)

    def vfs(
        self, physical: Node, model: Model, count: int, total: int, *, first_function: int = 1
    ) -> list[Node]:
        """SR-IOV: total possible, count there, on the functions and slots that follow (ARI)."""
        physical.write("sriov_totalvfs", f"{total}\n")
        physical.write("sriov_numvfs", f"{count}\n")
        made = []
        parent = Node(physical.address, physical.directory.parent, physical.address.bus)
        for index in range(count):
            number = physical.address.slot * 8 + physical.address.function + first_function + index
            node = self.function(parent, model, slot=number >> 3, function=number & 7)
            os.symlink(f"../{physical.address}", node.directory / "physfn")
            os.symlink(f"../{node.address}", physical.directory / f"virtfn{index}")
            made.append(node)
        return made

    # --- what the host does with its devices ---

    def process(self, pid: int, command: str, *files: str) -> None:
        """A process with these files open."""
        self.put(f"proc/{pid}/comm", f"{command}\n")
        (self.proc / f"{pid}/fd").mkdir()
        for number, file in enumerate(("/dev/null", *files)):
            os.symlink(file, self.proc / f"{pid}/fd/{number}")

    def block(self, place: Path, number: str, *, on: tuple[str, ...] = (), mapper: str = "") -> None:
        """A block device whose directory of sysfs is place; on: those that it is built on."""
        place.mkdir(parents=True)
        (place / "holders").mkdir()
        (place / "slaves").mkdir()
        (place / "dev").write_text(f"{number}\n")
        if mapper:
            (place / "dm").mkdir()
            (place / "dm/name").write_text(f"{mapper}\n")
        self.link(f"sys/class/block/{place.name}", place)
        self.link(f"sys/dev/block/{number}", place)
        for name in on:
            lower = (self.sys / "class/block" / name).resolve()
            os.symlink(lower, place / "slaves" / name)
            os.symlink(place, lower / "holders" / place.name)

    def nvme(self, node: Node, index: int, *partitions: int) -> str:
        """The disk of an NVMe controller, and its name."""
        name = f"nvme{index}n1"
        disk = node.directory / f"nvme/nvme{index}/{name}"
        self.block(disk, f"259:{index * 16}")
        for partition in partitions:
            self.block(disk / f"{name}p{partition}", f"259:{index * 16 + partition}")
        return name

    def mounts(self, *mounts: tuple[str, str, str]) -> None:
        """Of process 1: (number, source, point) each."""
        lines = [
            f"{22 + index} 1 {number} / {point} rw,relatime shared:1 - ext4 {source} rw\n"
            for index, (number, source, point) in enumerate(mounts)
        ]
        self.put("proc/1/mountinfo", "".join(lines))

    def interface(self, name: str, device: Path | None, *, on: tuple[str, ...] = (), up: bool = True) -> None:
        """A network interface: of a device, or a virtual one on others."""
        place = (device or self.sys / "devices/virtual") / "net" / name
        place.mkdir(parents=True)
        (place / "flags").write_text("0x1003\n" if up else "0x1002\n")
        if device is not None:
            os.symlink("../..", place / "device")
        for lower in on:
            os.symlink((self.sys / "class/net" / lower).resolve(), place / f"lower_{lower}")
        self.link(f"sys/class/net/{name}", place)

    def default_route(self, interface: str, *, ipv6: bool = False) -> None:
        """And a route that is none of the default's, of another interface."""
        if ipv6:
            zero = "0" * 32
            self.put(
                "proc/1/net/ipv6_route",
                f"{zero} 00 {zero} 00 fe80{'0' * 27}1 00000400 00000002 00000000 00000003 {interface}\n"
                f"{zero} 01 {zero} 00 {zero} 00000400 00000002 00000000 00000001 other0\n"
                f"{zero} 00 {zero} 00 {zero} ffffffff 00000001 00000000 00200200 lo\n",
            )
            return
        self.put(
            "proc/1/net/route",
            "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
            f"{interface}\t00000000\t0102A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
            "other0\t0000A8C0\t00000000\t0001\t0\t0\t100\t0000FFFF\t0\t0\t0\n"
            "other0\t00000000\t00000000\t0001\t0\t0\t100\t00000080\t0\t0\t0\n",
        )

    def remove(self, node: Node) -> None:
        """Surprise removal, half way: the directory is empty, its name still listed."""
        for path in node.directory.iterdir():
            if path.is_file() or path.is_symlink():
                path.unlink()

    def _numa(self, parent: "RootBus | Node") -> int:
        if isinstance(parent, RootBus):
            return parent.numa
        return int((parent.directory / "numa_node").read_text())


def resource(bars: dict[int, Region]) -> str:
    """17 lines: 6 BARs, the ROM, 6 of SR-IOV, 4 windows. Addresses only do not overlap by accident."""
    lines = []
    for index in range(17):
        size, flags = bars.get(index, (0, 0))
        first = (index + 1) << 44 if size else 0
        last = first + size - 1 if size else 0
        lines.append(f"0x{first:016x} 0x{last:016x} 0x{flags:016x}\n")
    return "".join(lines)


def config_space(
    model: Model,
    port_type: int,
    *,
    is_bridge: bool,
    multifunction: bool,
    acs: Acs | None,
    ats: int | None,
) -> bytes:
    """4096 bytes: header, power management before PCI Express, extended AER before ACS and ATS."""
    data = bytearray(4096)
    vendor, device = (int(word, 16) for word in model.ids.split(":"))
    struct.pack_into("<HHHH", data, 0, vendor, device, 0x0006, 0x0010)
    struct.pack_into("<I", data, 8, model.class_code << 8 | 0xA1)
    data[0x0E] = (1 if is_bridge else 0) | (0x80 if multifunction else 0)
    data[0x34] = 0x60
    struct.pack_into("<BBH", data, 0x60, 0x01, 0x78, 3)  # power management
    struct.pack_into("<BBH", data, 0x78, 0x10, 0x00, 2 | port_type << 4)
    extended = [(0x0001, b"\0" * 4)]  # AER
    if acs is not None:
        extended.append((0x000D, struct.pack("<HH", acs.able, acs.enabled)))
    if ats is not None:
        extended.append((0x000F, struct.pack("<HH", 0x0060, ats)))
    at = 0x100
    for position, (number, body) in enumerate(extended):
        following = 0 if position == len(extended) - 1 else at + 0x48
        struct.pack_into("<I", data, at, number | 1 << 16 | following << 20)
        data[at + 4 : at + 4 + len(body)] = body
        at += 0x48
    return bytes(data)
