"""Functions go to vfio-pci and back, all or none, and nothing is written that the ledger does not know of."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpc.errors import DeadlineExceeded, FailedPrecondition, NotFound
from tests.unit.vfio.hosts import OWNER, POD, at, gpu
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.trees import MEM64, Model, Tree
from vfio import writing
from vfio.binding import Bus, Node
from vfio.condition import Condition
from vfio.ledger.demand import Host, Request, Wanted
from vfio.ledger.ledger import Ledger

GPU = Model("10de:2330", 0x030200, bars={0: (1 << 24, MEM64)}, driver="nvidia")
AUDIO = Model("10de:22be", 0x040300, driver="snd_hda_intel")
BARE = Model("10de:2330", 0x030200)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """00:00.0 a GPU with audio at 00:00.1; 00:01.0 a GPU without a driver."""
    tree = Tree(tmp_path / "host")
    bus = tree.root_bus(0, 0)
    tree.function(bus, GPU, slot=0, multifunction=True, group=7)
    tree.function(bus, AUDIO, slot=0, function=1, group=7)
    tree.function(bus, BARE, slot=1, group=8)
    return Kernel(tree)


ONE, SOUND, TWO = at("00:00.0"), at("00:00.1"), at("00:01.0")
HOST = Host((gpu("00:00.0", companions=("00:00.1",)), gpu("00:01.0")))


@pytest.fixture
def ledger(in_memory: Path) -> Iterator[Ledger]:
    with Ledger(in_memory / "ledger") as ledger:
        yield ledger


@pytest.fixture
def bus(kernel: Kernel) -> Bus:
    return Bus(str(kernel.tree.sys), write=kernel.write)


def claimed(ledger: Ledger) -> int:
    return ledger.claim(POD, OWNER, Wanted((Request(2),)), HOST).id


def test_all_functions_have_vfio_and_it_is_written_down_how_they_were(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    claim = claimed(ledger)
    nodes = bus.bind(ledger, claim, ledger.get(claim).addresses)
    assert nodes == (Node(ONE, 7, "vfio1"), Node(SOUND, 7, "vfio2"), Node(TWO, 8, "vfio3"))
    assert [node.group_path for node in nodes] == ["/dev/vfio/7", "/dev/vfio/7", "/dev/vfio/8"]
    assert nodes[2].cdev_path == "/dev/vfio/devices/vfio3"
    assert set(kernel.state().values()) == {("vfio-pci", "vfio-pci")}
    written = {b.address: (b.driver, b.override) for b in ledger.bindings(claim)}
    assert written == {ONE: ("nvidia", ""), SOUND: ("snd_hda_intel", ""), TWO: ("", "")}
    condition = Condition.from_text(ledger.bindings(claim)[0].condition)
    assert (condition.header[:4], condition.lanes, condition.speed) == (b"\xde\x10\x30\x23", 16, 32.0)


def test_back_to_the_driver_that_had_it_or_to_none(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    before = kernel.state()
    claim = claimed(ledger)
    bus.bind(ledger, claim, (ONE, SOUND, TWO))
    for binding in ledger.bindings():
        bus.restore(binding)
    assert kernel.state() == before
    kernel.written.clear()
    for binding in ledger.bindings():
        bus.restore(binding)  # what is as it was is not written to
    assert kernel.written == []


def test_what_is_bound_already_is_left_alone(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    claim = claimed(ledger)
    first = bus.bind(ledger, claim, (ONE, TWO))
    kernel.written.clear()
    assert bus.bind(ledger, claim, (ONE, TWO)) == first
    assert kernel.written == []
    assert ledger.bindings()[0].driver == "nvidia"


def test_a_function_that_the_host_had_given_to_vfio_stays_there(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    for name, value in (("driver_override", "vfio-pci\n"),):
        kernel.write(str(kernel.at(TWO, name)), value, 1)
    kernel.write(f"{kernel.tree.sys}/bus/pci/drivers/vfio-pci/bind", str(TWO), 1)
    bus.bind(ledger, claimed(ledger), (TWO,))
    (binding,) = ledger.bindings()
    bus.restore(binding)
    assert kernel.state()[str(TWO)] == ("vfio-pci", "vfio-pci")


@pytest.mark.parametrize("refused", ["00:01.0/driver_override", "00:00.1/driver/unbind", "vfio-pci/bind"])
def test_one_that_is_refused_leaves_all_as_they_were(
    kernel: Kernel, bus: Bus, ledger: Ledger, refused: str
) -> None:
    before = kernel.state()
    claim = claimed(ledger)
    kernel.refused[refused] = errno.EBUSY
    with pytest.raises(FailedPrecondition, match=r"cannot go from .* to vfio-pci") as raised:
        bus.bind(ledger, claim, (ONE, SOUND, TWO))
    assert "Device or resource busy" in str(raised.value.details)
    assert kernel.state() == before
    assert ledger.bindings() == []
    assert ledger.release(claim, OWNER) == ()  # nobody had them: nothing is to be reset


def test_what_cannot_be_given_back_after_a_failure_is_not_forgotten(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    claim = claimed(ledger)
    kernel.refused["00:01.0/driver_override"] = errno.EBUSY
    kernel.refused["nvidia/bind"] = errno.ENOMEM
    with pytest.raises(FailedPrecondition, match=f"device {TWO}"):
        bus.bind(ledger, claim, (ONE, SOUND, TWO))
    assert [binding.address for binding in ledger.bindings()] == [ONE]
    assert ledger.release(claim, OWNER) == (ONE,)


def test_a_driver_of_which_the_kernel_says_it_took_it_and_it_did_not(kernel: Kernel, ledger: Ledger) -> None:
    def write(path: str, value: str, timeout_s: float) -> None:
        if not path.endswith("vfio-pci/bind"):
            kernel.write(path, value, timeout_s)

    with pytest.raises(FailedPrecondition, match="has no driver now, and should have vfio-pci"):
        Bus(str(kernel.tree.sys), write=write).bind(ledger, claimed(ledger), (ONE,))
    assert kernel.driver(ONE) == "nvidia"


def test_without_vfio_without_a_group_without_an_answer_without_a_device(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    before = kernel.state()
    claim = claimed(ledger)
    kernel.at(TWO, "iommu_group").unlink()
    with pytest.raises(FailedPrecondition, match="no IOMMU group"):
        bus.bind(ledger, claim, (ONE, SOUND, TWO))
    kernel.not_answering(TWO)
    with pytest.raises(FailedPrecondition, match="does not answer"):
        bus.bind(ledger, claim, (ONE, TWO))
    with pytest.raises(NotFound, match=r"0000:09:00\.0 is not there"):
        bus.bind(ledger, claim, (ONE, at("09:00.0")))
    (kernel.tree.sys / "bus/pci/drivers/vfio-pci").rmdir()
    with pytest.raises(FailedPrecondition, match="no driver vfio-pci"):
        bus.bind(ledger, claim, (ONE,))
    assert kernel.state() == before
    assert ledger.bindings() == []


def test_one_that_vanished_counts_as_restored(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    bus.bind(ledger, claimed(ledger), (ONE,))
    kernel.tree.remove(kernel.tree.nodes[ONE])
    (binding,) = ledger.bindings()
    bus.restore(binding)


def test_a_driver_whose_module_was_removed_has_it_when_it_is_loaded(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    bus.bind(ledger, claimed(ledger), (ONE,))
    (kernel.tree.sys / "bus/pci/drivers/nvidia").rmdir()
    (binding,) = ledger.bindings()
    bus.restore(binding)
    assert kernel.state()[str(ONE)] == ("", "(null)")


def test_killed_before_every_write_the_ledger_knows_how_they_were(kernel: Kernel, in_memory: Path) -> None:
    before = kernel.state()
    step, killed = 0, True
    while killed:
        step += 1
        with Ledger(in_memory / str(step)) as ledger:
            claim = claimed(ledger)

        def work(step: int = step, claim: int = claim) -> None:
            with Ledger(in_memory / str(step)) as ledger:
                Bus(str(kernel.tree.sys), write=kernel.write).bind(ledger, claim, (ONE, SOUND, TWO))

        killed = kernel.kills(work, step)
        with Ledger(in_memory / str(step)) as ledger:
            for binding in ledger.bindings(claim):
                Bus(str(kernel.tree.sys), write=kernel.write).restore(binding)
        assert kernel.state() == before
    assert step == 9  # override, unbind, bind of two; override, bind of the third; and once not killed


# --- writing itself ---


def test_a_value_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writing.write(str(tmp_path / "file"), "0000:01:00.0", 5)
    assert (tmp_path / "file").read_text() == "0000:01:00.0"


def test_the_kernels_answer_is_an_error_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        writing.write(str(tmp_path / "none"), "x", 5)
    assert raised.value.filename == str(tmp_path / "none")


def test_a_kernel_that_does_not_come_back_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "reset"
    os.mkfifo(fifo)
    with pytest.raises(DeadlineExceeded, match="the kernel was not done"):
        writing.write(str(fifo), "1", 0.05)
    assert fifo.read_text() == "1"  # the thread ends, as it would in the kernel
