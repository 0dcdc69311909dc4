"""Reset, compared, scrubbed, given back: a device is free or quarantined afterwards, with the reason."""

import errno
import os
import select
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rpc.errors import DataLoss, DeadlineExceeded
from tests.unit.vfio.claimers import check, is_alive, myself
from tests.unit.vfio.hosts import OTHER, OWNER, POD, WORKER, Clock, at, gpu
from tests.unit.vfio.kernels import Kernel
from tests.unit.vfio.trees import MEM64, Model, Tree
from vfio import reset
from vfio.address import PciAddress
from vfio.binding import Bus
from vfio.condition import Condition, differences, read
from vfio.ledger.demand import Host, Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Cause, IllegalMove, State
from vfio.release import Release
from vfio.scrub import Scrub, ScrubFailed

GPU = Model("10de:2330", 0x030200, bars={0: (1 << 24, MEM64)}, driver="nvidia", resets="flr bus")
VF = Model("8086:1520", 0x020000, driver="igbvf", resets="flr")
STUBBORN = Model("1234:11e8", 0x00FF00, resets="")
ONE, TWO, THREE = at("00:00.0"), at("00:01.0"), at("00:02.0")
HOST = Host((gpu("00:00.0"), gpu("00:01.0"), gpu("00:02.0")))


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    """A GPU, a VF, and a device that cannot be reset."""
    tree = Tree(tmp_path / "host")
    root = tree.root_bus(0, 0)
    for model in (GPU, VF, STUBBORN):
        tree.function(root, model)
    kernel = Kernel(tree)
    kernel.at(ONE, "power").mkdir()
    kernel.at(ONE, "power/control").write_text("auto\n")
    return kernel


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(in_memory: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger(in_memory / "ledger", clock=clock) as ledger:
        yield ledger


@pytest.fixture
def bus(kernel: Kernel) -> Bus:
    return Bus(str(kernel.tree.sys), write=kernel.write)


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Scrub]:
    def make(script: str) -> Scrub:
        path = tmp_path / "scrub"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o700)
        return Scrub(str(path), 10.0)

    return make


def used(bus: Bus, ledger: Ledger, *addresses: PciAddress) -> tuple[PciAddress, ...]:
    """What is to be reset after a pod has had these devices in a machine."""
    claim = ledger.claim(POD, OWNER, Wanted((Request.at(*addresses),)), HOST).id
    bus.bind(ledger, claim, addresses)
    ledger.use(claim)
    return ledger.release(claim, WORKER)


def causes(ledger: Ledger, address: PciAddress) -> list[tuple[str, str]]:
    """What was done to it since it was released."""
    entries = [(e.cause.value, e.detail) for e in ledger.log(address)]
    return entries[3:]  # claimed, bound, in use


