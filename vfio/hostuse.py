"""What the host itself is doing with its devices: who has them open, disks that are mounted, routes.

Reads sysfs and /proc, changes nothing, judges nothing. The /proc must be the host's own: its process 1 is the
host's init, whose mounts and routes count.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vfio import sysfs
from vfio.address import PciAddress
from vfio.inventory import Device

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
_NVME_NODE = re.compile(r"(/dev/nvme\d+)(?:n\d+(?:p\d+)?)?")
_IFF_UP = 0x1
# Where a device's directory names its nodes in /dev: directory of sysfs -> directory of /dev.
_NODES = {"drm": "/dev/dri", "accel": "/dev/accel", "nvme": "/dev", "vfio-dev": "/dev/vfio/devices"}
_VERBS = "infiniband_verbs"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has one of a device's nodes open."""

    pid: int
    command: str  # as /proc/PID/comm has it: at most 15 bytes, whatever the process likes
    node: str


@dataclass(frozen=True, slots=True)
class Holders:
    """Per device. complete: false where another user's processes could not be looked at."""

    by_device: dict[PciAddress, tuple[Holder, ...]]
    complete: bool


def drives_for_guests(driver: str | None) -> bool:
    """vfio-pci, and the variants that vendors have of it (mlx5_vfio_pci, nvgrace_gpu_vfio_pci ...)."""
    return driver is not None and "vfio" in driver


def nodes(device: Device, sys: str, proc: str) -> list[str]:
    """The nodes in /dev by which programs of the host use the device, as its driver made them."""
    at = f"{sys}/bus/pci/devices/{device.address}"
    found = []
    for directory, where in _NODES.items():
        found += [f"{where}/{name}" for name in sysfs.names(f"{at}/{directory}")]
    found += [f"/dev/infiniband/{name}" for name in sysfs.names(f"{at}/{_VERBS}")]
    information = sysfs.text(f"{proc}/driver/nvidia/gpus/{device.address}/information") or ""
    if minor := re.search(r"^Device Minor:\s*(\d+)", information, re.MULTILINE):
        found.append(f"/dev/nvidia{minor[1]}")
    if device.group is not None and drives_for_guests(device.driver):
        found.append(f"/dev/vfio/{device.group}")
    return found


def holders(devices: Iterable[Device], sys: str, proc: str) -> Holders:
    """Who has them open. Looks through the descriptors of all processes, if there are nodes to look for."""
    whose: dict[str, list[PciAddress]] = {}
    for device in devices:
        for node in nodes(device, sys, proc):
            whose.setdefault(node, []).append(device.address)
    found: dict[PciAddress, list[Holder]] = {}
    complete = True
    for pid in (name for name in sysfs.names(proc) if name.isdecimal() and whose):
        try:
            targets = set(_open_files(f"{proc}/{pid}/fd"))
        except PermissionError:
            complete = False
            continue
        for target in sorted(targets):
            nvme = _NVME_NODE.fullmatch(target)
            for address in whose.get(nvme[1] if nvme else target, ()):
                command = sysfs.text(f"{proc}/{pid}/comm") or "?"
                found.setdefault(address, []).append(Holder(int(pid), command, target))
    return Holders({address: tuple(each) for address, each in found.items()}, complete)


def _open_files(directory: str) -> Iterator[str]:
    """What each descriptor of a process is. Processes end and files close meanwhile."""
    for name in sysfs.names(directory):
        target = sysfs.target(f"{directory}/{name}")
        if target is not None:
            yield target


@dataclass(frozen=True, slots=True)
class Disks:
    """Controllers that the host lives on, with the words for it: its root file system, anything else."""

    root: dict[PciAddress, str]
    used: dict[PciAddress, tuple[str, ...]]


def disks(sys: str, proc: str) -> Disks:
    """Mounts and swap of the host, and what is built on block devices, through dm, md and partitions."""
    root: dict[PciAddress, str] = {}
    used: dict[PciAddress, list[str]] = {}
    for line in sysfs.lines(f"{proc}/1/mountinfo"):
        before, _, after = line.partition(" - ")
        fields, source = before.split(), after.split()
        if len(fields) < 5 or len(source) < 2:
            continue
        number, point = fields[2], fields[4]
        for address in _below(sys, _block_names(sys, number, source[1])):
            if point == "/":
                root[address] = f"{source[1]} is mounted at /"
            else:
                used.setdefault(address, []).append(f"{source[1]} is mounted at {point}")
    for line in sysfs.lines(f"{proc}/swaps")[1:]:
        node = line.split()[0] if line.split() else ""
        for address in _below(sys, _block_names(sys, "", node)):
            used.setdefault(address, []).append(f"{node} is swap")
    for name in sysfs.names(f"{sys}/class/block"):
        for holder in sysfs.names(f"{sys}/class/block/{name}/holders"):
            for address in _below(sys, [name]):
                used.setdefault(address, []).append(f"{name} is part of {holder}")
    return Disks(root, {address: tuple(dict.fromkeys(words)) for address, words in used.items()})


