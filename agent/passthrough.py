"""Devices of the host's that this machine was given: found behind their root ports, waited for, given on.

Disks are waited for, network cards named and given addresses; of GPUs becomes what their vendor's plug-in
(nvidia.py, amd.py) makes of them, if the image has its driver; of any other, whatever a driver of this
kernel's makes of it by itself, or nothing but its entry in sysfs. Must not know whose devices they are.
"""

from __future__ import annotations

import asyncio
import os
import re
import time

from agent import bars, boot, ids
from agent.files import read, write
from agent.uevents import appearance
from rpc.api.agent import FoundDevice
from rpc.errors import CasemateError, FailedPrecondition, InvalidArgument, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Protocol

    from agent.users import Users
    from rpc.api.agent import GivenDevice, PciDevice

    class VendorDriver(Protocol):
        """A vendor's driver for its GPUs, in this guest."""

        says: tuple[str, ...]
        """What its lines in the kernel's log have that matter."""

        async def come_up(self, directory: str, limit_s: float) -> None:
            """The GPU of this directory of sysfs is the driver's, and of use."""

        def nodes(self, address: str) -> list[str]:
            """Of a GPU that has come up, below /dev."""

        def specification(self) -> tuple[dict[str, Any], dict[str, str]]:
            """What containers need, as a specification of CDI, and what it calls each GPU, by the address."""


SYSFS = "/sys"
KMSG = "/dev/kmsg"
MOST_WORDS, MOST_SEARCHED = 12, 256
MOST_NODES, MOST_TOLD = 64, 8
# The feature that makes RDMA of what a network card's driver has taken.
RDMA = {"mlx5_core": "mlx5-rdma"}
_INFINIBAND = b"0x0207"  # the class of a card whose ports are no Ethernet's (PCI Code and ID Assignment)
# nvme0n1; nvme0c1n1 is one of several ways to nvme0n1, which has a name of its own below (drivers/nvme/host).
_NAMESPACE = re.compile(r"(nvme\d+)(?:c\d+)?(n\d+)")


def _nvidia(sysfs: str, root: str) -> VendorDriver:
    from agent import nvidia

    return nvidia.Driver(root)


def _amd(sysfs: str, root: str) -> VendorDriver:
    from agent import amd

    return amd.Driver(sysfs)


# By the vendor's id: which feature images have with its driver, and what makes the driver.
_VENDORS: Mapping[int, tuple[str, Callable[[str, str], VendorDriver]]] = {
    0x10DE: ("nvidia", _nvidia),
    0x1002: ("amdgpu", _amd),
}


