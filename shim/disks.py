"""The pod's block devices as disks of its machine: one for each, however many containers have it.

QEMU, which may read no device of the host's, gets a node of its own for each, in a directory that only this
pod's processes see. It must not know of containers.
"""

import asyncio
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rpc.api import agent as api
from rpc.errors import FailedPrecondition, InvalidArgument
from shim import system
from shim.blockdevices import BlockDevice
from shim.helper import in_thread
from shim.vm.domain import BlockDisk
from shim.vm.guest import Machine

DIRECTORY = "disks"
_OPTIONS = system.MS_NOSUID | system.MS_NOEXEC
_SIZE = "size=64k,nr_inodes=64,mode=0711"


@dataclass(slots=True)
class Plugged:
    disk: BlockDisk
    users: int


class Disks:
    """Of one pod. directory: the pod's."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / DIRECTORY
        self._plugged: dict[tuple[int, int], Plugged] = {}
        self._changing = asyncio.Lock()

    async def plug(self, machine: Machine, device: BlockDevice) -> api.Disk:
        """What the agent is told. Raises InvalidArgument if there is no such device on the host, or another
        container of the pod has it to write and this one not, or the other way round; ResourceExhausted,
        Unavailable."""
        key = (device.major, device.minor)
        device = replace(device, read_only=device.read_only or _is_read_only(device))
        async with self._changing:
            plugged = self._plugged.get(key)
            if plugged is None:
                plugged = Plugged(await self._attach(machine, device), 0)
                self._plugged[key] = plugged
            elif plugged.disk.read_only != device.read_only:
                raise InvalidArgument(
                    f"device {device.path}: another container of the pod has {_name(device)} otherwise",
                    hint="give it to all of them to read, or to all of them to write",
                )
            plugged.users += 1
        return api.Disk(
            serial=plugged.disk.serial,
            path=device.path,
            mode=device.mode,
            uid=device.uid,
            gid=device.gid,
            read_only=device.read_only,
        )

    async def unplug(self, machine: Machine, device: BlockDevice) -> None:
        """For each plug() one. Raises Unavailable."""
        key = (device.major, device.minor)
        async with self._changing:
            plugged = self._plugged[key]
            plugged.users -= 1
            if plugged.users:
                return
            del self._plugged[key]
            await in_thread(partial(machine.host.detach, plugged.disk.xml()))
            os.unlink(plugged.disk.path)
            machine.ports.give_back(plugged.disk.bus)

    async def _attach(self, machine: Machine, device: BlockDevice) -> BlockDisk:
        bus = machine.ports.take(f"device {device.path}")
        try:
            node = self._make_node(device, machine.host.user.uid)
            try:
                disk = BlockDisk(str(node), f"casemate{bus}", bus, device.read_only)
                await machine.plug(partial(machine.host.attach, disk.xml()))
            except BaseException:
                node.unlink()
                raise
        except BaseException:
            machine.ports.give_back(bus)
            raise
        return disk

    def _make_node(self, device: BlockDevice, uid: int) -> Path:
        if not self._directory.exists():
            self._directory.mkdir(mode=0o711)
            system.mount("casemate", str(self._directory), "tmpfs", _OPTIONS, _SIZE)
        node = self._directory / f"{device.major}-{device.minor}"
        with suppress(FileNotFoundError):
            node.unlink()  # of a try that failed
        number = os.makedev(device.major, device.minor)
        os.mknod(node, stat.S_IFBLK | (0o400 if device.read_only else 0o600), number)
        os.chown(node, uid, -1)
        try:
            os.close(os.open(node, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            node.unlink()
            raise FailedPrecondition(
                f"device {device.path}: {_name(device)} cannot be opened", error.strerror
            ) from error
        return node


def _is_read_only(device: BlockDevice) -> bool:
    """Whether the host's kernel lets nobody write to it, whoever may."""
    try:
        return Path(f"/sys/dev/block/{device.major}:{device.minor}/ro").read_text().strip() == "1"
    except FileNotFoundError:
        return False  # there is none: opening it says so


def _name(device: BlockDevice) -> str:
    return f"the host's block device {device.major}:{device.minor}"
