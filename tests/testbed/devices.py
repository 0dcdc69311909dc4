"""Which devices an instance of the bed has, and where: declared here, and made into options of QEMU.

A device is known by its name. PLACES says by which way from a root bus it is reached, since the numbers of
the buses between are the firmware's choice; inside/places.py makes addresses of it.
Must not know how an instance is started.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.testbed.fakegpu import A6000, A6000_AUDIO, H100, FakeGpu, Model
from tests.testbed.gauges import Gauges
from tests.testbed.vfiouser import Server

PLACES = "places.json"  # in the exchange: name -> root bus, then slot.function at each step
GAUGES = "gauges"  # there, too: a directory with a file for each fake GPU

# A BAR of 128 GiB lies beyond TCG's 40 bits.
CPU = "phys-bits=46"
# Interrupts are remapped, and the devices of other programs told of what the kernel maps (caching-mode).
VTD = "intel-iommu,intremap=on,caching-mode=on,device-iotlb=on"
# Slots are plugged natively, as a server's are: not by QEMU's ACPI, which covers the first root bus only.
NATIVE = ("-global", "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off")
# On a busy machine the timer's interrupt is late, and taken for one that does not come through the IOMMU.
CMDLINE = "intel_iommu=on pcie_ports=native no_timer_check"


@dataclass(frozen=True, slots=True)
class Function:
    """One of QEMU's devices, or a fake GPU. disk_bytes: of an NVMe. hub: what a network card is wired to."""

    name: str
    driver: str = ""
    options: Mapping[str, object] = field(default_factory=dict)
    gpu: Model | None = None
    disk_bytes: int = 0
    hub: int | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """In one slot; its functions go together."""

    functions: tuple[Function, ...]


@dataclass(frozen=True, slots=True)
class Switch:
    """Each of them below a port of its own. QEMU's has no ACS."""

    below: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class ConventionalBus:
    """Behind a bridge to conventional PCI, where everybody can speak as anybody."""

    functions: tuple[Function, ...]


Slot = Card | Switch | ConventionalBus


@dataclass(frozen=True, slots=True)
class RootBus:
    """Below each of its root ports one slot. node: of a NUMA node's own; the first has none."""

    number: int
    slots: tuple[Slot, ...]
    node: int | None = None


@dataclass(frozen=True, slots=True)
class Topology:
    buses: tuple[RootBus, ...]
    nodes: int = 2
    iommu: str | None = VTD
    cmdline: str = CMDLINE


def h100(name: str) -> Card:
    return Card((Function(name, gpu=H100),))


def edu(name: str) -> Function:
    return Function(name, "edu", {"dma_mask": (1 << 40) - 1})  # 28 bits by itself


def nvme(name: str) -> Card:
    return Card((Function(name, "nvme", {"serial": name}, disk_bytes=256 << 20),))


def igb(name: str) -> Card:
    """Seven VFs at most. All of them are on one wire."""
    return Card((Function(name, "igb", hub=0),))


FIRST_BUS = (
    Card((Function("a6000", gpu=A6000), Function("a6000-audio", gpu=A6000_AUDIO))),
    ConventionalBus((edu("edu1"), edu("edu2"))),
    Card((edu("edu0"),)),
    igb("nic1"),
)
SWITCH = Switch((Card((edu("edu3"),)), nvme("nvme1")))


TOPOLOGIES = {
    "gpu-host": Topology(
        (
            RootBus(0x00, FIRST_BUS),
            RootBus(0x40, (h100("gpu0"), h100("gpu1"), nvme("nvme0"), igb("nic0")), node=0),
            RootBus(0x80, (h100("gpu2"), h100("gpu3"), SWITCH), node=1),
        )
    ),
}


