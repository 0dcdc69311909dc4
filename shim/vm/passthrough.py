"""Functions of the host's devices in a machine: by which way of VFIO's, what QEMU may open, what it may lock,
and whether the guest has made something of them.

They are bound to vfio-pci and this pod's alone when they come here (shim/giving.py). It must not know why.
"""

import logging
import os
import resource
import stat
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from images.variant import Variant
from rpc.api import agent as api
from rpc.errors import CasemateError, FailedPrecondition, ResourceExhausted, Unavailable, printable
from shim import system
from shim.vm import versions
from vfio.kinds import AMD, NVIDIA, Kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.vm.backing import Backing

log = logging.getLogger("casemate")

IOMMUFD, LEGACY = "iommufd", "legacy"
_OPTIONS = system.MS_NOSUID | system.MS_NOEXEC
_SIZE = "mode=0711,size=64k,nr_inodes=256"
# Firmware, option ROMs and ACPI's tables, which QEMU maps for devices as it does RAM: some hundred KiB.
_BESIDE_RAM_BYTES = 16 << 20
# q35's own, which smaller devices have room in.
LEAST_HOLE_BYTES = 32 << 30
MOST_PREALLOC_THREADS = 16
# Beyond a boot without devices: RAM is zeroed and pinned before the guest runs (4 GB/s and 57 GB/s were
# published for pages of 4 KiB), a device is reset as it is opened (100 ms and more), a BAR of 128 GiB mapped
# (3.5 s, Linux 6.8).
_PER_GIB_S, _PER_FUNCTION_S = 1.0, 10.0
_MOST_WORDS, _MOST_NAME = 2000, 64
# By vendor and kind.
_VARIANTS = {(NVIDIA, Kind.GPU.value): Variant.NVIDIA, (AMD, Kind.GPU.value): Variant.AMD}


@dataclass(frozen=True, slots=True)
class Function:
    """One function of a device. address: the host's, as sysfs has it. group: its IOMMU group. cdev: its name
    below /dev/vfio/devices, or None.

    port: which of the machine's root ports for devices it is behind, function: its number there; several:
    whether others are there too. bar_bytes: its 64-bit memory BARs; low_bytes: of all its memory BARs those
    that a port has room for below 4 GiB alone. path: where a container asked to find it.
    by_text: whether the pod's annotation asked for it. vendor: its id. node: the host's NUMA node, where it
    names one. interface, ips: of a network card, its name and its addresses in the pod.
    """

    address: str
    title: str
    kind: str
    group: int
    cdev: str | None
    port: int
    function: int
    several: bool = False
    bar_bytes: int = 0
    low_bytes: int = 0
    path: str = ""
    by_text: bool = False
    vendor: int = 0
    node: int | None = None
    interface: str = ""
    ips: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Access:
    """The way to the devices. why: what the newer one lacks here; "" where it is that."""

    way: str
    why: str = ""

    @property
    def is_iommufd(self) -> bool:
        return self.way == IOMMUFD

    def __str__(self) -> str:
        return f"{self.way} ({self.why})" if self.why else self.way


def access_of(
    functions: Iterable[Function],
    qemu: "tuple[int, int] | None",
    libvirt: "tuple[int, int] | None",
    dev: str = "/dev",
) -> Access:
    """iommufd where kernel, QEMU and libvirt have it: all devices share one map of the guest's RAM."""
    lacking = versions.lacking("iommufd", {"QEMU": qemu, "libvirt": libvirt})
    if not lacking and not os.path.exists(f"{dev}/iommu"):
        lacking = f"no {dev}/iommu: the kernel has no IOMMUFD, or its module is not loaded"
    for function in functions if not lacking else ():
        if function.cdev is None or not os.path.exists(f"{dev}/vfio/devices/{function.cdev}"):
            lacking = f"{function.address} has no node below {dev}/vfio/devices"
            break
    return Access(LEGACY, lacking) if lacking else Access(IOMMUFD)


def image_name(functions: Iterable[Function], name: str, known: Container[str]) -> str:
    """Of the guest image that has the drivers of these functions: the variant of the image `name` where there
    is one among the known, else that image itself. What of them has no driver there is said."""
    variants = {_VARIANTS[key] for each in functions if (key := (each.vendor, each.kind)) in _VARIANTS}
    chosen = {each for each in variants if name.endswith(f"-{each}")}  # by the profile
    image = name
    for variant in sorted(variants - chosen):
        if chosen:
            log.warning("guest image %s has no driver for GPUs that take its variant %s", image, variant)
        elif variant.of(name) in known:
            image = variant.of(name)
            chosen.add(variant)
        else:
            log.warning(
                "there is no guest image %s: devices come up without their vendor's driver; "
                "`casemate image build --variant %s --name %s` builds it",
                variant.of(name),
                variant,
                name,
            )
    return image


def hole_bytes(functions: Iterable[Function]) -> int:
    """Of guest addresses for 64-bit BARs: twice their sum, as each is aligned to its size; a power of two."""
    wanted = 2 * sum(function.bar_bytes for function in functions)
    return max(LEAST_HOLE_BYTES, 1 << (wanted - 1).bit_length() if wanted else 0)


def prealloc_threads(memory_bytes: int) -> int:
    """How many fill a guest's RAM before it is mapped for devices: one for each 256 MiB, and for a CPU."""
    return max(1, min(len(os.sched_getaffinity(0)), MOST_PREALLOC_THREADS, memory_bytes >> 28))


