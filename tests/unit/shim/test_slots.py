"""Where devices are in a machine: behind ports of their own, on a root bus of their NUMA node."""

from dataclasses import replace

import pytest

from rpc.errors import ResourceExhausted
from shim.vm.backing import Backing, Cell
from shim.vm.designer import LAST_BUS
from shim.vm.domain import Expander, RootPort
from shim.vm.passthrough import Function
from shim.vm.slots import has_expanders, layout

GPU = Function("0000:3b:00.0", "10de H100", "gpu", 12, "vfio3", 0, 0)
TWO_NODES = Backing(cells=(Cell(0, 1 << 27), Cell(3, 1 << 27)))


def at(*nodes: int | None) -> list[Function]:
    return [replace(GPU, port=port, node=node) for port, node in enumerate(nodes)]


def test_without_nodes_ports_are_on_the_first_bus_eight_to_a_slot() -> None:
    found = layout(at(*[None] * 9), None, LAST_BUS)
    assert found.expanders == ()
    assert found.addresses == [*(f"00:06.{function}" for function in range(8)), "00:07.0"]
    assert [port.bus for port in found.ports] == list(range(6, 15))
    assert [port.shares_slot for port in found.ports] == [True] * 8 + [False]
    assert found.last_bus == LAST_BUS + 9
    assert layout(at(0), None, LAST_BUS).expanders == layout(at(7), TWO_NODES, LAST_BUS).expanders == ()


def test_of_one_node_there_is_no_root_bus_of_its_own() -> None:
    one = Backing(cells=(Cell(1, 1 << 27),))
    assert layout(at(1), one, LAST_BUS) == layout(at(None), None, LAST_BUS)
    assert not has_expanders(at(1), one)


def test_each_node_has_a_root_bus_with_its_ports() -> None:
    """Numbers in the guest leave room for the buses of what is before, and libvirt's have no gaps."""
    found = layout(at(3, 0, None, 3), TWO_NODES, LAST_BUS)
    assert found.last_bus == 6
    assert found.expanders == (Expander(7, 7, 30, 0), Expander(9, 9, 29, 1))
    assert found.ports == (
        RootPort(10, 0, 0, shares_slot=True, parent=9),
        RootPort(8, 0, 0, parent=7),
        RootPort(6, 6, 0),
        RootPort(11, 0, 1, shares_slot=True, parent=9),
    )
    assert found.addresses == ["09:00.0", "07:00.0", "00:06.0", "09:00.1"]


def test_the_functions_of_a_card_are_behind_one_port() -> None:
    card = [replace(GPU, node=0, several=True), replace(GPU, node=0, function=1, several=True)]
    assert layout(card, TWO_NODES, LAST_BUS).addresses == ["06:00.0"]


def test_a_firmware_that_knows_them_is_needed_where_there_are_such_buses() -> None:
    assert has_expanders(at(None, 0), TWO_NODES)
    assert not has_expanders(at(None, 1), TWO_NODES)
    assert not has_expanders(at(0), None)


@pytest.mark.parametrize(("nodes", "room"), [([None] * 201, 200), ([0] * 250, 249)])
def test_there_is_an_end_of_slots_and_of_buses(nodes: list[int | None], room: int) -> None:
    with pytest.raises(ResourceExhausted, match=f"{len(nodes)} devices: a machine has room for {room}"):
        layout(at(*nodes), TWO_NODES, LAST_BUS)
