"""What a virtual machine is, as data, and as libvirt's XML. No policy: designer.py decides every value.

One small type per kind of device; `xml()` of each is what libvirt's documentation (formatdomain) asks for.
"""

from dataclasses import dataclass
from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Without it libvirt reads the guest's CPU back in two commands, with it in one for every feature of the
# model: ~400 qom-get, 0.19 s of a start (libvirt 9.0, its own log). It names QEMU's ability to be asked so.
CPU_READ_BY_PROPERTY = "cpu-unavailable-features"
# Intel's and AMD's. A pod's guest starts no guests of its own, and the host's code for those who do is where
# most ways out of KVM have been. To disable what a CPU lacks is no error.
VIRTUALIZATION = ("vmx", "svm")

# What SMBIOS calls "not present", and Linux then does not show. The tables of the firmware are saved with a
# machine, so that all clones of a template would show the same one.
NO_UUID = "00000000-0000-0000-0000-000000000000"


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element; children are XML already. A trailing _ of an attribute's name is dropped (type_)."""
    opening = "".join(f" {name.rstrip('_')}='{escape(str(value))}'" for name, value in attributes.items())
    return f"<{tag}{opening}>{''.join(children)}</{tag}>" if children else f"<{tag}{opening}/>"


def text(tag: str, content: str, **attributes: object) -> str:
    return element(tag, escape(content), **attributes)


def escape(value: str) -> str:
    """For text and attribute values alike. Raises ValueError for what XML 1.0 cannot hold."""
    if not all(map(_is_character, value)):
        raise ValueError(f"{value!r} has characters that XML cannot hold")
    for raw, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("'", "&apos;"), ('"', "&quot;")):
        value = value.replace(raw, safe)
    return value


def _is_character(character: str) -> bool:
    """XML 1.0, production Char, without the white space that a parser changes."""
    code = ord(character)
    return 0x20 <= code < 0xD800 or 0xE000 <= code < 0xFFFE or code > 0xFFFF


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw image on virtio-blk, never written."""

    path: str
    target: str
    slot: int

    def xml(self) -> str:
        return element(
            "disk",
            element("driver", name="qemu", type_="raw", cache="writeback", io="threads"),
            element("source", file=self.path),
            element("target", dev=self.target, bus="virtio"),
            element("readonly"),
            pci(self.slot),
            type_="file",
            device="disk",
        )


@dataclass(frozen=True, slots=True)
class BlockDisk:
    """A block device on virtio-blk, past the host's page cache. It can be plugged into a root port.

    path: of a node that QEMU's user may open. serial: by which the guest finds it, 20 characters at most.
    """

    path: str
    serial: str
    bus: int
    read_only: bool

    def xml(self) -> str:
        return element(
            "disk",
            element("driver", name="qemu", type_="raw", cache="none", io="native", discard="unmap"),
            element("source", dev=self.path),
            element("target", dev=f"vd{chr(ord('a') + self.bus)}", bus="virtio"),
            *([element("readonly")] if self.read_only else []),
            text("serial", self.serial),
            pci(0, self.bus),
            type_="block",
            device="disk",
        )


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A vhost-user file system: its server listens on the socket. It can be plugged into a root port."""

    tag: str
    socket: str
    bus: int

    def xml(self) -> str:
        return element(
            "filesystem",
            element("driver", type_="virtiofs", queue=1024),
            element("source", socket=self.socket),
            element("target", dir=self.tag),
            pci(0, self.bus),
            type_="mount",
            accessmode="passthrough",
        )


@dataclass(frozen=True, slots=True)
class RootPort:
    """Bus number `bus`, with one slot that a device can be plugged into while the guest runs.

    function: of a slot that several share; that of the first says so to the guest. parent: the bus that it is
    on itself, an Expander's index or the root complex.
    """

    bus: int
    slot: int
    function: int = 0
    shares_slot: bool = False
    parent: int = 0

    def xml(self) -> str:
        several = self.shares_slot and not self.function
        address = pci(self.slot, self.parent, self.function, several=several)
        return element("controller", address, type_="pci", index=self.bus, model="pcie-root-port")


@dataclass(frozen=True, slots=True)
class HostDevice:
    """A function of the host's that vfio-pci has. host: its address, as sysfs has it. several: whether there
    are other functions behind its root port. Its ROM is not shown: no firmware of ours would run it."""

    host: str
    bus: int
    function: int
    several: bool
    iommufd: bool

    def xml(self) -> str:
        domain, bus, rest = self.host.split(":")
        slot, function = rest.split(".")
        numbers = {"domain": domain, "bus": bus, "slot": slot, "function": function}
        source = element("address", **{name: f"0x{value}" for name, value in numbers.items()})
        several = self.several and not self.function
        return element(
            "hostdev",
            *([element("driver", iommufd="yes")] if self.iommufd else []),
            element("source", source),
            element("rom", bar="off"),
            pci(0, self.bus, self.function, several=several),
            mode="subsystem",
            type_="pci",
            managed="no",
        )


