"""What the ledger chooses from, on hosts of the library; and that a choice there is what one would expect."""

from pathlib import Path

from tests.unit.vfio.conftest import Machine
from tests.unit.vfio.hosts import at
from vfio.inventory import Inventory, read
from vfio.ledger.choice import ranked
from vfio.ledger.demand import HostNode, Pages, Request, Same, Wanted
from vfio.names import PciNames
from vfio.offer import candidate, nodes, offer


def inventory(machine: Machine, name: str) -> Inventory:
    return read(str(machine(name).sys), PciNames())


def test_gpus_of_a_dgx_are_below_their_switches_and_nodes(machine: Machine) -> None:
    found = inventory(machine, "dgx-h100")
    gpus = [c for c in offer(found).candidates if c.kind == "gpu" and c.vendor == 0x10DE]
    assert len(gpus) == 8
    assert {c.node for c in gpus} == {0, 1}
    for gpu in gpus:
        assert gpu.switch is not None
        assert gpu.switch in found.functions[gpu.address].path


def test_a_choice_on_a_dgx_is_on_one_node_and_leaves_the_other_whole(machine: Machine) -> None:
    host = offer(inventory(machine, "dgx-h100"))
    wanted = Wanted((Request(4, kind="gpu", vendor=0x10DE, same=Same.NODE),))
    first = ranked(wanted, host, set())[0]
    second = ranked(wanted, host, first.addresses)[0]
    assert {c.node for c in first.devices} == {0}
    assert {c.node for c in second.devices} == {1}
    assert ranked(wanted, host, first.addresses | second.addresses) == []


def test_a_network_card_below_the_gpus_switch(machine: Machine) -> None:
    host = offer(inventory(machine, "dgx-h100"))
    wanted = Wanted((Request(kind="gpu", vendor=0x10DE), Request(kind="nic")), same=Same.SWITCH)
    gpu, nic = ranked(wanted, host, set())[0].devices
    assert gpu.switch == nic.switch is not None


def test_a_cards_audio_comes_along_and_bridges_do_not(machine: Machine) -> None:
    found = inventory(machine, "workstation")
    gpu = next(each for each in found.devices if each.kind.value == "gpu" and found.siblings(each.address))
    assert candidate(found, gpu).companions == frozenset(found.siblings(gpu.address))
    skipped = {each.address for each in found.skipped}
    for name in ("workstation", "laptop", "dgx-h100"):
        again = inventory(machine, name) if name != "workstation" else found
        skipped = {each.address for each in again.skipped}
        assert all(not c.companions & skipped for c in offer(again).candidates)


def test_what_is_refused_takes_along_what_goes_with_it(machine: Machine) -> None:
    found = inventory(machine, "workstation")
    gpu = next(each for each in found.devices if each.kind.value == "gpu" and found.siblings(each.address))
    (audio,) = found.siblings(gpu.address)
    left = {c.address for c in offer(found, refused={audio}).candidates}
    assert gpu.address not in left
    assert audio not in left
    assert left == {c.address for c in offer(found).candidates} - {gpu.address, audio}


def test_nodes_have_whole_cores_and_huge_pages(tmp_path: Path) -> None:
    def put(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    put("devices/system/node/online", "0-1\n")
    put("devices/system/node/node0/cpulist", "0-1,4-5\n")
    put("devices/system/node/node1/cpulist", "2-3\n")
    for cpu, threads in ((0, "0,4"), (1, "1,5"), (4, "0,4"), (5, "1,5"), (2, "2")):
        put(f"devices/system/cpu/cpu{cpu}/topology/core_cpus_list", f"{threads}\n")
    put("devices/system/cpu/cpu3/topology/thread_siblings_list", "3\n")  # before Linux 5.2
    for name, count in (("nr", 8), ("free", 5)):
        put(f"devices/system/node/node0/hugepages/hugepages-2048kB/{name}_hugepages", f"{count}\n")
    assert list(nodes(str(tmp_path))) == [
        HostNode(0, ((0, 4), (1, 5)), {2 << 20: Pages(8, 5)}),
        HostNode(1, ((2,), (3,)), {}),
    ]
    assert next(nodes(str(tmp_path), {5})).cores == ((0, 4),)


def test_this_machine_has_nodes_or_none() -> None:
    for node in nodes():
        assert all(core for core in node.cores)


def test_addresses_are_the_inventorys(machine: Machine) -> None:
    found = inventory(machine, "laptop")
    assert [c.address for c in offer(found).candidates] == [each.address for each in found.devices]
    assert at("00:00.0") not in {c.address for c in offer(found).candidates}  # the host bridge