def _block_names(sys: str, number: str, source: str) -> list[str]:
    """A mount's block device by its number; by its source where the file system makes up numbers."""
    names = []
    if number and not number.startswith("0:"):
        names.append(sysfs.link(f"{sys}/dev/block/{number}"))
    elif source.startswith("/dev/"):
        names.append(source.removeprefix("/dev/"))
        if source.startswith("/dev/mapper/"):
            names = [
                name
                for name in sysfs.names(f"{sys}/class/block")
                if sysfs.text(f"{sys}/class/block/{name}/dm/name") == source.removeprefix("/dev/mapper/")
            ]
    return [name for name in names if name and sysfs.target(f"{sys}/class/block/{name}") is not None]


def _below(sys: str, names: Iterable[str]) -> set[PciAddress]:
    """The PCI functions that block devices come from, in the end."""
    found: set[PciAddress] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        place = os.path.realpath(f"{sys}/class/block/{name}")
        found |= _last_address(place)
        # A partition's slaves are its disk's; a stacked device's are its own.
        todo += sysfs.names(f"{place}/slaves")
        subsystem = place.partition("/nvme-subsystem/")
        if subsystem[1]:  # native multipath: the disk is virtual, and belongs to each of these controllers
            base = f"{subsystem[0]}{subsystem[1]}{subsystem[2].split('/')[0]}"
            for controller in sysfs.names(base):
                if re.fullmatch(r"nvme\d+", controller):
                    found |= _last_address(os.path.realpath(f"{base}/{controller}"))
    return found


@dataclass(frozen=True, slots=True)
class Network:
    """Interfaces of the host on a device: those that the default route goes through in the end, those up."""

    default: dict[PciAddress, str]
    up: dict[PciAddress, tuple[str, ...]]


def network(sys: str, proc: str) -> Network:
    """By the main routing tables of the host's network namespace, through bonds, bridges and VLANs."""
    default: dict[PciAddress, str] = {}
    for interface in sorted(_default_interfaces(proc)):
        for lower in _lowest(sys, interface):
            through = f"{interface} through {lower}" if lower != interface else lower
            for address in _last_address(os.path.realpath(f"{sys}/class/net/{lower}/device")):
                default[address] = through
    up: dict[PciAddress, list[str]] = {}
    for name in sysfs.names(f"{sys}/class/net"):
        if (sysfs.number(f"{sys}/class/net/{name}/flags") or 0) & _IFF_UP:
            for address in _last_address(os.path.realpath(f"{sys}/class/net/{name}/device")):
                up.setdefault(address, []).append(name)
    return Network(default, {address: tuple(names) for address, names in up.items()})


def _default_interfaces(proc: str) -> set[str]:
    """Of IPv4 and IPv6. Forms: net/ipv4/fib_trie.c and net/ipv6/route.c.

    Routes that reject are among them, as lo's: no device is behind it.
    """
    found = set()
    for line in sysfs.lines(f"{proc}/1/net/route")[1:]:
        fields = line.split()
        if len(fields) >= 8 and int(fields[1], 16) == int(fields[7], 16) == 0:  # destination, mask
            found.add(fields[0])
    for line in sysfs.lines(f"{proc}/1/net/ipv6_route"):
        fields = line.split()
        if len(fields) >= 10 and int(fields[0], 16) == int(fields[1], 16) == 0:  # destination, prefix
            found.add(fields[9])
    return found


def _lowest(sys: str, interface: str) -> set[str]:
    """The interfaces that it stands on; itself, if on none."""
    found: set[str] = set()
    todo = [interface]
    while todo:
        name = todo.pop()
        lower = [
            entry.removeprefix("lower_")
            for entry in sysfs.names(f"{sys}/class/net/{name}")
            if entry.startswith("lower_")
        ]
        todo += lower
        if not lower:
            found.add(name)
    return found


def _last_address(place: str) -> set[PciAddress]:
    """The PCI function nearest to a directory of sysfs; none of a virtual one."""
    addresses = [part for part in place.split("/") if _ADDRESS.fullmatch(part)]
    return {PciAddress.parse(addresses[-1])} if addresses else set()
