"""The part of Linux that binds and resets PCI functions, over a tree on disk: what writing to it does.

As drivers/base/bus.c and drivers/pci/pci-sysfs.c do it, in the writer's call. It can be told to fail.
"""

import errno
import itertools
import os
import re
import signal
import struct
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.unit.vfio.trees import Tree
from vfio.address import PciAddress

_DEVICE = re.compile(r".*/bus/pci/devices/([0-9a-f:.]+)/(.+)")
_DRIVER = re.compile(r".*/bus/pci/drivers/([^/]+)/bind")

Effect = Callable[[PciAddress], None]


class Kernel:
    """written: every value, by the end of its path. resets: what was reset, and how.

    effects: by method of reset, what it does besides. before: called before each write, as a hook.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.written: list[tuple[str, str]] = []
        self.resets: list[tuple[str, str]] = []
        self.effects: dict[str, Effect] = {}
        self.refused: dict[str, int] = {}  # the end of a path -> errno
        self.dynamic_ids: set[PciAddress] = set()  # devices whose id vfio-pci was told (new_id)
        self.unable: set[str] = set()  # ways to reset that are listed, and cannot be done
        self.before: Callable[[], None] = lambda: None
        self.native = {address: self.driver(address) for address in tree.nodes}
        self._lock = threading.Lock()
        self._cdevs = 0
        for address in tree.nodes:
            methods = self.at(address, "reset_method")
            if methods.exists() and methods.read_text().strip():  # a bridge has none
                self.at(address, "reset").touch()
        (tree.sys / "bus/pci/drivers/vfio-pci").mkdir(parents=True, exist_ok=True)

    def at(self, address: PciAddress, name: str = "") -> Path:
        return self.tree.sys / "bus/pci/devices" / str(address) / name

    def driver(self, address: PciAddress) -> str:
        link = self.at(address, "driver")
        return link.readlink().name if link.is_symlink() else ""

    def override(self, address: PciAddress) -> str:
        return self.at(address, "driver_override").read_text().strip()

    def state(self) -> dict[str, tuple[str, str]]:
        """Driver and override of each function that has either."""
        return {
            str(address): (self.driver(address), self.override(address))
            for address in self.tree.nodes
            if self.at(address, "vendor").exists()
        }

    def write(self, path: str, value: str, timeout_s: float) -> None:
        with self._lock:  # a kill by before() finds no other thread half way through one of these files
            self.before()
            self._write(path, value)

    def kills(self, work: Callable[[], None], step: int) -> bool:
        """Whether a child that does this was killed, as it is before the step-th write, counted from one."""
        if (pid := os.fork()) == 0:
            left = itertools.count(step - 1, -1)
            self.before = lambda: None if next(left) else os.kill(os.getpid(), signal.SIGKILL)
            status = 1
            try:
                work()
                status = 0
            except BaseException:  # noqa: BLE001 - told by the status, and to who reads the test's output
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0

    def _write(self, path: str, value: str) -> None:
        name = path.removeprefix(f"{self.tree.sys}/bus/pci/")
        self.written.append((name, value))
        for end, number in self.refused.items():
            if path.endswith(end):
                raise OSError(number, os.strerror(number), path)
        if found := _DRIVER.fullmatch(path):
            self._bind(PciAddress.parse(value.strip()), found[1], path)
            return
        if path.endswith("/bus/pci/drivers_probe"):
            self._probe(PciAddress.parse(value.strip()))
            return
        found = _DEVICE.fullmatch(path)
        assert found is not None, path
        address, file = PciAddress.parse(found[1]), found[2]
        if not self.at(address, file).exists() and file != "driver/unbind":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        match file:
            case "driver_override":
                self.at(address, file).write_text(value if value.strip() else "(null)\n")
            case "driver/unbind":
                self._unbind(address, path)
            case "reset":
                self._reset(address, path)
            case "reset_method" if self.unable.intersection(value.split()):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
            case "reset_method" | "power/control":
                self.at(address, file).write_text(value)
            case _:
                raise AssertionError(f"nobody writes to {path}")

    def _bind(self, address: PciAddress, driver: str, path: str) -> None:
        override = self.override(address)
        takes = override == driver if override != "(null)" else self.native.get(address) == driver
        if self.driver(address) or not takes or not (self.tree.sys / "bus/pci/drivers" / driver).is_dir():
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), path)
        self._take(address, driver)

    def _take(self, address: PciAddress, driver: str) -> None:
        self.tree.bind(self.tree.nodes[address], driver)
        if driver == "vfio-pci":
            self._cdevs += 1
            cdev = self.at(address, f"vfio-dev/vfio{self._cdevs}")
            cdev.mkdir(parents=True)
            self.tree.link(f"sys/class/vfio-dev/{cdev.name}", cdev)
            if group := self._group(address):
                (self.tree.sys / "class/vfio" / group).mkdir(parents=True, exist_ok=True)

    def _probe(self, address: PciAddress) -> None:
        """Any driver that takes it; it is no error if none does (device_attach, drivers/base/dd.c)."""
        override = self.override(address)
        driver = self.native.get(address, "") if override == "(null)" else override
        if address in self.dynamic_ids and override == "(null)":
            driver = "vfio-pci"
        if not self.driver(address) and driver and (self.tree.sys / "bus/pci/drivers" / driver).is_dir():
            self._take(address, driver)

    def _unbind(self, address: PciAddress, path: str) -> None:
        if not self.driver(address):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if self.driver(address) == "vfio-pci":
            for cdev in self.at(address, "vfio-dev").iterdir():
                (self.tree.sys / "class/vfio-dev" / cdev.name).unlink()
                cdev.rmdir()
            self.at(address, "vfio-dev").rmdir()
        self.tree.bind(self.tree.nodes[address], None)
        if group := self._group(address):
            members = (self.tree.sys / f"kernel/iommu_groups/{group}/devices").iterdir()
            node = self.tree.sys / "class/vfio" / group
            if node.is_dir() and not any((member / "vfio-dev").exists() for member in members):
                node.rmdir()

    def _group(self, address: PciAddress) -> str:
        """Its IOMMU group's number; "" where the host has no IOMMU."""
        link = self.at(address, "iommu_group")
        return link.readlink().name if link.is_symlink() else ""

    def _reset(self, address: PciAddress, path: str) -> None:
        file = self.at(address, "reset_method")
        method = file.read_text().split()[0] if file.exists() else "unnamed"
        self.resets.append((str(address), method))
        if method in self.effects:
            self.effects[method](address)

    # --- what a reset may do ---

    def not_answering(self, address: PciAddress) -> None:
        self.at(address, "config").write_bytes(b"\xff" * 4096)

    def losing_a_bar(self, address: PciAddress) -> None:
        config = bytearray(self.at(address, "config").read_bytes())
        struct.pack_into("<I", config, 0x10, 0xDEAD0000)
        self.at(address, "config").write_bytes(config)

    def narrowing(self, address: PciAddress) -> None:
        self.at(address, "current_link_width").write_text("8\n")

    def refusing(self, address: PciAddress) -> None:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY), str(self.at(address, "reset")))