@dataclass(frozen=True, slots=True)
class Expander:
    """Another root bus of the guest's, near one of its NUMA nodes: `number` there, `index` here."""

    index: int
    number: int
    slot: int
    cell: int

    def xml(self) -> str:
        return element(
            "controller",
            element("model", name="pxb-pcie"),
            element("target", text("node", str(self.cell)), busNr=self.number),
            pci(self.slot),
            type_="pci",
            index=self.index,
            model="pcie-expander-bus",
        )


@dataclass(frozen=True, slots=True)
class NumaCell:
    """A NUMA node of the guest's: its CPUs, of which node of the host's its memory is, by which of libvirt's
    policies ("" leaves that open), and on which of the host's CPUs its own run (none leaves that open)."""

    cpus: range
    memory_bytes: int
    host: int
    policy: str
    near: tuple[int, ...] = ()

    def xml(self, number: int) -> str:
        cpus = {"cpus": f"{self.cpus[0]}-{self.cpus[-1]}"} if self.cpus else {}
        return element("cell", id=number, **cpus, memory=self.memory_bytes >> 10, unit="KiB")


@dataclass(frozen=True, slots=True)
class Nic:
    """A virtio-net device on a tap of this name, which libvirt makes. It can be plugged into a root port.

    queues: pairs of them. vhost: the host's kernel moves the packets, not QEMU.
    """

    mac: bytes
    tap: str
    bus: int
    queues: int = 1
    vhost: bool = False

    def xml(self) -> str:
        queues = {"queues": self.queues} if self.queues > 1 else {}
        return element(
            "interface",
            element("mac", address=self.mac.hex(":")),
            element("target", dev=self.tap),
            element("model", type_="virtio"),
            element("driver", name="vhost" if self.vhost else "qemu", **queues),
            element("rom", enabled="no"),
            pci(0, self.bus),
            type_="ethernet",
        )


@dataclass(frozen=True, slots=True)
class Channel:
    """A virtio-serial port on a unix socket that QEMU connects to."""

    name: str
    socket: str
    slot: int

    def xml(self) -> str:
        return element("controller", pci(self.slot), type_="virtio-serial", index=0) + element(
            "channel",
            element("source", mode="connect", path=self.socket),
            element("target", type_="virtio", name=self.name),
            type_="unix",
        )


@dataclass(frozen=True, slots=True)
class Vsock:
    """libvirt finds a context id that no other VM of the host has."""

    slot: int

    def xml(self) -> str:
        return element("vsock", element("cid", auto="yes"), pci(self.slot), model="virtio")


@dataclass(frozen=True, slots=True)
class Console:
    """The first serial port, on a unix socket that QEMU connects to."""

    socket: str

    def xml(self) -> str:
        return element(
            "serial",
            element("source", mode="connect", path=self.socket),
            element("target", type_="isa-serial", port=0),
            type_="unix",
        )


class Memory(Enum):
    """What a guest's RAM is made of."""

    SHARED = "shared"  # a memfd that virtiofsd maps, too
    SHARED_FILE = "shared file"  # the same, a file below qemu.conf's memory_backing_dir
    PRIVATE = "private"  # QEMU's own
    SAVED = "saved"  # the file ram_file, which a template is made from
    MAPPED = "mapped"  # that file, read-only: what the guest writes is QEMU's own


# QEMU names a part of RAM by its object, and finds it in a saved state by that name.
RAM_OBJECT = "casemate-ram"