class Passthrough:
    """Those of one machine. sysfs: where it is looked at. root: of the guest's files. say: takes a line for
    each as soon as it is known what has become of it."""

    def __init__(
        self, sysfs: str = SYSFS, root: str = "", say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._sysfs = sysfs
        self._root = root
        self._say = say
        self._addresses: dict[str, str] = {}
        self._drivers: dict[int, VendorDriver] = {}
        self._gpus: dict[str, VendorDriver] = {}  # those that are up, by address
        self._cards: list[tuple[str, PciDevice]] = []

    async def come_up(self, devices: Sequence[PciDevice], limit_s: float) -> list[FoundDevice]:
        """What has become of each, all waited for at once."""
        return list(await asyncio.gather(*(self._told(device, limit_s) for device in devices)))

    async def _told(self, device: PciDevice, limit_s: float) -> FoundDevice:
        """As _come_up(), and said at once: the answer comes when the last is known."""
        begun_s = time.monotonic()
        found = await self._come_up(device, limit_s)
        made = found.driver or "no driver", *found.interfaces, *found.nodes[:MOST_TOLD]
        words = f"it did not come up: {found.problem}" if found.problem else " ".join(made)
        at = f", {found.address}" if found.address else ""
        after = f"after {time.monotonic() - begun_s:.1f} s"
        self._say(f"casemate agent: device {device.name}{at}, {after}: {' '.join(words.split())}")
        return found

    async def _come_up(self, device: PciDevice, limit_s: float) -> FoundDevice:
        found = FoundDevice(name=device.name)
        about: tuple[str, ...] = ()
        try:
            found.address = at = await appearance(
                lambda: self._behind(device.port, device.function),
                f"device behind root port {device.port}",
                limit_s,
            )
            self._addresses[device.name] = at
            bars.check(
                self._directory(at), kernel_words((at,), (), KMSG, MOST_SEARCHED), f"{self._root}/proc"
            )
            self._move(at, device.node)
            if driver := self._vendors_driver(device.kind, at):
                about = driver.says
                await driver.come_up(self._directory(at), limit_s)
                self._gpus[at] = driver
            else:
                self._load_driver(at)
                await self._become(device, at, limit_s)
        except CasemateError as error:
            found.problem = str(error)
            others = {at[:-2] for at in self._addresses.values()} - {found.address[:-2]}
            names = (found.address or device.port, *about)
            found.words = kernel_words(names, sorted(others) if about else ())
        if found.address:
            found.driver = self._driver(found.address)
            found.interfaces = self._interfaces(found.address)
            if up := self._gpus.get(found.address):
                found.nodes = up.nodes(found.address)
            else:
                found.nodes = [path for path, *_ in self._nodes(found.address)]
        return found

    def _move(self, address: str, node: int) -> None:
        """To its NUMA node, before a driver takes it, where no root bus of that node's says so already.

        The kernel takes that for a mended fault of the firmware's, and says so (drivers/pci/pci-sysfs.c).
        """
        path = f"{self._directory(address)}/numa_node"
        try:
            if node >= 0 and int(read(path)) != node:
                write(path, str(node).encode())
        except FileNotFoundError:
            pass  # of a kernel without NUMA
        except OSError as error:
            raise FailedPrecondition(f"it cannot be on NUMA node {node}: {error.strerror}") from error

    def _load_driver(self, address: str) -> None:
        """The one that the image has for it, where no driver has taken it by itself."""
        if not self._driver(address):
            try:
                modalias = read(f"{self._directory(address)}/modalias").decode(errors="replace").strip()
            except OSError as error:
                raise NotFound(f"it is gone: {error.strerror}") from error
            if feature := boot.driver_of(modalias):
                boot.load_feature(feature)

    async def _become(self, device: PciDevice, address: str, limit_s: float) -> None:
        """A disk is waited for, a network card set up; any other is what its driver makes of it by itself."""
        wanted = device.kind == "nvme" or bool(device.interface or device.addresses)
        if wanted and not self._driver(address):
            raise FailedPrecondition("this guest image's kernel has no driver for it")
        if device.kind == "nvme":
            await appearance(lambda: self._namespace(address), "namespace of the NVMe", limit_s)
        elif device.kind == "nic" and (driver := self._driver(address)):
            from agent import network

            if (rdma := RDMA.get(driver)) and rdma in boot.features():
                boot.load_feature(rdma)
            if not wanted and self._is_infiniband(address):
                await appearance(lambda: self._rdma(address) or None, "RDMA device of the card", limit_s)
                return
            what = "interface of the network card"
            (name, *_) = await appearance(lambda: self._interfaces(address) or None, what, limit_s)
            self._cards.append((network.set_up_card(name, device), device))

    def move_cards(self, users: Users) -> None:
        """Network cards, to where the pod's network is from now on. Raises FailedPrecondition."""
        from agent import network

        for title, wanted in self._cards:
            network.move_card(title, wanted, users)

    def _namespace(self, address: str) -> str | None:
        """Of an NVMe: one that is a block device."""
        for path, _, __ in os.walk(f"{self._directory(address)}/nvme"):
            if _NAMESPACE.fullmatch(os.path.basename(path)):
                return path
        return None

    def _interfaces(self, address: str) -> list[str]:
        return self._listed(f"{self._directory(address)}/net")

    def _rdma(self, address: str) -> list[str]:
        return self._listed(f"{self._directory(address)}/infiniband")

    def _is_infiniband(self, address: str) -> bool:
        try:
            return read(f"{self._directory(address)}/class").startswith(_INFINIBAND)
        except OSError:  # it has just gone
            return False

    @staticmethod
    def _listed(directory: str) -> list[str]:
        try:
            return sorted(os.listdir(directory))
        except FileNotFoundError:
            return []

    def _vendors_driver(self, kind: str, address: str) -> VendorDriver | None:
        """Of a GPU whose vendor's driver the image has; None of any other device."""
        if kind != "gpu":
            return None
        try:
            vendor = int(read(f"{self._directory(address)}/vendor"), 16)
        except OSError:  # it has just gone
            return None
        feature, make = _VENDORS.get(vendor, ("", None))
        if make is None or feature not in boot.features():
            return None
        if vendor not in self._drivers:
            self._drivers[vendor] = make(self._sysfs, self._root)
        return self._drivers[vendor]

    def add(self, spec: dict[str, Any], devices: Iterable[GivenDevice]) -> None:
        """To an OCI config.json: their nodes, and what else programs need of their drivers. Raises NotFound
        for one that is not there (any more)."""
        linux = spec.setdefault("linux", {})
        entries = linux.setdefault("devices", [])
        rules = linux.setdefault("resources", {}).setdefault("devices", [])
        gpus: list[GivenDevice] = []
        with_rdma = False
        mapped = ids.of_spec(spec)
        for device in devices:
            at = self._addresses.get(device.name)
            if at is None or not os.path.exists(self._directory(at)):
                raise NotFound(f"device {device.name} is not in this guest")
            if at in self._gpus:
                gpus.append(device)
                continue
            nodes = list(self._nodes(at))
            if device.path and not nodes:
                raise NotFound(
                    f"device {device.name} cannot be at {device.path}: the guest's kernel has no node for it"
                )
            if not with_rdma and self._rdma(at):
                with_rdma = True
                nodes += self._connections()
            for index, (path, kind, major, minor) in enumerate(nodes):
                number = {"type": kind, "major": major, "minor": minor}
                wanted = device.path if device.path and index == 0 else f"/dev/{path}"
                # Root's are those of the container's root: no other has a use for the pod's own device.
                uid = device.uid or mapped.uid_outside(0) or 0
                gid = device.gid or mapped.gid_outside(0) or 0
                rights = {"fileMode": device.mode, "uid": uid, "gid": gid}
                entries.append({"path": wanted, **rights, **number})
                rules.append({"allow": True, "access": "rwm", **number})
        for driver in self._drivers.values():
            if own := [gpu for gpu in gpus if self._gpus[self._addresses[gpu.name]] is driver]:
                self._add_gpus(spec, own, driver)

    def _add_gpus(self, spec: dict[str, Any], gpus: Sequence[GivenDevice], driver: VendorDriver) -> None:
        from agent import cdi

        specification, names = driver.specification()
        for gpu in gpus:
            paths = [f"/dev/{node}" for node in driver.nodes(self._addresses[gpu.name])]
            if gpu.path and gpu.path not in paths:
                raise InvalidArgument(
                    f"device {gpu.name} cannot be at {gpu.path}: libraries look for it at {' '.join(paths)}"
                )
        cdi.apply(spec, specification, [names[self._addresses[gpu.name]] for gpu in gpus])

    def _directory(self, address: str) -> str:
        return f"{self._sysfs}/bus/pci/devices/{address}"

    def _behind(self, port: str, function: int) -> str | None:
        """The address of what has this number of a function behind a root port."""
        try:
            names = os.listdir(self._directory(f"0000:{port}"))
        except FileNotFoundError:
            return None
        return next(
            (name for name in names if re.fullmatch(rf"[0-9a-f]+:[0-9a-f]+:00\.{function}", name)), None
        )

    def _driver(self, address: str) -> str:
        try:
            return os.path.basename(os.readlink(f"{self._directory(address)}/driver"))
        except FileNotFoundError:
            return ""

    def _nodes(self, address: str) -> Iterator[tuple[str, str, int, int]]:
        """Path below /dev, type and numbers of every node that drivers have made of it, block devices first.

        A node is a directory of sysfs with a file `dev`. Of one of several ways to a disk, the disk's.
        """
        found = set()
        for directory, _, files in os.walk(self._directory(address) + "/"):
            if "dev" in files:
                found.add(self._node(directory))
            elif (way := _NAMESPACE.fullmatch(os.path.basename(directory))) and "c" in way[0]:
                found.add(self._node(f"{self._sysfs}/class/block/{way[1]}{way[2]}"))
        nodes = [node for node in found if node is not None]
        yield from sorted(nodes, key=lambda node: (node[1] != "b", node))[:MOST_NODES]

    def _connections(self) -> list[tuple[str, str, int, int]]:
        """The node that connections by RDMA are made with: one for all devices, none without rdma_ucm."""
        node = self._node(f"{self._sysfs}/class/misc/rdma_cm")
        return [] if node is None else [node]

    def _node(self, directory: str) -> tuple[str, str, int, int] | None:
        """None for one that has gone meanwhile, or has no name."""
        try:
            uevent = read(f"{directory}/uevent").decode(errors="replace")
            kind = os.path.basename(os.readlink(f"{directory}/subsystem"))
        except OSError:
            return None
        fields = dict(line.split("=", 1) for line in uevent.splitlines() if "=" in line)
        try:
            path = fields["DEVNAME"]
            return path, "b" if kind == "block" else "c", int(fields["MAJOR"]), int(fields["MINOR"])
        except (KeyError, ValueError):
            return None


def kernel_words(
    about: Sequence[str], unless: Sequence[str] = (), path: str = KMSG, most: int = MOST_WORDS
) -> list[str]:
    """The last lines of the kernel's log that name any of these, and none of those."""
    try:
        kmsg = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return []
    lines: list[str] = []
    try:
        while True:
            try:
                record = os.read(kmsg, 8192)
            except BlockingIOError:
                break
            except BrokenPipeError:  # overwritten while we read: the next is the oldest there is
                continue
            if not record:
                break
            # "6,339,5140900,-;text\n KEY=value\n" (Documentation/ABI/testing/dev-kmsg)
            text = record.decode(errors="replace").partition(";")[2].partition("\n")[0]
            if any(word and word in text for word in about) and not any(word in text for word in unless):
                lines += text.split("\\x0a")  # a record of several lines
    finally:
        os.close(kmsg)
    return lines[-most:]
