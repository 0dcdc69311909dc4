"""What an operator does to free devices: bound ahead, given back, reset; never what somebody uses."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.load import load
from rpc.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from tests.unit.vfio.claimers import check, is_alive, myself
from tests.unit.vfio.hosts import OTHER, at
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.trees import MEM64, ROOT_PORT, Acs, Model, Tree
from vfio import inventory
from vfio.ahead import Operator, Reset
from vfio.binding import Bus
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import HOST, Cause, Pod, State
from vfio.offer import offer
from vfio.release import Release

GPU = Model("10de:2330", 0x030200, bars={0: (1 << 24, MEM64)}, driver="nvidia")
AUDIO = Model("10de:22be", 0x040300, driver="snd_hda_intel")
DISK = Model("144d:a824", 0x010802, bars={0: (1 << 15, MEM64)}, driver="nvme")
PORT = Model("8086:352a", 0x060400, driver="pcieport")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """01:00.0 a GPU with audio at 01:00.1; 02:00.0 another GPU; 03:00.0 a disk, mounted."""
    tree = Tree(tmp_path / "host")
    bus = tree.root_bus(0, 0)
    ports = [tree.bridge(bus, PORT, ROOT_PORT, acs=Acs()) for _ in range(3)]
    group = tree.new_group()
    tree.function(ports[0], GPU, slot=0, multifunction=True, group=group)
    tree.function(ports[0], AUDIO, slot=0, function=1, group=group)
    tree.function(ports[1], GPU)
    disk = tree.function(ports[2], DISK)
    tree.mounts(("259:1", "/dev/nvme0n1p1", "/data"))
    tree.nvme(disk, 0, 1)
    return tree


CARD, SOUND, SECOND, MOUNTED = at("01:00.0"), at("01:00.1"), at("02:00.0"), at("03:00.0")
NVIDIA, VFIO = ("nvidia", "(null)"), ("vfio-pci", "vfio-pci")


@pytest.fixture
def kernel(tree: Tree) -> Kernel:
    return Kernel(tree)


@pytest.fixture
def ledger(in_memory: Path) -> Iterator[Ledger]:
    with Ledger(in_memory / "ledger", actor="casemate gpu, the test") as ledger:
        yield ledger


@pytest.fixture
def operator(kernel: Kernel, ledger: Ledger) -> Operator:
    return operator_of(kernel, ledger)


def operator_of(kernel: Kernel, ledger: Ledger) -> Operator:
    bus = Bus(str(kernel.tree.sys), write=kernel.write)
    return Operator(load(), ledger, myself(), bus, str(kernel.tree.proc))


def pod_claims(kernel: Kernel, ledger: Ledger, *addresses: str) -> int:
    """A claim as a shim makes it, up to a machine."""
    host = offer(inventory.read(str(kernel.tree.sys)), sys=str(kernel.tree.sys))
    claim = ledger.claim(OTHER, myself(), Wanted((Request.at(*map(at, addresses)),)), host)
    Bus(str(kernel.tree.sys), write=kernel.write).bind(ledger, claim.id, claim.addresses)
    ledger.use(claim.id)
    return claim.id


def states(ledger: Ledger) -> set[State]:
    return {device.state for device in ledger.devices()}


def test_bound_ahead_with_all_that_goes_with_it_and_free(
    kernel: Kernel, operator: Operator, ledger: Ledger
) -> None:
    changes = operator.bind([CARD])
    assert [(each.address, each.before, each.after) for each in changes] == [
        (CARD, "nvidia", "vfio-pci"),
        (SOUND, "snd_hda_intel", "vfio-pci"),
    ]
    assert {each.node.group_path for each in changes if each.node} == {
        f"/dev/vfio/{kernel.at(CARD, 'iommu_group').readlink().name}"
    }
    assert kernel.state()[str(SECOND)] == NVIDIA
    assert states(ledger) == {State.FREE}
    assert (ledger.claims(), ledger.bindings()) == ([], [])
    log = [(entry.cause, entry.detail, entry.actor) for entry in ledger.log(CARD) if entry.after is None]
    assert log == [
        (Cause.BIND, "from nvidia", "casemate gpu, the test"),
        (Cause.KEEP, "with vfio-pci", "casemate gpu, the test"),
    ]
    check(ledger)


def test_a_pod_leaves_what_was_bound_ahead_at_vfio(
    kernel: Kernel, operator: Operator, ledger: Ledger
) -> None:
    operator.bind([CARD])
    before = kernel.state()
    claim = pod_claims(kernel, ledger, "01:00.0", "02:00.0")
    bus = Bus(str(kernel.tree.sys), write=kernel.write)
    assert Release(bus, ledger).give_back(ledger.release(claim, myself())) == {}
    assert {address for address, _ in kernel.resets} == {str(CARD), str(SOUND), str(SECOND)}
    assert kernel.state() == before
    assert kernel.state()[str(CARD)] == VFIO
    assert kernel.state()[str(SECOND)] == NVIDIA
    assert states(ledger) == {State.FREE}
    check(ledger)


def test_unbound_to_the_drivers_that_take_them(kernel: Kernel, operator: Operator, ledger: Ledger) -> None:
    before = kernel.state()
    operator.bind([CARD])
    changes = operator.unbind([SOUND])  # the card goes with it
    assert [(each.address, each.before, each.after) for each in changes] == [
        (CARD, "vfio-pci", "nvidia"),
        (SOUND, "vfio-pci", "snd_hda_intel"),
    ]
    assert kernel.state() == before
    assert states(ledger) == {State.FREE}
    assert [e.detail for e in ledger.log(CARD) if e.cause is Cause.RESTORE] == ["to nvidia"]
    kernel.written.clear()
    assert [each.after for each in operator.unbind([CARD])] == ["nvidia", "snd_hda_intel"]
    assert kernel.written == []  # what a driver of the host's has is left alone


def test_a_driver_that_is_not_loaded_takes_it_when_it_is(
    kernel: Kernel, operator: Operator, ledger: Ledger
) -> None:
    operator.bind([SECOND])
    (kernel.tree.sys / "bus/pci/drivers/nvidia/.keep").unlink(missing_ok=True)
    (kernel.tree.sys / "bus/pci/drivers/nvidia").rmdir()
    (change,) = operator.unbind([SECOND])
    assert (change.before, change.after) == ("vfio-pci", "")
    assert kernel.state()[str(SECOND)] == ("", "(null)")
    (kernel.tree.sys / "bus/pci/drivers/nvidia").mkdir()
    (change,) = operator.unbind([SECOND])
    assert (change.before, change.after) == ("", "nvidia")


def test_one_whose_id_vfio_was_told_is_said_to_stay(
    kernel: Kernel, operator: Operator, ledger: Ledger
) -> None:
    operator.bind([SECOND])
    kernel.dynamic_ids.add(SECOND)
    with pytest.raises(FailedPrecondition, match="vfio-pci takes it again"):
        operator.unbind([SECOND])
    assert states(ledger) == {State.FREE}


@pytest.mark.parametrize("what", ["bind", "unbind", "reset"])
def test_what_a_pod_has_is_refused_with_its_name(
    kernel: Kernel, operator: Operator, ledger: Ledger, what: str
) -> None:
    pod_claims(kernel, ledger, "01:00.1")
    before = kernel.state()
    with pytest.raises(ResourceExhausted, match=f"not free: {CARD}") as raised:
        operator.reset(CARD) if what == "reset" else getattr(operator, what)([CARD])
    assert f"is in use, pod {OTHER}" in str(raised.value.details)
    assert kernel.state() == before
    assert kernel.resets == []


@pytest.mark.parametrize("what", ["bind", "reset"])
def test_a_mounted_disk_is_never_unbound(
    kernel: Kernel, operator: Operator, ledger: Ledger, what: str
) -> None:
    with pytest.raises(FailedPrecondition, match="disk-in-use") as raised:
        operator.reset(MOUNTED) if what == "reset" else operator.bind([SECOND, MOUNTED])
    assert "/dev/nvme0n1p1 is mounted at /data" in str(raised.value.details)
    assert kernel.written == []
    assert states(ledger) == {State.FREE}
    assert ledger.claims() == []


def test_what_somebody_has_open_is_not_unbound(kernel: Kernel, operator: Operator, ledger: Ledger) -> None:
    (change, _) = operator.bind([CARD])
    assert change.node is not None
    kernel.tree.process(77, "qemu", change.node.group_path)
    kernel.written.clear()
    with pytest.raises(FailedPrecondition, match="is not unbound: open-handles") as raised:
        operator.unbind([CARD])
    assert "qemu (77)" in str(raised.value.details)
    assert kernel.written == []


def test_a_bridge_is_no_device(operator: Operator) -> None:
    with pytest.raises(InvalidArgument, match="is not for pods"):
        operator.bind([at("00:00.0")])


def test_one_that_the_kernel_refuses_leaves_all_as_they_were(
    kernel: Kernel, operator: Operator, ledger: Ledger
) -> None:
    before = kernel.state()
    kernel.refused["02:00.0/driver/unbind"] = errno.EBUSY
    with pytest.raises(FailedPrecondition, match="cannot go from nvidia to vfio-pci"):
        operator.bind([CARD, SECOND])
    assert kernel.state() == before
    assert states(ledger) == {State.FREE}
    assert ledger.bindings() == []


def test_reset_and_as_it_was(kernel: Kernel, operator: Operator, ledger: Ledger) -> None:
    before = kernel.state()
    assert [(each.address, each.done.split()[0], each.failed) for each in operator.reset(CARD)] == [
        (CARD, "bus", ""),
        (SOUND, "bus", ""),
    ]
    assert kernel.state() == before
    assert states(ledger) == {State.FREE}
    operator.bind([SECOND])
    (done,) = operator.reset(SECOND)
    assert done.failed == ""
    assert kernel.state()[str(SECOND)] == VFIO


def test_one_that_is_not_as_it_was_is_quarantined(kernel: Kernel, operator: Operator, ledger: Ledger) -> None:
    kernel.effects["bus"] = kernel.effects["flr"] = kernel.losing_a_bar
    (done,) = operator.reset(SECOND)
    assert isinstance(done, Reset)
    assert "BAR 0 0xdead0000" in done.failed
    device = ledger.device(SECOND)
    assert (device.state, device.reason) == (State.QUARANTINED, done.failed)
    with pytest.raises(ResourceExhausted, match="not free"):
        operator.bind([SECOND])


def test_one_that_cannot_be_reset_is_refused_and_not_quarantined(
    kernel: Kernel, operator: Operator, ledger: Ledger
) -> None:
    kernel.at(SECOND, "reset_method").write_text("\n")
    with pytest.raises(FailedPrecondition, match="is not reset: no-reset"):
        operator.reset(SECOND)
    assert states(ledger) == {State.FREE}


def test_what_was_used_is_not_kept_without_a_reset(kernel: Kernel, ledger: Ledger) -> None:
    claim = pod_claims(kernel, ledger, "02:00.0")
    with pytest.raises(FailedPrecondition, match="is in use, and to be reset first"):
        ledger.keep(claim, {SECOND: "vfio-pci"})
    assert len(ledger.bindings()) == 1
    ledger.release(claim, myself())
    with pytest.raises(FailedPrecondition, match="was released"):
        ledger.keep(claim, {SECOND: "vfio-pci"})


@pytest.mark.parametrize("what", ["bind", "unbind"])
def test_killed_before_every_write_gc_leaves_it_free_and_whole(
    kernel: Kernel, in_memory: Path, what: str
) -> None:
    """bind: as it was. unbind: no driver of the host's loses it again; who asks again has it done."""
    native = kernel.state()
    step, killed = 0, True
    while killed:
        step += 1
        with Ledger(in_memory / str(step)) as ledger:
            if what == "unbind":
                operator_of(kernel, ledger).bind([CARD])

        def work(step: int = step) -> None:
            with Ledger(in_memory / str(step)) as ledger:
                getattr(operator_of(kernel, ledger), what)([CARD])

        killed = kernel.kills(work, step)
        with Ledger(in_memory / str(step)) as ledger:
            assert bool(ledger.claims()) == killed
            bus = Bus(str(kernel.tree.sys), write=kernel.write)
            half = kernel.state()
            kernel.written.clear()
            assert Release(bus, ledger).give_back(ledger.collect(is_alive, myself()).devices) == {}
            assert states(ledger) == {State.FREE}
            check(ledger)
            if what == "unbind":
                assert (kernel.written, kernel.state()) == ([], half)
            elif killed:
                assert kernel.state() == native
            operator_of(kernel, ledger).unbind([CARD])
            assert kernel.state() == native
    assert step == 7  # override, unbind, bind or probe of two functions; and once not killed


def test_an_operators_claim_is_no_pods(kernel: Kernel, operator: Operator, ledger: Ledger) -> None:
    operator.bind([SECOND])
    assert {use.pod.namespace for use in ledger.usage()} == {HOST}
    assert all(use.pod.is_host for use in ledger.usage())
    assert not Pod("k8s.io", "host").is_host
