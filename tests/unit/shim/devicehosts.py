"""A host with devices that pods can be given, as files, and the shim's side of giving (shim/giving.py)."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from config.load import load
from config.settings import Settings
from shim import system
from shim.devicewishes import DEFAULT_MODE, DeviceWishes, Node
from shim.giving import Giver
from shim.hugepages import Ram
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.machines import H100, INTEL_PORT, NVME, RTX4090, RTX4090_AUDIO
from tests.unit.vfio.trees import ROOT_PORT, Acs, Tree
from tests.unit.vfio.trees import Node as Function
from vfio.address import PciAddress
from vfio.binding import Bus
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, Process

FIRST, SECOND, CARD, DISK = (PciAddress.parse(f"{bus:02x}:00.0") for bus in range(1, 5))
RAM = Ram(256 << 20, "auto")
AUDIO = PciAddress.parse("03:00.1")


def node(
    group: int | None, address: str = "", path: str = "", mode: int = DEFAULT_MODE, uid: int = 0, gid: int = 0
) -> Node:
    return Node(group=group, address=address, path=path, mode=mode, uid=uid, gid=gid)


def wishes(*nodes: Node, text: str = "") -> DeviceWishes:
    return DeviceWishes(nodes=nodes, text=text)


class DeviceHost:
    """Two H100s, a card of two functions, an NVMe: each below a port with ACS, and in a group of its own."""

    def __init__(self, root: Path) -> None:
        self.tree = Tree(root)
        self.bus = self.tree.root_bus(0, 0)
        for model in (H100, H100):
            self.tree.function(self.port(), model)
        port, group = self.port(), self.tree.new_group()
        self.tree.function(port, RTX4090, slot=0, group=group, multifunction=True)
        self.tree.function(port, RTX4090_AUDIO, slot=0, function=1, group=group, multifunction=True)
        self.tree.function(self.port(), NVME)
        self.memory(0)
        self.look_again()

    def memory(self, *nodes: int, cpus: str = "") -> None:
        """This process may have that of these nodes, and run on these CPUs."""
        allowed = ",".join(map(str, nodes))
        lines = ("Name:\tpython3", f"Cpus_allowed_list:\t{cpus}", f"Mems_allowed_list:\t{allowed}", "")
        self.tree.put("proc/self/status", "\n".join(lines))

    def look_again(self) -> None:
        """The kernel knows what was plugged in since."""
        self.kernel = Kernel(self.tree)

    def port(self) -> Function:
        return self.tree.bridge(self.bus, INTEL_PORT, ROOT_PORT, acs=Acs())

    @property
    def node(self) -> dict[PciAddress, Function]:
        return self.tree.nodes

    def pci(self) -> Bus:
        return Bus(str(self.tree.sys), write=self.kernel.write)

    def giver(self, settings: Settings, pod: str = "web", started: int | None = None) -> Giver:
        """Of a pod whose shim this process is; or, with another start time, was one that is gone."""
        me = Process.here(os.getpid(), system.start_time("self") if started is None else started)
        return Giver(settings, Pod("default", pod, "red"), me, str(self.tree.proc), self.pci())

    def states(self, settings: Settings) -> dict[PciAddress, str]:
        """By the ledger, of what is not free."""
        with Ledger(Path(settings.ledger_dir)) as ledger:
            return {each.address: each.state.value for each in ledger.devices() if each.state.value != "free"}

    def drivers(self) -> dict[PciAddress, str]:
        """Of the devices, bridges left out."""
        return {each: self.kernel.driver(each) for each in (FIRST, SECOND, CARD, AUDIO, DISK)}


@contextmanager
def settings_in_memory() -> Iterator[Settings]:
    """An operator's who has decided nothing. A disk's time is not what these tests are about."""
    shm = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir=shm) as directory:
        patch.setenv("CASEMATE_CONFIG_DIR", f"{directory}/etc")
        patch.setenv("CASEMATE_LEDGER_DIR", f"{directory}/ledger")
        yield load()
