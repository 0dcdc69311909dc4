"""A host of files with a few bound devices, and the file of the Container Device Interface made of it."""

from pathlib import Path

from tests.unit.vfio.hosts import at
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.trees import MEM64, ROOT_PORT, Acs, Model, Tree
from vfio import cdi, inventory, isolation
from vfio.address import PciAddress
from vfio.binding import Bus
from vfio.cdi import Listing
from vfio.ledger.ledger import Ledger

GPU = Model("10de:2330", 0x030200, bars={0: (1 << 24, MEM64)}, driver="nvidia")
AUDIO = Model("10de:22be", 0x040300, driver="snd_hda_intel")
INSTINCT = Model("1002:74a1", 0x120000, bars={0: (1 << 24, MEM64)}, driver="amdgpu")
CARD = Model("8086:1521", 0x020000, bars={0: (1 << 17, MEM64)}, driver="igb")
PORT = Model("8086:352a", 0x060400, driver="pcieport")
PGPU, ANY = "nvidia.com/pgpu", "casemate.dev/device"
FIRST, SOUND, SECOND = at("01:00.0"), at("01:00.1"), at("02:00.0")
AMDS, NETWORK = at("03:00.0"), at("04:00.0")


def small(directory: Path) -> Tree:
    """A GPU with audio in its group, a GPU, one of AMD's, a network card; each below a port of its own."""
    tree = Tree(directory)
    bus = tree.root_bus(0, 0)
    ports = [tree.bridge(bus, PORT, ROOT_PORT, acs=Acs()) for _ in range(4)]
    group = tree.new_group()
    tree.function(ports[0], GPU, slot=0, multifunction=True, group=group)
    tree.function(ports[0], AUDIO, slot=0, function=1, multifunction=True, group=group)
    for port, model in zip(ports[1:], (GPU, INSTINCT, CARD), strict=True):
        tree.function(port, model)
    return tree


def bound(kernel: Kernel, *addresses: PciAddress) -> None:
    """As an operator leaves them."""
    for address in addresses:
        kernel.write(str(kernel.at(address, "driver_override")), "vfio-pci\n", 1)
        if kernel.driver(address):
            kernel.write(str(kernel.at(address, "driver/unbind")), str(address), 1)
        kernel.write(f"{kernel.tree.sys}/bus/pci/drivers/vfio-pci/bind", str(address), 1)


def listed(kernel: Kernel, kind: str, ledger: Ledger | None = None, dev: str = "/nowhere") -> Listing:
    sys, proc = str(kernel.tree.sys), str(kernel.tree.proc)
    found = inventory.read(sys)
    audit = isolation.audit(found, sys=sys, proc=proc)
    held, bindings = (ledger.devices(), ledger.bindings()) if ledger else ([], [])
    return cdi.listing(kind, found, audit, held, bindings, Bus(sys).node, dev)


def group(kernel: Kernel, address: PciAddress) -> str:
    return f"/dev/vfio/{kernel.at(address, 'iommu_group').readlink().name}"
