"""Hosts of the library as trees: what is below one switch is there, and every device once."""

from collections.abc import Iterator

from tests.unit.vfio.conftest import Machine
from tests.unit.vfio.hosts import at
from vfio import inventory
from vfio.topology import BRIDGE, DEVICE, UNKNOWN, Branch, tree


def devices(branches: list[Branch]) -> Iterator[Branch]:
    for branch in branches:
        if branch.what == DEVICE:
            yield branch
        yield from devices(branch.below)


def test_every_device_is_there_once_and_on_its_node(machine: Machine) -> None:
    for name in ("dgx-h100", "hgx-b200", "mi300x", "workstation", "laptop", "no-iommu"):
        found = inventory.read(str(machine(name).sys))
        shown = [each.address for each in found.devices]
        nodes = tree(found, shown)
        for node, branches in nodes.items():
            assert {found.functions[each.address].numa_node for each in devices(branches)} == {node}
        drawn = [each.address for branches in nodes.values() for each in devices(branches)]
        assert sorted(drawn) == sorted(shown)


def test_a_gpu_and_the_card_beside_it_are_below_one_switch(machine: Machine) -> None:
    found = inventory.read(str(machine("dgx-h100").sys))
    nodes = tree(found, [at("1b:00.0"), at("1c:00.0"), at("43:00.0"), at("9d:00.0")])
    assert list(nodes) == [0, 1]
    first, second = nodes[0]
    assert [first.what, first.below[0].what] == ["root port", "switch"]
    assert [each.address for each in first.below[0].below] == [at("1b:00.0"), at("1c:00.0")]
    assert [each.address for each in devices([second])] == [at("43:00.0")]


def test_vfs_are_below_their_function_if_that_is_shown(machine: Machine) -> None:
    found = inventory.read(str(machine("dgx-h100").sys))
    physical = found.functions[at("1c:00.0")]
    assert len(physical.vfs) == 4
    (branch,) = [each for each in devices(tree(found, [physical.address, *physical.vfs])[0]) if each.below]
    assert [each.address for each in branch.below] == list(physical.vfs)
    alone = [each.address for each in devices(tree(found, physical.vfs)[0])]
    assert alone == list(physical.vfs)


def test_a_switch_in_a_package_is_below_the_one_on_the_board(machine: Machine) -> None:
    found = inventory.read(str(machine("mi300x").sys))
    gpu = next(each for each in found.devices if each.vendor_id == 0x1002)
    (port,) = tree(found, [gpu.address])[gpu.numa_node]
    inner = port.below[0].below[0]
    assert [port.what, port.below[0].what, inner.what] == ["root port", "switch", "switch"]
    assert [each.address for each in inner.below] == [gpu.address]


def test_ports_that_cannot_be_read_and_those_of_conventional_pci(machine: Machine) -> None:
    found = inventory.read(str(machine("workstation").sys))
    device = found.functions[at("01:00.0")]
    port = machine("workstation").nodes[device.path[0]].directory / "config"
    whole = port.read_bytes()
    try:
        port.write_bytes(whole[:64])
        (branch,) = tree(inventory.read(str(machine("workstation").sys)), [device.address])[0]
        assert branch.what == UNKNOWN
        port.write_bytes(whole[:0x78] + b"\x09" + whole[0x79:])  # a capability, but not PCI Express
        (branch,) = tree(inventory.read(str(machine("workstation").sys)), [device.address])[0]
        assert branch.what == BRIDGE
    finally:
        port.write_bytes(whole)
