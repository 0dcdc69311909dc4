"""NVIDIA's driver in this guest: its modules, its nodes, its GPUs initialised, which has which number.

Imported by guests that were given such a GPU alone. Numbers of devices are those of NVIDIA's own sources
(nvidia-modprobe, and /proc/driver/nvidia of its open kernel modules, 550). Must not know how
nvidiacdi.py makes of it what a container needs.
"""

from __future__ import annotations

import asyncio
import os
import stat

from agent import boot
from agent.files import read
from agent.progress import while_moving
from agent.threads import in_thread
from agent.uevents import appearance
from rpc.errors import FailedPrecondition, Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

FEATURE = "nvidia"
# Nodes are made here: neither the driver's libraries nor its set-uid helper shall make or change any.
OPTIONS = {"nvidia": "NVreg_ModifyDeviceFiles=0"}
_MAJOR, _CONTROL, _MODESET = 195, 255, 254  # Documentation/admin-guide/devices.txt; nvidia-modprobe
_UVM, _CAPS = "nvidia-uvm", "nvidia-caps"  # in /proc/devices
_MODE = 0o666  # NVreg_DeviceFileMode's default: who may use a GPU is a matter of who has its node
_MIG = ("mig/config", "mig/monitor")


class Driver:
    """Of one guest. root: where proc and dev are looked at, and what containers are given."""

    says: tuple[str, ...] = ("NVRM",)  # what its lines in the kernel's log have that matter

    def __init__(self, root: str = "") -> None:
        self._root = root
        self._proc = f"{root}/proc"
        self._dev = f"{root}/dev"
        self._loading: asyncio.Task[None] | None = None
        self._held: dict[str, int] = {}
        self._done = 0
        self.minors: dict[str, int] = {}
        """Of GPUs that are initialised, by their addresses in the guest."""

    async def come_up(self, directory: str, limit_s: float) -> None:
        """The GPU of this directory of sysfs is the driver's, and initialised. All nodes are there.

        limit_s: of each step; of the last, from when the driver was done with any GPU, as it may initialise
        one after the other. Raises FailedPrecondition where the driver cannot be loaded or cannot initialise
        it, Unavailable where that takes too long, with what was waited for.
        """
        address = os.path.basename(directory)
        if self._loading is None:
            self._loading = asyncio.create_task(in_thread(self._load))
        try:
            await while_moving(self._loading, self._count_done, limit_s)
        except TimeoutError:
            raise _late(address, "the driver was not loaded", limit_s) from None
        try:
            minor = await appearance(lambda: self._minor(address), f"GPU {address}", limit_s)
        except Unavailable:
            raise _late(address, "the driver did not take it", limit_s) from None
        make_node(f"{self._dev}/nvidia{minor}", _MAJOR, minor)
        opening = asyncio.ensure_future(self._initialise(address, f"{self._dev}/nvidia{minor}"))
        try:
            self._held[address] = await while_moving(opening, self._count_done, limit_s)
        except TimeoutError:
            raise _late(address, "it was not initialised", limit_s) from None
        finally:
            opening.cancel()
        self.minors[address] = minor

    def nodes(self, address: str) -> list[str]:
        """Of a GPU that is initialised, below /dev; none of another device."""
        return [f"nvidia{self.minors[address]}"] if address in self.minors else []

    def specification(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What containers need, as a specification of CDI, and what it calls each GPU, by the address.

        Raises NotFound for a node that is not there.
        """
        from agent import nvidiacdi

        names = {minor: str(index) for index, minor in enumerate(sorted(self.minors.values()))}
        made = nvidiacdi.specification(self.minors.values(), self._root)
        return made, {address: names[minor] for address, minor in self.minors.items()}

    def _load(self) -> None:
        """The modules, and the nodes that are not one GPU's."""
        boot.load_feature(FEATURE, options=OPTIONS)
        make_node(f"{self._dev}/nvidiactl", _MAJOR, _CONTROL)
        make_node(f"{self._dev}/nvidia-modeset", _MAJOR, _MODESET)
        majors = dict(self._majors())
        if _UVM in majors:
            make_node(f"{self._dev}/nvidia-uvm", majors[_UVM], 0)
            make_node(f"{self._dev}/nvidia-uvm-tools", majors[_UVM], 1)
        if _CAPS in majors:
            for name in _MIG:
                self._make_capability(majors[_CAPS], name)

    def _make_capability(self, major: int, name: str) -> None:
        """What a process needs to have open to divide GPUs, or to watch their parts; a driver without it has
        no file for it."""
        try:
            fields = _fields(f"{self._proc}/driver/nvidia/capabilities/{name}")
        except FileNotFoundError:
            return
        os.makedirs(f"{self._dev}/nvidia-caps", exist_ok=True)
        minor = int(fields["DeviceFileMinor"])
        path = f"{self._dev}/nvidia-caps/nvidia-cap{minor}"
        make_node(path, major, minor, int(fields["DeviceFileMode"]))

    async def _initialise(self, address: str, path: str) -> int:
        """Opens the GPU, which initialises it (seconds), to keep it open, so that it stays so: as
        nvidia-persistenced does. Each in a thread of its own: they wait for each other as far as the driver
        has them wait."""
        try:
            held = await in_thread(lambda: os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            self._done += 1
            raise FailedPrecondition(
                f"GPU {address} cannot be initialised", os.strerror(error.errno or 0)
            ) from error
        self._done += 1
        return held

    def _count_done(self) -> int:
        """GPUs that the driver has initialised, or has failed to."""
        return self._done

    def _minor(self, address: str) -> int | None:
        """The driver's number of a GPU, once it has taken it."""
        try:
            fields = _fields(f"{self._proc}/driver/nvidia/gpus/{address}/information")
            return int(fields["Device Minor"])
        except (FileNotFoundError, KeyError):
            return None

    def _majors(self) -> Iterator[tuple[str, int]]:
        text = read(f"{self._proc}/devices").decode()
        for line in text.partition("Block devices:")[0].splitlines():
            number, _, name = line.strip().partition(" ")
            if number.isdigit():
                yield name, int(number)


def _late(address: str, what: str, limit_s: float) -> Unavailable:
    return Unavailable(f"GPU {address}: {what} within {limit_s:g} s")


def make_node(path: str, major: int, minor: int, mode: int = _MODE) -> None:
    """A character device, if there is none yet."""
    try:
        os.mknod(path, stat.S_IFCHR | mode, os.makedev(major, minor))
    except FileExistsError:
        return
    os.chmod(path, mode)


def _fields(path: str) -> dict[str, str]:
    """Of a file of lines "NAME: VALUE"."""
    lines = (line.partition(":") for line in read(path).decode(errors="replace").splitlines())
    return {name.strip(): value.strip() for name, found, value in lines if found}