def more_s_of(functions: Sequence[Function], memory_bytes: int) -> float:
    """How much longer a machine with them may take to boot."""
    return _PER_GIB_S * (memory_bytes / (1 << 30)) + _PER_FUNCTION_S * len(functions) if functions else 0.0


def lock_bytes(memory_bytes: int) -> int:
    """What QEMU locks: the guest's RAM once, whatever the number of devices. BARs are not counted."""
    return memory_bytes + _BESIDE_RAM_BYTES


def prepare(
    functions: Iterable[Function],
    access: Access,
    uid: int,
    memory_bytes: int,
    dev: str = "/dev",
    *,
    huge_pages: bool = False,
) -> None:
    """In this mount namespace, /dev/vfio (and /dev/iommu) have what these functions take, for this user; in
    this process and what it starts, as much memory may be locked. Raises FailedPrecondition, and
    ResourceExhausted where the host has not the RAM, which is the guest's from its first moment on.
    huge_pages: it is of some that the ledger has for it."""
    available = available_bytes()
    if memory_bytes > available and not huge_pages:
        raise ResourceExhausted(
            f"the RAM of a machine with devices is there at once: {memory_bytes >> 20} MiB, and this host "
            f"has {available >> 20} MiB available",
            hint="choose a smaller profile, or wait for a pod to end",
        )
    least = lock_bytes(memory_bytes)
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != resource.RLIM_INFINITY:
        most = hard if hard == resource.RLIM_INFINITY else max(hard, least)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (max(soft, least), most))
    try:
        _make_nodes(Path(dev), functions, access, uid)
    except OSError as error:
        raise FailedPrecondition(
            f"{error.filename or dev}: {error.strerror}",
            hint="modprobe vfio-pci makes what is below /dev/vfio",
        ) from error


def available_bytes(path: str = "/proc/meminfo") -> int:
    """What the kernel could give without swapping (proc(5), MemAvailable)."""
    fields = dict(line.split(":", 1) for line in Path(path).read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) << 10


def _make_nodes(dev: Path, functions: Iterable[Function], access: Access, uid: int) -> None:
    vfio, iommu = dev / "vfio", dev / "iommu"
    names = {"vfio"}
    for function in functions:
        names.add(f"devices/{function.cdev}" if access.is_iommufd else str(function.group))
    numbers = {name: os.stat(vfio / name).st_rdev for name in sorted(names)}
    whole = os.stat(iommu).st_rdev if access.is_iommufd else None
    system.mount("casemate", str(vfio), "tmpfs", _OPTIONS, _SIZE)
    (vfio / "devices").mkdir(mode=0o711, exist_ok=True)
    for name, number in numbers.items():
        make_node(vfio / name, number, uid)
    if whole is not None:
        make_node(vfio / "iommu", whole, uid)
        system.mount(str(vfio / "iommu"), str(iommu), None, system.MS_BIND)


def make_node(path: Path, number: int, uid: int) -> None:
    """A character device that this user may open, and nobody else."""
    os.mknod(path, stat.S_IFCHR | 0o600, number)
    os.chown(path, uid, -1)


def request_of(
    functions: Iterable[Function], ports: "Sequence[str]", limit_s: float, backing: "Backing | None" = None
) -> api.DevicesRequest:
    """ports: of each of a machine's root ports for devices, its bus, slot and function in the guest."""
    devices = []
    for each in functions:
        cell = backing.cell_of(each.node) if backing is not None else None
        devices.append(
            api.PciDevice(
                name=each.address,
                port=ports[each.port],
                function=each.function,
                kind=each.kind,
                node=-1 if cell is None else cell,
                interface=each.interface,
                addresses=[_address(ip) for ip in each.ips],
            )
        )
    return api.DevicesRequest(devices=devices, limit_ms=int(limit_s * 1000))


def _address(ip: str) -> api.Address:
    from ipaddress import ip_interface

    found = ip_interface(ip)
    return api.Address(local=found.packed, prefix=found.network.prefixlen, prefix_route=True)


def check(functions: Sequence[Function], answer: api.DevicesResponse) -> None:
    """Says in the log what the guest made of each. Raises Unavailable naming all that did not come up."""
    found = {each.name: each for each in answer.devices}
    failed: list[str] = []
    for function in functions:
        one = found.get(function.address)
        problem = "the guest says nothing of it" if one is None else printable(one.problem, _MOST_WORDS)
        if problem or one is None:
            failed.append(f"device {function.address} ({function.title}): {problem}")
            failed += [f"  {printable(line, 200)}" for line in (one.words if one is not None else ())[:16]]
            continue
        driver = printable(one.driver, _MOST_NAME) or "without a driver, an entry of sysfs alone"
        made = (*one.interfaces[:16], *one.nodes[:16])
        words = [driver, *(printable(name, _MOST_NAME) for name in made)]
        at = printable(one.address, _MOST_NAME)
        log.info("device %s is %s in the guest: %s", function.address, at, " ".join(words))
    if failed:
        raise _not_up(failed)


def _not_up(lines: Sequence[str]) -> CasemateError:
    first, *rest = lines
    return Unavailable(
        f"a device did not come up in the guest: {first}",
        "\n".join(rest) or None,
        "casemate logs shows the guest's console; vfio.ready_s in the configuration is how long it may take",
    )
