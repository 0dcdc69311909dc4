"""Policy: which virtual machine a pod gets, from its profile, its image and what the host has.

Decides every value of a Domain; touches nothing. What QEMU will be told, a test can read from here.
"""

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from config.settings import Profile
from rpc.errors import FailedPrecondition, ResourceExhausted
from shim.vm.accel import Acceleration
from shim.vm.domain import (
    Channel,
    Console,
    Disk,
    Domain,
    Expander,
    FileSystem,
    HostDevice,
    Memory,
    Nic,
    NumaCell,
    RootPort,
    Vsock,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from images.image import GuestImage
    from shim.vm.backing import Backing
    from shim.vm.passthrough import Access, Function
    from shim.vm.pinning import Pinning

NAME = "vm"
AGENT_PORT_NAME = "dev.casemate.agent"
SHARE_TAG = "casemate"
# QEMU takes 1 GiB (or an eighth of RAM) for translated code if not told; a guest of ours touches far less,
# and what is touched is never given back. A boot and Python fit into 48 MiB; 32 cost 5 % of it, 16 80 %.
TCG_CACHE_BYTES = 48 << 20
# QEMU 7.2's emulator leaves rubbish in EFLAGS after cmpxchg16b (10.0's does not), which the kernel's
# allocator executes: an interrupt right then returns to VM86 mode, and the guest panics (seen once, with
# EFLAGS 057b1ac2). The kernel goes without, bit 141 as Linux counts; programs are told what the CPU has.
EMULATED_CMDLINE = "clearcpuid=141"
VSOCK_DEVICE = "/dev/vhost-vsock"
# Slots 0 and 31 are q35's own.
ROOT_SLOT, SHARE_PORT_SLOT, AGENT_SLOT, PORTS_SLOT = 2, 3, 4, 5
SHARE_BUS = 1
PORT_BUSES = (2, 3, 4, 5)
"""A root port for each network interface and disk that a pod may come to have: it has none when it starts."""
MOST_QUEUES = 8
VHOST_NET_DEVICE = "/dev/vhost-net"
LAST_BUS = PORT_BUSES[
    -1
]  # the guest looks for no 255 others: 1.1 s of a boot in an emulated host (facts/measured.md)


MAPPED_SINCE = (8, 2)  # QEMU that takes a read-only file for RAM that is written to (rom=off)


@dataclass(frozen=True, slots=True)
class Places:
    """Unix sockets that QEMU connects to, and the file that is its RAM where libvirt makes none."""

    console: Path
    agent: Path
    share: Path
    ram: Path


class Files(Enum):
    """How a container's files get to the guest."""

    VIRTIOFS = "virtiofs"
    NINEP = "9p"


class Way(Enum):
    """How a machine comes to run."""

    BOOT = "boot"
    TEMPLATE = "template"  # booted to be saved
    RESTORE = "restore"


def transport_of(wanted: str) -> str:
    """vsock where the host has it, else virtio-serial. FailedPrecondition if vsock is a must and absent."""
    if wanted == "serial":
        return "serial"
    if os.access(VSOCK_DEVICE, os.R_OK | os.W_OK):
        return "vsock"
    if wanted == "vsock":
        raise FailedPrecondition(
            f"transport = vsock, but {VSOCK_DEVICE} cannot be opened",
            hint="modprobe vhost_vsock, or set transport = auto",
        )
    return "serial"


def files_of(
    wanted: str, transport: str, image: "GuestImage", qemu_version: "tuple[int, int] | None"
) -> Files:
    """9p where all that it takes is there, else virtio-fs. FailedPrecondition if 9p is a must and is not."""
    if wanted == "virtiofs":
        return Files.VIRTIOFS
    lacking = ""
    if transport != "vsock":
        lacking = "it goes over vsock alone"
    elif "9p" not in image.manifest.get("features", ()):
        lacking = f"the kernel of image {image.name} has no 9p"
    elif qemu_version is None or qemu_version < MAPPED_SINCE:
        lacking = "QEMU is older than {}.{}".format(*MAPPED_SINCE)
    if not lacking:
        return Files.NINEP
    if wanted == "9p":
        raise FailedPrecondition(f"files = 9p, but {lacking}", hint='set files = "auto" in the profile')
    return Files.VIRTIOFS


MEMORY = {
    (Files.VIRTIOFS, Way.BOOT): Memory.SHARED,
    (Files.VIRTIOFS, Way.TEMPLATE): Memory.SHARED_FILE,
    (Files.VIRTIOFS, Way.RESTORE): Memory.SHARED_FILE,
    (Files.NINEP, Way.BOOT): Memory.PRIVATE,
    (Files.NINEP, Way.TEMPLATE): Memory.SAVED,
    (Files.NINEP, Way.RESTORE): Memory.MAPPED,
}


def design(
    profile: Profile,
    image: "GuestImage",
    accel: Acceleration,
    transport: str,
    files: Files,
    places: Places,
    qemu: str,
    firmware: str,
    way: Way = Way.BOOT,
    functions: "Sequence[Function]" = (),
    access: "Access | None" = None,
    backing: "Backing | None" = None,
    pinning: "Pinning | None" = None,
) -> Domain:
    """The machine of a pod, or that of the template which it may come from: but for what `way` says they are
    one. functions: of the host's devices, for which there are root ports; behind these they are from the
    first where it boots, else plugged in (plugging.py); access: the way to them. backing: what its RAM is of
    then. pinning: of a pod's machine. A template is nobody's, and of no place or page. ResourceExhausted
    if the host has not the memory, or the machine no room for the devices.
    """
    if way is Way.TEMPLATE:
        pinning = None
    check_memory(profile.memory_bytes)
    agent = (
        Vsock(AGENT_SLOT) if transport == "vsock" else Channel(AGENT_PORT_NAME, str(places.agent), AGENT_SLOT)
    )
    shared: list[RootPort | FileSystem] = []
    if files is Files.VIRTIOFS:
        shared.append(RootPort(SHARE_BUS, SHARE_PORT_SLOT))
        if way is Way.BOOT:
            shared.append(share(places))
    memory = MEMORY[files, way]
    passed: tuple[Expander | RootPort | HostDevice, ...] = ()
    cells: tuple[NumaCell, ...] = ()
    hole_bytes = threads = page_bytes = 0
    last_bus, room = LAST_BUS, ""
    if functions:
        from shim.vm import passthrough, slots  # most machines have none

        hole_bytes = passthrough.hole_bytes(functions)
        found = slots.layout(functions, backing, LAST_BUS)
        passed, last_bus = (*found.expanders, *found.ports), found.last_bus
        if way is Way.BOOT:
            iommufd = access is not None and access.is_iommufd
            passed = (*passed, *slots.host_devices(functions, found, iommufd=iommufd))
        else:
            from shim.vm import plugging

            memory = Memory.SHARED_FILE
            low, high = plugging.windows(functions)
            room = f",hpmmiosize={low >> 20}M,hpmmioprefsize={high >> 20}M"
            hole_bytes = plugging.hole_bytes(functions, len(PORT_BUSES) + SHARE_BUS + len(found.ports))
        if way is Way.BOOT or (way is Way.RESTORE and backing is not None and backing.page_bytes):
            threads = passthrough.prealloc_threads(profile.memory_bytes)
    if backing is not None:
        if way is Way.TEMPLATE:
            backing = backing.of_nobody()
        cells, page_bytes = _cells(backing, profile.vcpus), backing.page_bytes
        if page_bytes:
            memory = Memory.SHARED  # libvirt makes no other of huge pages without a mount of theirs
    parameters = [
        image.cmdline,
        f"pci=lastbus={last_bus}{room}",
        "console=ttyS0 quiet panic=-1",
        f"casemate.transport={transport}",
        EMULATED_CMDLINE if accel.kind == "tcg" else "",
        profile.kernel_cmdline,
    ]
    return Domain(
        name=NAME,
        kind="kvm" if accel.kind == "kvm" else "qemu",
        emulator=qemu,
        firmware=firmware,
        kernel=str(image.kernel),
        initrd=str(image.initrd) if image.initrd else None,
        cmdline=" ".join(parameter for parameter in parameters if parameter),
        vcpus=profile.vcpus,
        memory_bytes=profile.memory_bytes,
        cpu_model=cpu_model(profile, accel),
        devices=(
            Disk(str(image.rootfs), "vda", ROOT_SLOT),
            *shared,
            *(
                RootPort(bus, PORTS_SLOT, function, shares_slot=True)
                for function, bus in enumerate(PORT_BUSES)
            ),
            agent,
            Console(str(places.console)),
            *passed,
        ),
        tcg_cache_bytes=TCG_CACHE_BYTES if accel.kind == "tcg" else None,
        memory=memory,
        ram_file=str(places.ram) if memory in (Memory.SAVED, Memory.MAPPED) else "",
        incoming=way is Way.RESTORE,
        hole_bytes=hole_bytes,
        prealloc_threads=threads,
        page_bytes=page_bytes,
        cells=cells,
        pins=pinning.vcpus if pinning is not None else (),
        emulator_cpus=pinning.emulator if pinning is not None else (),
    )


def _cells(backing: "Backing", vcpus: int) -> tuple[NumaCell, ...]:
    from shim.vm.backing import cpus_of

    cpus = cpus_of(vcpus, len(backing.cells))
    return tuple(
        NumaCell(each, cell.memory_bytes, cell.host, cell.policy, cell.cpus)
        for each, cell in zip(cpus, backing.cells, strict=True)
    )


def share(places: Places) -> FileSystem:
    """QEMU cannot save a vhost-user device before 8.2, so a machine that is restored gets it afterwards."""
    return FileSystem(SHARE_TAG, str(places.share), SHARE_BUS)


def nic(mac: bytes, tap: str, bus: int, profile: Profile) -> Nic:
    """A queue for each CPU of the guest, and the host's kernel to serve them where it can."""
    vhost = os.access(VHOST_NET_DEVICE, os.R_OK | os.W_OK)
    return Nic(mac, tap, bus, min(profile.vcpus, MOST_QUEUES), vhost)


def port_place(bus: int) -> str:
    """Where the guest finds the port of a device that came while it ran, on its root bus."""
    return f"{PORTS_SLOT:02x}.{PORT_BUSES.index(bus)}"


def cpu_model(profile: Profile, accel: Acceleration) -> str:
    if profile.cpu_model != "auto":
        return profile.cpu_model
    return "host-passthrough" if accel.kind == "kvm" else "maximum"


def check_memory(wanted_bytes: int) -> None:
    """A guest larger than the host is a mistake that QEMU reports late, or the OOM killer later."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted_bytes > total:
        raise ResourceExhausted(
            f"memory of {wanted_bytes >> 20} MiB: this host has {total >> 20} MiB",
            hint="choose a smaller profile, or set dev.casemate.memory",
        )