def test_reset_compared_given_back_free(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    before = kernel.state()
    assert Release(bus, ledger).give_back(used(bus, ledger, ONE, TWO)) == {}
    assert kernel.resets == [(str(ONE), "bus"), (str(TWO), "flr")] or kernel.resets == [
        (str(TWO), "flr"),
        (str(ONE), "bus"),
    ]
    assert kernel.state() == before
    assert ledger.bindings() == []
    assert {device.state for device in ledger.devices()} == {State.FREE}
    words = [(cause, detail.split()[0] if detail else "") for cause, detail in causes(ledger, ONE)]
    assert words == [("state", ""), ("reset", "bus"), ("restore", "to"), ("state", "")]


def test_the_kernels_order_and_power_management_are_as_they_were(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    awake: list[str] = []
    kernel.effects["bus"] = lambda address: awake.append(bus.read(address, "power/control") or "")
    Release(bus, ledger).give_back(used(bus, ledger, ONE))
    assert bus.read(ONE, "reset_method") == "flr bus"
    assert bus.read(ONE, "power/control") == "auto"
    assert awake == ["on"]


def test_what_slept_when_it_was_bound_has_no_link_to_be_compared(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    """vfio-pci lets devices sleep that nobody uses; the kernel may then read 63 lanes of unknown speed."""
    link = {name: kernel.at(ONE, f"current_link_{name}") for name in ("speed", "width")}
    awake = {name: path.read_text() for name, path in link.items()}
    link["speed"].write_text("Unknown\n")
    link["width"].write_text("63\n")
    addresses = used(bus, ledger, ONE)
    for name, path in link.items():
        path.write_text(awake[name])
    assert Release(bus, ledger).give_back(addresses) == {}


def test_it_is_reset_before_its_driver_sees_it(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    drivers: list[str] = []
    kernel.effects["bus"] = lambda address: drivers.append(kernel.driver(address))
    Release(bus, ledger).give_back(used(bus, ledger, ONE))
    assert drivers == ["vfio-pci"]


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        ("not_answering", "does not answer on the bus"),
        ("losing_a_bar", "BAR 0 0xdead0000, was 0x00000000"),
        ("narrowing", "link of 8 lanes, was 16"),
        ("refusing", "Inappropriate ioctl for device"),
    ],
)
def test_a_reset_that_cannot_be_shown_to_have_worked_is_a_quarantine(
    kernel: Kernel, bus: Bus, ledger: Ledger, effect: str, words: str
) -> None:
    kernel.effects["bus"] = kernel.effects["flr"] = getattr(kernel, effect)
    failed = Release(bus, ledger).give_back(used(bus, ledger, ONE))
    assert words in failed[ONE]
    device = ledger.device(ONE)
    assert (device.state, device.reason) == (State.QUARANTINED, failed[ONE])
    assert kernel.resets == [(str(ONE), "bus"), (str(ONE), "flr")]
    assert kernel.driver(ONE) == "vfio-pci"  # the host's driver does not get it either


def test_the_next_best_method_counts_if_the_best_one_fails(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    kernel.effects["bus"] = kernel.refusing
    assert Release(bus, ledger).give_back(used(bus, ledger, ONE)) == {}
    assert [method for _, method in kernel.resets] == ["bus", "flr"]


def test_a_listed_method_that_the_kernel_does_not_take_is_no_reason_to_fail(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    kernel.unable = {
        "bus"
    }  # as of a card's first function, where the list is from before the others were known
    assert Release(bus, ledger).give_back(used(bus, ledger, ONE)) == {}
    assert [method for _, method in kernel.resets] == ["flr"]
    assert bus.read(ONE, "reset_method") == "flr"


def test_one_fails_and_the_others_are_free(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    failed = Release(bus, ledger).give_back(used(bus, ledger, ONE, TWO, THREE))
    assert list(failed) == [THREE]
    assert "the kernel knows no way to reset it" in failed[THREE]
    assert [d.state for d in ledger.devices()] == [State.FREE, State.FREE, State.QUARANTINED]


def test_before_linux_5_15_the_kernel_chooses(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    kernel.at(ONE, "reset_method").unlink()
    assert reset.methods(bus, ONE, read(bus.root, ONE)) == ("unnamed",)
    assert Release(bus, ledger).give_back(used(bus, ledger, ONE)) == {}
    assert kernel.resets == [(str(ONE), "unnamed")]


def test_a_method_that_nobody_knows_comes_last(kernel: Kernel, bus: Bus) -> None:
    kernel.at(ONE, "reset_method").write_text("pm hypothetical flr bus\n")
    assert reset.methods(bus, ONE, read(bus.root, ONE)) == ("bus", "flr", "pm", "hypothetical")


def test_a_virtual_function_is_never_reset_with_the_card_that_others_have_parts_of(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    kernel.at(ONE, "physfn").symlink_to(kernel.at(TWO))
    assert Release(bus, ledger).give_back(used(bus, ledger, ONE)) == {}
    assert kernel.resets == [(str(ONE), "flr")]


def test_a_reset_that_does_not_end_is_a_quarantine_and_tried_no_other_way(
    kernel: Kernel, ledger: Ledger
) -> None:
    def write(path: str, value: str, timeout_s: float) -> None:
        if path.endswith("/reset"):
            waited.append(timeout_s)
            raise DeadlineExceeded(f"{path}: the kernel was not done after {timeout_s:.0f} s")
        kernel.write(path, value, timeout_s)

    waited: list[float] = []
    slow = Bus(str(kernel.tree.sys), write=write)
    failed = Release(slow, ledger, reset_s=3.0).give_back(used(slow, ledger, ONE))
    assert "not done within 3 s" in failed[ONE]
    assert len(waited) == 1
    assert 0 < waited[0] <= 3.0


def test_a_device_that_vanished_is_a_quarantine(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    left = used(bus, ledger, ONE)
    kernel.tree.remove(kernel.tree.nodes[ONE])
    assert "is not there any more" in Release(bus, ledger).give_back(left)[ONE]


def test_a_driver_that_does_not_take_it_back_is_a_quarantine(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    left = used(bus, ledger, ONE)
    kernel.refused["nvidia/bind"] = errno.ENODEV
    assert "cannot go from vfio-pci to nvidia" in Release(bus, ledger).give_back(left)[ONE]
    kernel.refused.clear()
    assert "cannot go from" in Release(bus, ledger).clear(ONE)
    assert kernel.driver(ONE) == "nvidia"


def test_what_another_driver_took_without_a_reset_is_a_quarantine(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    left = used(bus, ledger, ONE)
    (binding,) = ledger.bindings()
    bus.restore(binding)  # somebody did so by hand
    assert "has driver nvidia, and was not reset" in Release(bus, ledger).give_back(left)[ONE]
    assert kernel.resets == []  # not under a driver that works with it


def test_what_never_left_its_driver_is_not_reset(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    """Killed between what was written down and what was to be done."""
    claim = ledger.claim(POD, OWNER, Wanted((Request.at(ONE),)), HOST).id
    ledger.bind(claim, [bus.snapshot(ONE, claim)])
    assert Release(bus, ledger).give_back(ledger.release(claim, WORKER)) == {}
    assert (kernel.resets, kernel.written) == ([], [])
    assert ledger.device(ONE).state is State.FREE


def test_what_was_reset_already_is_only_given_back(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    """Whoever was at it was killed between the two."""
    left = used(bus, ledger, ONE)
    ledger.was_reset(ONE)
    assert Release(bus, ledger).give_back(left) == {}
    assert kernel.resets == []
    assert kernel.driver(ONE) == "nvidia"


def test_a_boot_of_the_host_is_a_reset(kernel: Kernel, bus: Bus, ledger: Ledger, clock: Clock) -> None:
    left = used(bus, ledger, ONE)
    clock.reboot(off_s=10)
    for binding in ledger.bindings():
        bus.restore(binding)  # as the boot has it
    assert Release(bus, ledger).give_back(left) == {}
    assert kernel.resets == []
    assert ("reset", "by the boot of the host since") in causes(ledger, ONE)


def test_a_device_that_was_used_and_never_bound_is_a_quarantine(bus: Bus, ledger: Ledger) -> None:
    claim = ledger.claim(POD, OWNER, Wanted((Request.at(ONE),)), HOST).id
    ledger.use(claim)
    failed = Release(bus, ledger).give_back(ledger.release(claim, WORKER))
    assert "is not written down" in failed[ONE]


def test_only_what_is_quarantined_can_be_cleared(kernel: Kernel, bus: Bus, ledger: Ledger) -> None:
    used(bus, ledger, ONE)
    with pytest.raises(IllegalMove, match="is resetting, not quarantined"):
        Release(bus, ledger).clear(ONE)
    assert kernel.driver(ONE) == "vfio-pci"


# --- the vendor's program ---


def test_the_scrub_is_told_the_address_and_its_words_are_kept(
    bus: Bus, ledger: Ledger, program: Callable[[str], Scrub]
) -> None:
    scrub = program('echo "cleared 80 GiB of $1 $#"')
    assert Release(bus, ledger, scrub=scrub).give_back(used(bus, ledger, ONE)) == {}
    assert ("scrub", f"{scrub.program}: cleared 80 GiB of {ONE} 1") in causes(ledger, ONE)


def test_a_scrub_comes_after_the_reset_and_before_the_driver(
    kernel: Kernel, bus: Bus, ledger: Ledger, program: Callable[[str], Scrub]
) -> None:
    scrub = program(f"readlink {kernel.at(ONE, 'driver')}")
    Release(bus, ledger, scrub=scrub).give_back(used(bus, ledger, ONE))
    found = [(cause, detail) for cause, detail in causes(ledger, ONE) if cause != "state"]
    assert [cause for cause, _ in found] == ["reset", "scrub", "restore"]
    assert found[1][1].endswith("/vfio-pci")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo no memory_clear_finished; exit 3", "ended with status 3"),
        ("kill -9 $$", "was killed by signal 9"),
    ],
)
def test_a_scrub_that_fails_is_a_quarantine(
    bus: Bus, ledger: Ledger, program: Callable[[str], Scrub], script: str, words: str
) -> None:
    failed = Release(bus, ledger, scrub=program(script)).give_back(used(bus, ledger, ONE))
    assert words in failed[ONE]
    assert [e.cause for e in ledger.log(ONE)].count(Cause.SCRUB) == 1


def test_a_scrub_that_does_not_end_is_killed_with_what_it_started(
    tmp_path: Path, program: Callable[[str], Scrub]
) -> None:
    scrub = Scrub(program(f"sleep 1000 & echo $! >{tmp_path}/child; wait").program, 0.5)
    with pytest.raises(ScrubFailed, match=r"did not end within 0\.5 s"):
        scrub.run(ONE)
    child = int((tmp_path / "child").read_text())
    try:
        pidfd = os.pidfd_open(child)
    except ProcessLookupError:
        return
    with open(pidfd, "rb"):  # it was killed, and may take its time to die
        assert select.select([pidfd], [], [], 10)[0]


def test_a_scrub_that_is_not_there_is_a_quarantine(bus: Bus, ledger: Ledger) -> None:
    failed = Release(bus, ledger, scrub=Scrub("/nonexistent", 1.0)).give_back(used(bus, ledger, ONE))
    assert "cannot be run: No such file" in failed[ONE]


# --- the comparison ---


def test_what_a_driver_changes_is_no_difference() -> None:
    before = Condition(bytes(range(64)), 16, 2.5)
    header = bytearray(range(64))
    header[4:8] = b"\xff" * 4  # command, status
    header[0x3C] = 0xFF  # interrupt line
    assert differences(before, Condition(bytes(header), 16, 32.0)) == []
    assert differences(before, Condition(before.header, 16, 1.0)) == ["link of 1 GT/s, was 2.5"]


def test_a_virtual_function_answers_although_its_ids_read_as_ones() -> None:
    header = b"\xff" * 4 + bytes(range(60))
    assert Condition(header, 0, 0.0).answers
    assert not Condition(b"\xff" * 64, 0, 0.0).answers


def test_a_condition_goes_through_the_ledger_unchanged(kernel: Kernel) -> None:
    found = read(str(kernel.tree.sys), ONE)
    assert found.answers
    assert Condition.from_text(found.to_text()) == found
    with pytest.raises(DataLoss):
        Condition.from_text('{"header": "zz"}')


# --- killed on the way ---


def test_killed_before_every_write_on_the_whole_way(kernel: Kernel, in_memory: Path) -> None:
    """A child binds, uses, releases, gives back; it is killed before each write to sysfs. Then gc comes."""
    before, step, killed = kernel.state(), 0, True
    quarantined: list[PciAddress] = []
    while killed:
        step += 1
        kernel.resets.clear()

        def work(step: int = step) -> None:
            with Ledger(in_memory / str(step)) as ledger:
                mine = Bus(str(kernel.tree.sys), write=kernel.write)
                claim = ledger.claim(POD, myself(), Wanted((Request.at(ONE, TWO),)), HOST).id
                mine.bind(ledger, claim, (ONE, TWO))
                ledger.use(claim)
                Release(mine, ledger).give_back(ledger.release(claim, myself()))

        killed = kernel.kills(work, step)
        with Ledger(in_memory / str(step)) as ledger:
            ours = Bus(str(kernel.tree.sys), write=kernel.write)
            quarantined += Release(ours, ledger).give_back(ledger.collect(is_alive, myself()).devices)
            check(ledger)
            assert {device.state for device in ledger.devices()} == {State.FREE}
            assert ledger.bindings() == []
            ledger.claim(OTHER, myself(), Wanted((Request.at(ONE, TWO),)), HOST)
        assert kernel.state() == before
        assert bus_order(kernel) == ["flr bus", "flr"]
    assert quarantined == []
    assert step > 12


def bus_order(kernel: Kernel) -> list[str]:
    return [kernel.at(address, "reset_method").read_text().strip() for address in (ONE, TWO)]


def test_programs_of_these_tests_are_programs(program: Callable[[str], Scrub]) -> None:
    assert stat.S_IMODE(Path(program("true").program).stat().st_mode) & 0o100


def test_where_it_is_waived_a_device_that_cannot_be_reset_is_only_compared(
    kernel: Kernel, bus: Bus, ledger: Ledger
) -> None:
    waived = Release(bus, ledger, no_reset_waived=True)
    assert waived.give_back(used(bus, ledger, THREE)) == {}
    assert ("reset", "none: there is no way to, and no-reset is waived") in causes(ledger, THREE)
    left = used(bus, ledger, THREE)
    kernel.losing_a_bar(THREE)
    assert "BAR 0" in waived.give_back(left)[THREE]