@dataclass(frozen=True, slots=True)
class Domain:
    """A trimmed q35 with direct kernel boot and nothing that was not asked for."""

    name: str
    kind: str  # kvm | qemu
    emulator: str
    firmware: str
    kernel: str
    initrd: str | None
    cmdline: str
    vcpus: int
    memory_bytes: int
    cpu_model: str
    devices: "Sequence[Disk | FileSystem | RootPort | Channel | Vsock | Console | Expander | HostDevice]"
    tcg_cache_bytes: int | None = None
    memory: Memory = Memory.SHARED
    ram_file: str = ""
    incoming: bool = False  # it waits for a saved state instead of booting
    hole_bytes: int = 0  # of addresses for 64-bit BARs; 0 leaves it to QEMU
    prealloc_threads: int = 0  # that fill RAM before anything else is done; 0: it is filled as it is touched
    page_bytes: int = 0  # of huge pages that RAM is made of; 0: of ordinary ones
    cells: "Sequence[NumaCell]" = ()
    pins: "Sequence[int]" = ()  # of the host's CPUs, one for each of the guest's; none leaves it to cells
    emulator_cpus: "Sequence[int]" = ()  # of the host's, for all other threads of QEMU's

    def xml(self) -> str:
        return element(
            "domain",
            text("name", self.name),
            text("memory", str(self.memory_bytes), unit="bytes"),
            text("vcpu", str(self.vcpus)),
            self._memory_backing(),
            self._cpu_tune(),
            self._numa_tune(),
            self._os(),
            self._features(),
            self._cpu(),
            element("clock", element("timer", name="hpet", present="no"), offset="utc"),
            text("on_poweroff", "destroy"),
            text("on_reboot", "destroy"),
            text("on_crash", "destroy"),
            element("pm", element("suspend-to-mem", enabled="no"), element("suspend-to-disk", enabled="no")),
            element(
                "devices",
                text("emulator", self.emulator),
                element("controller", type_="usb", model="none"),
                element("memballoon", model="none"),
                element("audio", id=1, type_="none"),
                self._root_complex(),
                *(device.xml() for device in self.devices),
            ),
            self._commandline(),
            element("qemu:capabilities", element("qemu:del", capability=CPU_READ_BY_PROPERTY)),
            type_=self.kind,
            **{"xmlns:qemu": "http://libvirt.org/schemas/domain/qemu/1.0"},
        )

    def _root_complex(self) -> str:
        if not self.hole_bytes:
            return ""
        hole = text("pcihole64", str(self.hole_bytes >> 10), unit="KiB")
        return element("controller", hole, type_="pci", index=0, model="pcie-root")

    def _memory_backing(self) -> str:
        parts = []
        if self.page_bytes:
            parts.append(element("hugepages", element("page", size=self.page_bytes >> 10, unit="KiB")))
        if self.memory in (Memory.SHARED, Memory.SHARED_FILE):
            parts.append(element("source", type_="file" if self.memory is Memory.SHARED_FILE else "memfd"))
            parts.append(element("access", mode="shared"))
        if self.prealloc_threads:
            parts.append(element("allocation", mode="immediate", threads=self.prealloc_threads))
        return element("memoryBacking", *parts) if parts else ""

    def _cpu_tune(self) -> str:
        if self.pins:
            pins = [element("vcpupin", vcpu=cpu, cpuset=pin) for cpu, pin in enumerate(self.pins)]
            emulator = element("emulatorpin", cpuset=",".join(map(str, self.emulator_cpus)))
            return element("cputune", *pins, emulator)
        pins = [
            element("vcpupin", vcpu=cpu, cpuset=",".join(map(str, cell.near)))
            for cell in self.cells
            for cpu in (cell.cpus if cell.near else ())
        ]
        return element("cputune", *pins) if pins else ""

    def _numa_tune(self) -> str:
        tuned = [
            element("memnode", cellid=number, mode=cell.policy, nodeset=cell.host)
            for number, cell in enumerate(self.cells)
            if cell.policy
        ]
        return element("numatune", *tuned) if tuned else ""

    def _commandline(self) -> str:
        # libvirt tells QEMU an id of the domain's, and takes no such one. The later of two counts.
        words = ["-uuid", NO_UUID]
        words += ["-incoming", "defer"] if self.incoming else []
        if self.memory in (Memory.SAVED, Memory.MAPPED):
            # libvirt makes no read-only file a guest's RAM. The later of two memory-backend counts.
            how = "share=on" if self.memory is Memory.SAVED else "share=off,readonly=on,rom=off"
            ram = f"id={RAM_OBJECT},size={self.memory_bytes},mem-path={_comma(self.ram_file)},{how}"
            words += ["-object", f"memory-backend-file,{ram},x-use-canonical-path-for-ramblock-id=off"]
            words += ["-machine", f"memory-backend={RAM_OBJECT}"]
        return element("qemu:commandline", *(element("qemu:arg", value=w) for w in words))

    def _os(self) -> str:
        return element(
            "os",
            text("type", "hvm", arch="x86_64", machine="q35"),
            text("loader", self.firmware, readonly="yes", type_="rom"),
            text("kernel", self.kernel),
            text("initrd", self.initrd) if self.initrd else "",
            text("cmdline", self.cmdline),
        )

    def _features(self) -> str:
        features = [element("acpi"), element("apic"), element("pae")]
        features += [element(name, state="off") for name in ("vmport", "smm")]
        if self.kind == "kvm":
            features += [element("ioapic", driver="qemu"), element("pmu", state="off")]
        if self.tcg_cache_bytes:
            cache = text("tb-cache", str(self.tcg_cache_bytes >> 20), unit="MiB")
            features.append(element("tcg", cache))
        return element("features", *features)

    def _cpu(self) -> str:
        without = [element("feature", policy="disable", name=name) for name in VIRTUALIZATION]
        if self.cells:
            without.append(element("numa", *(cell.xml(number) for number, cell in enumerate(self.cells))))
        if self.cpu_model in ("host-passthrough", "maximum"):
            return element("cpu", *without, mode=self.cpu_model, check="none", migratable="on")
        model = text("model", self.cpu_model)
        return element("cpu", model, *without, mode="custom", match="exact", check="none")


def _comma(value: str) -> str:
    """As QEMU wants one in an option's value."""
    return value.replace(",", ",,")


def pci(slot: int, bus: int = 0, function: int = 0, *, several: bool = False) -> str:
    """Bus 0 is the root complex: a root port per device costs the guest milliseconds and memory."""
    more = {"multifunction": "on"} if several else {}
    return element("address", type_="pci", domain=0, bus=bus, slot=slot, function=function, **more)
