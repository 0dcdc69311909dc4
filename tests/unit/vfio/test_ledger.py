"""What the ledger promises: all or nothing, no state skipped, everything written down."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rpc.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from tests.unit.vfio.hosts import (
    BOOT,
    OTHER,
    OWNER,
    POD,
    TWO_MIB,
    WORKER,
    Clock,
    at,
    dgx,
    gpu,
    plain,
)
from vfio.ledger.demand import Host, HugePages, Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import (
    MOVES,
    Binding,
    Cause,
    IllegalMove,
    NotEnough,
    Pod,
    Process,
    State,
    Use,
    check_move,
)

ONE, TWO, THREE, FOUR = (at(f"0{number}:00.0") for number in range(1, 5))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger", actor="the test", clock=clock) as ledger:
        yield ledger


def wanting(count: int) -> Wanted:
    return Wanted((Request(count),))


def states(ledger: Ledger) -> dict[str, str]:
    return {str(device.address)[5:7]: device.state.value for device in ledger.devices()}


def used(ledger: Ledger, pod: Pod = POD, count: int = 1, host: Host | None = None) -> int:
    """A claim whose devices are bound and in use."""
    claim = ledger.claim(pod, OWNER, wanting(count), host or plain(4))
    ledger.bind(claim.id, [Binding(address, claim.id, "nvidia", "") for address in claim.addresses])
    ledger.use(claim.id)
    return claim.id


# --- claims ---


def test_a_claim_has_what_was_wanted_and_who_has_it(ledger: Ledger, clock: Clock) -> None:
    wanted = Wanted((Request(2, kind="gpu"),), cpus=4, pages=HugePages(64, TWO_MIB))
    claim = ledger.claim(POD, OWNER, wanted, dgx())
    assert claim.given == ((at("11:00.0"), at("12:00.0")),)
    assert (claim.pod, claim.owner, claim.made_s, claim.ended_s) == (POD, OWNER, clock.wall_s, None)
    assert (claim.cpus, claim.pages, claim.page_bytes) == ({0: (0, 1, 64, 65)}, {0: 64}, TWO_MIB)
    assert ledger.claims() == [claim]
    assert ledger.get(claim.id) == claim
    assert [(d.address, d.state, d.pod) for d in ledger.devices()] == [
        (at("11:00.0"), State.CLAIMED, POD),
        (at("12:00.0"), State.CLAIMED, POD),
    ]


def test_devices_are_in_the_order_of_the_requests(ledger: Ledger) -> None:
    wanted = Wanted((Request(kind="nic"), Request(2, kind="gpu"), Request.at(at("42:00.0"))))
    claim = ledger.claim(POD, OWNER, wanted, dgx())
    assert [len(group) for group in claim.given] == [1, 2, 1]
    assert claim.given[2] == (at("42:00.0"),)
    assert ledger.get(claim.id).given == claim.given


def test_a_partition_is_remembered_by_name(ledger: Ledger) -> None:
    claim = ledger.claim(POD, OWNER, Wanted((Request(4, partition=True),)), dgx())
    assert ledger.get(claim.id).partitions == ("4.0",)


def test_who_does_not_get_all_gets_nothing_and_hears_who_has_what(ledger: Ledger) -> None:
    ledger.claim(OTHER, OWNER, wanting(3), plain(4))
    with pytest.raises(ResourceExhausted) as raised:
        ledger.claim(POD, OWNER, wanting(2), plain(4))
    assert raised.value.details == "\n".join(
        f"gpu {address} is claimed, pod k8s.io/serving" for address in (ONE, TWO, THREE)
    )
    assert states(ledger) == {"01": "claimed", "02": "claimed", "03": "claimed"}
    assert [claim.pod for claim in ledger.claims()] == [OTHER]
    assert ledger.claim(POD, OWNER, wanting(1), plain(4)).addresses == (FOUR,)


def test_without_enough_cpus_the_devices_stay_free(ledger: Ledger) -> None:
    with pytest.raises(ResourceExhausted, match=r"34 CPUs of NUMA node 0 \(50 wanted, 16 free\)"):
        ledger.claim(POD, OWNER, Wanted((Request.at(at("11:00.0")),), cpus=50), dgx())
    assert ledger.devices() == []


def test_devices_of_a_node_with_room_are_preferred_to_better_ones_without(ledger: Ledger) -> None:
    ledger.claim(OTHER, OWNER, Wanted((Request.at(at("11:00.0")),), cpus=16), dgx())
    # Alone, 12:00.0 would be the one that breaks no pair.
    claim = ledger.claim(POD, OWNER, Wanted((Request(kind="gpu"),), cpus=2), dgx())
    assert claim.given == ((at("31:00.0"),),)
    assert claim.cpus == {1: (8, 72)}


def test_no_cpu_and_no_page_is_promised_twice(ledger: Ledger) -> None:
    both = Wanted(cpus=16, pages=HugePages(1000, TWO_MIB))
    cpus = [ledger.claim(pod, OWNER, both, dgx()).cpus for pod in (POD, OTHER)]
    assert set(cpus[0][0]).isdisjoint(cpus[1][1])
    with pytest.raises(ResourceExhausted, match="huge pages"):
        ledger.claim(Pod("k8s.io", "third"), OWNER, Wanted(pages=HugePages(1, TWO_MIB)), dgx())
    ledger.release(ledger.claims()[0].id, WORKER)
    assert ledger.claim(Pod("k8s.io", "third"), OWNER, both, dgx()).cpus == cpus[0]


def test_who_does_not_get_pages_hears_who_has_them(ledger: Ledger) -> None:
    ledger.claim(OTHER, OWNER, Wanted(pages=HugePages(900, TWO_MIB)), dgx())
    with pytest.raises(NotEnough, match=r"150 huge pages of 2048 KiB of NUMA node 0 \(250 wanted") as raised:
        ledger.claim(POD, OWNER, Wanted((Request.at(at("11:00.0")),), pages=HugePages(250, TWO_MIB)), dgx())
    assert raised.value.details == "900 huge pages of NUMA node 0 are claimed, pod k8s.io/serving"
    assert ledger.devices() == []


def test_pages_need_not_be_worth_devices_that_are_farther_apart(ledger: Ledger) -> None:
    most = HugePages(990, TWO_MIB)
    ledger.claim(OTHER, OWNER, Wanted((Request.at(at("11:00.0")),), pages=most), dgx())
    ledger.claim(Pod("k8s.io", "far"), OWNER, Wanted((Request.at(at("31:00.0")),), pages=most), dgx())
    wanted = Wanted((Request(2, kind="gpu"),), pages=HugePages(20, TWO_MIB))
    with pytest.raises(NotEnough):
        ledger.claim(POD, OWNER, replace(wanted, nearest=True), dgx())
    assert set(ledger.claim(POD, OWNER, wanted, dgx()).pages) == {0, 1}


def test_cpus_are_worth_them(ledger: Ledger) -> None:
    ledger.claim(OTHER, OWNER, Wanted((Request.at(at("11:00.0")),), cpus=14), dgx())
    ledger.claim(Pod("k8s.io", "far"), OWNER, Wanted((Request.at(at("31:00.0")),), cpus=14), dgx())
    both = Wanted((Request(2, kind="gpu"),), cpus=4, pages=HugePages(20, TWO_MIB), nearest=True)
    claim = ledger.claim(POD, OWNER, both, dgx())
    assert (set(claim.cpus), dict(claim.pages)) == ({0, 1}, {0: 10, 1: 10})
    ledger.release(claim.id, WORKER)
    with pytest.raises(NotEnough, match=r"huge pages of 2048 KiB of NUMA node 0") as raised:
        ledger.claim(POD, OWNER, replace(both, pages=HugePages(4000, TWO_MIB)), dgx())
    assert "CPUs" not in raised.value.brief


def test_who_does_not_get_cpus_hears_who_has_them(ledger: Ledger) -> None:
    ledger.claim(OTHER, OWNER, Wanted((Request.at(at("31:00.0")),), cpus=12), dgx())
    with pytest.raises(NotEnough) as raised:
        ledger.claim(POD, OWNER, Wanted((Request.at(at("32:00.0")),), cpus=8), dgx())
    assert raised.value.brief == "not free: 4 CPUs of NUMA node 1 (8 wanted, 4 free)"
    assert raised.value.details == "CPUs 8-13,72-77 of NUMA node 1 are claimed, pod k8s.io/serving"
    assert "dedicated_cpus" in str(raised.value.hint)
    assert str(at("32:00.0")) not in map(str, (each.address for each in ledger.devices()))
    alone = Wanted(cpus=8)
    assert set(ledger.claim(POD, OWNER, alone, dgx()).cpus) == {0}  # a pod without devices may be anywhere


def test_what_this_host_can_never_give_is_another_error(ledger: Ledger) -> None:
    with pytest.raises(FailedPrecondition, match=r"this host cannot give 5 x device"):
        ledger.claim(POD, OWNER, wanting(5), plain(4))
    with pytest.raises(NotFound, match=r"device 0000:09:00.0 is not there"):
        ledger.claim(POD, OWNER, Wanted((Request.at(at("09:00.0")),)), plain(4))
    with pytest.raises(InvalidArgument):
        ledger.claim(POD, OWNER, Wanted(), plain(4))


def test_a_pod_has_one_claim(ledger: Ledger) -> None:
    first = ledger.claim(POD, OWNER, wanting(1), plain(4))
    with pytest.raises(FailedPrecondition, match="has claim 1 already"):
        ledger.claim(POD, OWNER, wanting(1), plain(4))
    ledger.release(first.id, WORKER)
    assert ledger.claim(POD, OWNER, wanting(1), plain(4)).id == 2


def test_companions_are_claimed_and_released_with_their_device(ledger: Ledger) -> None:
    host = Host((gpu("01:00.0", companions=("01:00.1",)), gpu("02:00.0")))
    claim = used(ledger, host=Host(host.candidates[:1]))
    assert ledger.get(claim).companions == (at("01:00.1"),)
    assert [device.state for device in ledger.devices()] == [State.IN_USE] * 2
    assert ledger.release(claim, WORKER) == (ONE, at("01:00.1"))


# --- the ways between the states ---


def test_the_way_of_a_device(ledger: Ledger) -> None:
    claim = used(ledger)
    assert states(ledger) == {"01": "in use"}
    assert ledger.release(claim, WORKER) == (ONE,)
    assert states(ledger) == {"01": "resetting"}
    with pytest.raises(ResourceExhausted, match=r"0000:01:00\.0 is resetting, pod k8s.io/training"):
        ledger.claim(OTHER, OWNER, wanting(1), plain(1))
    ledger.was_reset(ONE)
    ledger.clean(ONE)
    assert states(ledger) == {"01": "free"}
    assert ledger.claim(OTHER, OWNER, wanting(1), plain(1)).addresses == (ONE,)


def test_a_device_that_nothing_was_done_to_is_free_at_once(ledger: Ledger) -> None:
    claim = ledger.claim(POD, OWNER, wanting(1), plain(4)).id
    assert ledger.release(claim, WORKER) == ()
    assert states(ledger) == {"01": "free"}


@pytest.mark.parametrize("bound", [True, False])
def test_a_device_that_was_bound_or_used_is_reset_first(ledger: Ledger, bound: bool) -> None:
    claim = ledger.claim(POD, OWNER, wanting(1), plain(4)).id
    if bound:
        ledger.bind(claim, [Binding(ONE, claim, "nvidia", "")])
    else:
        ledger.use(claim)
    assert ledger.release(claim, WORKER) == (ONE,)


def test_released_twice_says_again_what_is_left_to_do(ledger: Ledger) -> None:
    claim = used(ledger, count=2)
    assert ledger.release(claim, WORKER) == (ONE, TWO)
    ledger.was_reset(ONE)
    ledger.clean(ONE)
    assert ledger.release(claim, WORKER) == (TWO,)
    assert ledger.release(claim, OWNER) == ()  # another is at it
    with pytest.raises(NotFound, match="no claim 7"):
        ledger.release(7, WORKER)


def test_a_device_is_not_free_before_it_was_reset(ledger: Ledger) -> None:
    ledger.release(used(ledger), WORKER)
    with pytest.raises(FailedPrecondition, match="is not known to have been reset"):
        ledger.clean(ONE)
    ledger.was_reset(ONE)
    ledger.clean(ONE)
    assert ledger.bindings() == []


def test_of_a_claim_only_what_is_still_bound_is_reset(ledger: Ledger) -> None:
    """Binding failed half way, and one function could not be given back."""
    claim = ledger.claim(POD, OWNER, wanting(2), plain(4)).id
    ledger.bind(claim, [Binding(ONE, claim, "nvidia", ""), Binding(TWO, claim, "nvidia", "")])
    ledger.restored(TWO)
    assert ledger.release(claim, WORKER) == (ONE,)
    assert states(ledger) == {"01": "resetting", "02": "free"}


def test_a_quarantined_device_is_nobodys_until_it_is_cleared(ledger: Ledger) -> None:
    ledger.release(used(ledger), WORKER)
    ledger.quarantine(ONE, "no answer after its reset")
    with pytest.raises(
        ResourceExhausted, match=r"is quarantined, pod k8s.io/training: no answer after its reset"
    ):
        ledger.claim(OTHER, OWNER, wanting(1), plain(1))
    with pytest.raises(FailedPrecondition, match="is to be given back to nvidia"):
        ledger.clear(ONE)
    ledger.restored(ONE)
    assert ledger.clear(ONE) == "no answer after its reset"
    assert ledger.device(ONE).reason == ""
    assert ledger.claim(OTHER, OWNER, wanting(1), plain(1)).addresses == (ONE,)


def test_a_free_device_can_be_quarantined_too(ledger: Ledger) -> None:
    ledger.quarantine(TWO, "corrected errors by the thousand")
    assert ledger.claim(POD, OWNER, wanting(2), plain(3)).addresses == (ONE, THREE)
    with pytest.raises(InvalidArgument):
        ledger.quarantine(FOUR, "  ")


def test_illegal_moves_have_a_name(ledger: Ledger) -> None:
    claim = used(ledger)
    with pytest.raises(IllegalMove, match="is in use, and cannot become quarantined"):
        ledger.quarantine(ONE, "x")
    with pytest.raises(IllegalMove, match="is in use, so nobody was resetting it"):
        ledger.clean(ONE)
    with pytest.raises(IllegalMove, match="is in use, not quarantined"):
        ledger.clear(ONE)
    with pytest.raises(IllegalMove, match="is in use, and cannot become in use"):
        ledger.use(claim)
    ledger.quarantine(TWO, "x")
    with pytest.raises(IllegalMove):
        ledger.clean(TWO)


def test_every_move_that_is_not_declared_is_illegal() -> None:
    for before in State:
        for after in State:
            if after in MOVES[before]:
                check_move(ONE, before, after)
            else:
                with pytest.raises(IllegalMove):
                    check_move(ONE, before, after)


# --- bindings ---


def test_how_a_function_was_is_written_down_once(ledger: Ledger) -> None:
    claim = ledger.claim(POD, OWNER, wanting(1), plain(4)).id
    ledger.bind(claim, [Binding(ONE, claim, "nvidia", "")])
    ledger.bind(claim, [Binding(ONE, claim, "vfio-pci", "vfio-pci")])  # looked at again half way
    assert ledger.bindings() == [Binding(ONE, claim, "nvidia", "", boot=BOOT)]
    ledger.use(claim)
    assert ledger.bindings() == [Binding(ONE, claim, "nvidia", "", boot=BOOT, used=True)]
    ledger.was_reset(ONE)
    assert ledger.bindings() == [Binding(ONE, claim, "nvidia", "", boot=BOOT, used=True, clean=True)]
    ledger.restored(ONE)
    ledger.restored(ONE)
    assert ledger.bindings(claim) == []
    causes = [entry.cause for entry in ledger.log(ONE)]
    assert causes == [Cause.STATE, Cause.BIND, Cause.STATE, Cause.RESTORE]


def test_nothing_is_bound_for_a_claim_that_was_released_or_for_two(ledger: Ledger) -> None:
    first = ledger.claim(POD, OWNER, wanting(1), plain(4)).id
    second = ledger.claim(OTHER, OWNER, wanting(1), plain(4)).id
    ledger.bind(first, [Binding(ONE, first, "nvidia", "")])
    with pytest.raises(FailedPrecondition, match="bound for claim 1"):
        ledger.bind(second, [Binding(TWO, second, "nvidia", ""), Binding(ONE, second, "nvidia", "")])
    assert ledger.bindings(second) == []  # all or nothing
    ledger.release(first, WORKER)
    with pytest.raises(FailedPrecondition, match="was released"):
        ledger.bind(first, [Binding(THREE, first, "nvidia", "")])


# --- owners that have ended ---


def test_claims_of_the_dead_are_released_and_those_of_the_living_are_not(ledger: Ledger) -> None:
    dead = Process(5000, 1, BOOT)
    ledger.claim(POD, dead, wanting(1), plain(4))
    lives = used(ledger, OTHER)
    killed = ledger.claim(Pod("k8s.io", "third"), dead, wanting(1), plain(4))
    ledger.use(killed.id)
    planned = ledger.orphans(lambda process: process != dead)
    assert [claim.pod.id for claim in planned.claims] == ["training", "third"]
    assert planned.devices == (ONE, THREE)
    assert states(ledger) == {"01": "claimed", "02": "in use", "03": "in use"}  # nothing was done
    found = ledger.collect(lambda process: process != dead, WORKER)
    assert [claim.pod.id for claim in found.claims] == ["training", "third"]
    assert found.devices == (THREE,)  # the first one's was never touched
    assert states(ledger) == {"01": "free", "02": "in use", "03": "resetting"}
    assert [claim.id for claim in ledger.claims()] == [lives]
    assert ledger.collect(lambda process: process != dead, WORKER).devices == ()


def test_a_reset_whose_worker_was_killed_is_taken_over_by_one(ledger: Ledger) -> None:
    ledger.release(used(ledger, count=2), WORKER)
    third, fourth = Process(5001, 1, BOOT), Process(5002, 1, BOOT)
    assert ledger.collect(lambda process: process != WORKER, third).devices == (ONE, TWO)
    assert ledger.collect(lambda process: process != WORKER, fourth).devices == ()
    assert [e.cause for e in ledger.log(ONE)][-1] is Cause.TAKEOVER


def test_a_pid_of_an_earlier_boot_is_nobody(ledger: Ledger, clock: Clock) -> None:
    used(ledger)
    clock.reboot(off_s=60)

    def asked(process: Process) -> bool:
        raise AssertionError("the pid is another's now")

    assert ledger.collect(asked, Process(1, 1, clock.boot)).devices == (ONE,)


# --- what was ---


def test_every_second_is_counted_per_pod(ledger: Ledger, clock: Clock) -> None:
    start = clock.wall_s
    claim = used(ledger, count=2)
    clock.go(10)
    used(ledger, OTHER)
    clock.go(5)
    ledger.release(claim, WORKER)
    clock.go(100)
    assert ledger.usage() == [
        Use(POD, ONE, False, start, start + 15, 15.0),
        Use(POD, TWO, False, start, start + 15, 15.0),
        Use(OTHER, THREE, False, start + 10, None, 105.0),
    ]
    assert [use.pod for use in ledger.usage(since_s=start + 16)] == [OTHER]


def test_setting_the_hosts_clock_changes_no_use(ledger: Ledger, clock: Clock) -> None:
    claim = used(ledger)
    clock.go(30)
    clock.wall_s -= 3600
    ledger.release(claim, WORKER)
    assert [use.seconds for use in ledger.usage()] == [30.0]


def test_without_a_word_since_a_use_lasts_to_the_last_that_was_written(ledger: Ledger, clock: Clock) -> None:
    used(ledger)
    clock.go(40)
    ledger.quarantine(FOUR, "something that was written down")
    clock.go(40)
    clock.reboot(off_s=1000)
    assert [use.seconds for use in ledger.usage()] == [40.0]
    ledger.collect(lambda _: True, WORKER)
    assert [use.seconds for use in ledger.usage()] == [40.0]


THREE_DAYS_S = 3 * 86_400


@pytest.mark.parametrize("first", ["collect", "claim", "quarantine"])
def test_what_a_power_cut_ended_lasts_to_the_last_that_it_was_said_to_be_held(
    ledger: Ledger, clock: Clock, first: str
) -> None:
    """first: what is written first after the boot, and must not make the ledger forget the one before."""
    start = clock.wall_s
    used(ledger)
    lines = len(ledger.log())
    for _ in range(36):
        clock.go(THREE_DAYS_S / 36)
        assert ledger.still_held()
    clock.go(59)
    clock.reboot(off_s=1000)
    assert [use.seconds for use in ledger.usage()] == [THREE_DAYS_S]
    assert len(ledger.log()) == lines  # not a line a minute
    if first == "claim":
        ledger.claim(OTHER, Process(1, 1, clock.boot), wanting(1), plain(4))
    elif first == "quarantine":
        ledger.quarantine(FOUR, "x")
    clock.go(5)
    ledger.collect(lambda _: True, Process(2, 2, clock.boot))
    (use,) = (each for each in ledger.usage() if each.pod == POD)
    assert (use.seconds, use.to_s) == (THREE_DAYS_S, start + THREE_DAYS_S)
    (line,) = (entry for entry in ledger.log() if entry.cause is Cause.BOOT)
    assert (line.at_s, line.address, line.claim) == (start + THREE_DAYS_S, None, None)


def test_whoever_writes_says_of_all_claims_that_they_are_held(ledger: Ledger, clock: Clock) -> None:
    used(ledger)
    ledger.release(used(ledger, OTHER), WORKER)
    clock.go(40)
    ledger.was_reset(TWO)  # no line of the audit log
    clock.go(40)
    ledger.collect(lambda _: True, WORKER)  # `casemate gc`, and nothing to do
    clock.go(40)
    assert ledger.devices()  # who only reads writes nothing
    clock.reboot(off_s=1000)
    assert [use.seconds for use in ledger.usage() if use.pod == POD] == [80.0]


def test_where_nobody_has_anything_nothing_is_written(ledger: Ledger, clock: Clock) -> None:
    assert not ledger.still_held()
    ledger.release(used(ledger), WORKER)
    clock.go(40)
    assert not ledger.still_held()
    clock.reboot(off_s=1000)
    ledger.quarantine(FOUR, "x")
    assert Cause.BOOT not in [entry.cause for entry in ledger.log()]


def test_every_transition_is_in_the_log(ledger: Ledger, clock: Clock) -> None:
    claim = used(ledger)
    clock.go(1)
    ledger.release(claim, WORKER)
    ledger.note(Cause.RESET, ONE, "flr in 0.1 s")
    ledger.quarantine(ONE, "gone")
    ledger.restored(ONE)
    ledger.clear(ONE)
    lines = [
        (e.cause.value, e.before and e.before.value, e.after and e.after.value, e.detail)
        for e in ledger.log(ONE)
    ]
    assert lines == [
        ("state", None, "claimed", ""),
        ("bind", None, None, "from nvidia"),
        ("state", "claimed", "in use", ""),
        ("state", "in use", "resetting", ""),
        ("reset", None, None, "flr in 0.1 s"),
        ("state", "resetting", "quarantined", "gone"),
        ("restore", None, None, "to nvidia"),
        ("state", "quarantined", "free", ""),
    ]
    assert {(e.pod, e.actor, e.claim) for e in ledger.log(ONE)} == {(POD, "the test", claim)}
    assert [e.cause for e in ledger.log() if e.address is None] == [Cause.CLAIM, Cause.RELEASE]


def test_the_newest_lines_of_the_log(ledger: Ledger) -> None:
    for address in (ONE, TWO, THREE):
        ledger.quarantine(address, "x")
    assert [e.address for e in ledger.log(most=2)] == [TWO, THREE]
    last = ledger.log()[-1].number
    assert ledger.log(after=last) == []