class Wiring:
    """A topology as options of QEMU, with files in directory."""

    def __init__(self, topology: Topology, directory: Path) -> None:
        self.places: dict[str, list[str]] = {}
        self.gpus: dict[str, Model] = {}
        self.options: list[str] = [*NATIVE]
        self._directory = directory
        self._ports = 0
        if topology.iommu is not None:
            self.options += ["-device", topology.iommu]
        for position, bus in enumerate(topology.buses):
            self._root_bus(bus, 0x1F - 1 - position)

    def _root_bus(self, bus: RootBus, slot: int) -> None:
        name, first = "pcie.0", 0x10  # below are the bed's own
        if bus.node is not None:
            name, first = f"node{bus.node}", 0
            self._device("pxb-pcie", "pcie.0", slot, id=name, bus_nr=bus.number, numa_node=bus.node)
        for number, content in enumerate(bus.slots, first):
            port = self._port("pcie-root-port", name, number)
            self._slot(content, port, [f"0000:{bus.number:02x}", f"{number:02x}.0"])

    def _slot(self, slot: Slot, port: str, way: Sequence[str]) -> None:
        match slot:
            case Card(functions):
                for number, function in enumerate(functions):
                    more = {"multifunction": True} if len(functions) > 1 and number == 0 else {}
                    self._function(function, port, f"00.{number}", way, more)
            case ConventionalBus(functions):
                self._device("pcie-pci-bridge", port, 0, id=f"{port}-pci")
                for number, function in enumerate(functions, 1):
                    self._function(function, f"{port}-pci", f"{number:02x}.0", [*way, "00.0"], {})
            case Switch(below):
                self._device("x3130-upstream", port, 0, id=f"{port}-up")
                for number, card in enumerate(below):
                    down = self._port("xio3130-downstream", f"{port}-up", number)
                    self._slot(card, down, [*way, "00.0", f"{number:02x}.0"])

    def _port(self, driver: str, bus: str, slot: int) -> str:
        self._ports += 1
        name = f"port{self._ports}"
        self._device(driver, bus, slot, id=name, chassis=self._ports, slot=self._ports)
        return name

    def _function(
        self, function: Function, bus: str, at: str, way: Sequence[str], more: Mapping[str, object]
    ) -> None:
        self.places[function.name] = [*way, at]
        options = {**function.options, **more}
        driver = function.driver
        if function.gpu is not None:
            self.gpus[function.name] = function.gpu
            driver = "vfio-user-pci"
            options |= {"socket": {"type": "unix", "path": str(self.socket(function.name))}, "rombar": 0}
        if function.disk_bytes:
            disk = self._directory / f"{function.name}.img"
            with disk.open("xb") as file:
                file.truncate(function.disk_bytes)
            self.options += ["-drive", f"if=none,id={function.name}-disk,file={disk},format=raw,cache=unsafe"]
            options["drive"] = f"{function.name}-disk"
        if function.hub is not None:
            self.options += ["-netdev", f"hubport,id={function.name}-wire,hubid={function.hub}"]
            options["netdev"] = f"{function.name}-wire"
        self._device(driver, bus, at, id=function.name, **options)

    def _device(self, driver: str, bus: str, at: int | str, **options: object) -> None:
        address = at if isinstance(at, str) else f"{at:02x}.0"
        self.options += ["-device", json.dumps({"driver": driver, "bus": bus, "addr": address} | options)]

    def socket(self, name: str) -> Path:
        return self._directory / f"{name}.sock"


@contextmanager
def plugged(topology: Topology, exchange: Path) -> Iterator[list[str]]:
    """QEMU's options, as long as the devices that are not QEMU's are served."""
    wiring = Wiring(topology, exchange)
    (exchange / PLACES).write_text(json.dumps(wiring.places))
    (exchange / GAUGES).mkdir()
    with ExitStack() as stack:
        for name, model in wiring.gpus.items():
            gauges = stack.enter_context(Gauges(exchange / GAUGES / name))
            stack.enter_context(Server(wiring.socket(name), FakeGpu(model, gauges)))
        yield wiring.options


def memory(nodes: int, cpus: int, memory_mib: int) -> list[str]:
    """QEMU's options: as many NUMA nodes, of memory that other programs can be given."""
    options = []
    for node in range(nodes):
        first, last = cpus * node // nodes, cpus * (node + 1) // nodes - 1
        size = f"size={memory_mib // nodes}M"
        options += ["-object", f"memory-backend-memfd,id=ram{node},{size},share=on"]
        options += ["-numa", f"node,nodeid={node},cpus={first}-{last},memdev=ram{node}"]
    return options
