"""Where in a machine the host's devices are: each card behind a PCIe root port of its own.

Where a guest has several NUMA nodes, the ports of devices of one are on a root bus of that node's (pxb-pcie);
all others are on the first one. Pure.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rpc.errors import ResourceExhausted
from shim.vm.backing import Backing
from shim.vm.domain import Expander, HostDevice, RootPort
from shim.vm.passthrough import Function

# Beyond the ports that every machine has, eight to a slot. Slots 0 and 31 are q35's own; expanders have the
# last ones.
FIRST_SLOT, LAST_SLOT, TO_A_SLOT = 6, 30, 8
MOST_BUSES = 256


@dataclass(frozen=True, slots=True)
class Layout:
    """ports: by Function.port. roots: of each, the guest's number of the bus that it is on. last_bus: below
    the first root bus, where all ports are counted from left to right."""

    expanders: tuple[Expander, ...]
    ports: tuple[RootPort, ...]
    roots: tuple[int, ...]
    last_bus: int

    @property
    def addresses(self) -> list[str]:
        """The ports as the guest's kernel finds them: bus:slot.function."""
        return [
            f"{root:02x}:{port.slot:02x}.{port.function}"
            for root, port in zip(self.roots, self.ports, strict=True)
        ]


def host_devices(functions: Iterable[Function], places: Layout, *, iommufd: bool) -> Iterator[HostDevice]:
    for each in functions:
        yield HostDevice(each.address, places.ports[each.port].bus, each.function, each.several, iommufd)


def has_expanders(functions: Iterable[Function], backing: Backing | None) -> bool:
    return any(_cell_of(each, backing) is not None for each in functions)


def _cell_of(function: Function, backing: Backing | None) -> int | None:
    """Whose root bus it is to be on. Of one node there is none: it would take another firmware, which has
    each BAR mapped for DMA again and again (docs/gpus.md)."""
    return backing.cell_of(function.node) if backing is not None and len(backing.cells) > 1 else None


def layout(functions: Sequence[Function], backing: Backing | None, taken_buses: int) -> Layout:
    """taken_buses: the highest number that the machine has without devices. Raises ResourceExhausted."""
    cells: dict[int, int | None] = {}
    for each in functions:
        cells.setdefault(each.port, _cell_of(each, backing))
    on_first = [port for port, cell in cells.items() if cell is None]
    last_bus = taken_buses + len(on_first)
    # libvirt wants its own numbers of buses to be without gaps, the parent's before the child's.
    expanders: list[Expander] = []
    ports: dict[int, RootPort] = {}
    roots: dict[int, int] = {}
    index, number = taken_buses + 1, last_bus + 1
    for place, port in enumerate(sorted(on_first)):
        ports[port] = _port(index, place, len(on_first), FIRST_SLOT, 0)
        roots[port] = 0
        index += 1
    for cell in sorted({cell for cell in cells.values() if cell is not None}):
        here = sorted(port for port, its in cells.items() if its == cell)
        slot = LAST_SLOT - len(expanders)
        expanders.append(Expander(index, number, slot, cell))
        parent, root = index, number
        index, number = index + 1, number + 1 + len(here)
        for place, port in enumerate(here):
            ports[port] = _port(index, place, len(here), 0, parent)
            roots[port] = root
            index += 1
    slots = TO_A_SLOT * (LAST_SLOT + 1 - FIRST_SLOT - len(expanders))
    if len(on_first) > slots or number > MOST_BUSES:
        room = slots if len(on_first) > slots else MOST_BUSES - 1 - taken_buses - len(expanders)
        raise ResourceExhausted(f"{len(ports)} devices: a machine has room for {room}")
    order = sorted(ports)
    return Layout(
        tuple(expanders), tuple(ports[port] for port in order), tuple(roots[port] for port in order), last_bus
    )


def _port(index: int, place: int, count: int, first_slot: int, parent: int) -> RootPort:
    shares = count > place - place % TO_A_SLOT + 1
    return RootPort(index, first_slot + place // TO_A_SLOT, place % TO_A_SLOT, shares, parent)
