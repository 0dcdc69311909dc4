"""Which devices a pod gets: the rule of vfio/ledger/choice.py, line by line, and that nothing is missed."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.errors import InvalidArgument
from tests.unit.vfio.hosts import H100, NVIDIA, at, dgx, gpu, nic, plain
from vfio.ledger.choice import MOST_COMPARED, ranked, share
from vfio.ledger.demand import Candidate, Host, Partition, Request, Same, Wanted


def chosen(host: Host, *requests: Request, taken: str = "", same: Same | None = None) -> list[list[str]]:
    """The short addresses of the best choice, by request; [] if there is none."""
    found = ranked(Wanted(requests, same), host, {at(word) for word in taken.split()})
    return [[short(c) for c in group] for group in found[0].given] if found else []


def short(candidate: Candidate) -> str:
    return str(candidate.address).removeprefix("0000:").removesuffix(":00.0")


def test_the_lowest_addresses_of_devices_that_are_alike() -> None:
    assert chosen(plain(4), Request(2)) == [["01", "02"]]


def test_what_is_taken_is_not_chosen() -> None:
    assert chosen(plain(4), Request(2), taken="01:00.0 03:00.0") == [["02", "04"]]
    assert chosen(plain(4), Request(3), taken="01:00.0 03:00.0") == []


def test_two_are_below_one_switch_if_they_can_be() -> None:
    assert chosen(dgx(), Request(2, kind="gpu"), taken="11:00.0") == [["21", "22"]]


def test_one_gpu_breaks_no_pair_that_is_whole() -> None:
    assert chosen(dgx(), Request(kind="gpu"), taken="11:00.0 31:00.0 32:00.0") == [["12"]]


def test_of_two_nodes_the_fuller_one_is_filled() -> None:
    host = Host(
        (
            *tuple(gpu(f"0{n}:00.0", node=0) for n in range(1, 5)),
            gpu("81:00.0", node=1),
            gpu("82:00.0", node=1),
        )
    )
    assert chosen(host, Request(2)) == [["81", "82"]]


def test_being_on_one_node_goes_before_what_is_left_to_others() -> None:
    # Three of node 0 and one of node 1 would leave four on node 1.
    host = Host(
        tuple(gpu(f"0{n}:00.0", node=0) for n in range(1, 4))
        + tuple(gpu(f"8{n}:00.0", node=1) for n in range(1, 6))
    )
    assert chosen(host, Request(4)) == [["81", "82", "83", "84"]]


def test_a_whole_partition_is_kept_for_who_asks_for_one() -> None:
    # Without partitions 01 and 02 would be taken; 02 to 05 can only be joined as one.
    gpus = tuple(gpu(f"0{n}:00.0") for n in range(1, 7))
    joined = Partition("four", frozenset(c.address for c in gpus[1:5]))
    assert chosen(Host(gpus, (joined,)), Request(2)) == [["01", "06"]]


def test_a_partition_is_all_free_and_exactly_as_large() -> None:
    wanted = Wanted((Request(4, partition=True),))
    best = ranked(wanted, dgx(), {at("11:00.0")})[0]
    assert [short(c) for c in best.devices] == ["31", "32", "41", "42"]
    assert best.partitions == ("4.1",)
    assert ranked(wanted, dgx(), {at("11:00.0"), at("42:00.0")}) == []
    assert ranked(Wanted((Request(3, partition=True),)), dgx(), set()) == []


def test_one_node_one_switch() -> None:
    assert chosen(dgx(), Request(4, kind="gpu", same=Same.NODE), taken="11:00.0") == [
        ["31", "32", "41", "42"]
    ]
    assert chosen(dgx(), Request(5, kind="gpu", same=Same.NODE)) == []
    assert chosen(dgx(), Request(3, kind="gpu", same=Same.SWITCH)) == []


def test_devices_below_no_switch_share_none() -> None:
    assert chosen(plain(2), Request(2, same=Same.SWITCH)) == []
    assert chosen(plain(2), Request(1, same=Same.SWITCH)) == [["01"]]


def test_a_gpu_and_a_network_card_below_the_same_switch() -> None:
    requests = (Request(kind="gpu"), Request(kind="nic"))
    found = chosen(dgx(), *requests, taken="15:00.0 25:00.0", same=Same.SWITCH)
    assert found == [["31"], ["35"]]


def test_requests_that_want_the_same_devices_are_both_met() -> None:
    # The first would take 01 if it were alone, which the second has by name.
    assert chosen(plain(2), Request(1), Request.at(at("01:00.0"))) == [["02"], ["01"]]


def test_vendor_device_and_words_of_the_name() -> None:
    host = Host((gpu("01:00.0"), nic("02:00.0")))
    assert chosen(host, Request(vendor=0x15B3)) == [["02"]]
    assert chosen(host, Request(vendor=NVIDIA, device=H100)) == [["01"]]
    assert chosen(host, Request(model="sxm5 h100")) == [["01"]]
    assert chosen(host, Request(model="a100")) == []
    assert chosen(host, Request(vendor=NVIDIA, device=0x2331)) == []


def test_companions_come_along_and_are_not_given() -> None:
    host = Host((gpu("01:00.0", companions=("01:00.1",)),))
    (choice,) = ranked(Wanted((Request(),)), host, set())
    assert choice.companions == {at("01:00.1")}
    assert choice.addresses == {at("01:00.0"), at("01:00.1")}
    assert ranked(Wanted((Request(),)), host, {at("01:00.1")}) == []


def test_a_group_of_two_gpus_is_left_to_who_wants_two() -> None:
    pair = (gpu("01:00.0", companions=("02:00.0",)), gpu("02:00.0", companions=("01:00.0",)))
    host = Host((*pair, gpu("03:00.0"), gpu("04:00.0")))
    assert chosen(host, Request()) == [["03"]]
    assert ranked(Wanted((Request(2),)), host, set())[0].companions == frozenset()
    # One of the group alone keeps the other from everybody, and is the last resort.
    assert chosen(host, Request(), taken="03:00.0 04:00.0") == [["01"]]
    assert chosen(host, Request(), taken="02:00.0 03:00.0 04:00.0") == []


def test_taking_nothing_away_from_others_goes_before_being_on_one_node() -> None:
    pair = (gpu("01:00.0", companions=("02:00.0",)), gpu("02:00.0", companions=("01:00.0",)))
    host = Host((*pair, gpu("03:00.0"), gpu("81:00.0", node=1)))
    assert chosen(host, Request(2), taken="") == [["01", "02"]]
    assert chosen(Host((pair[0], nic("02:00.0"), *host.candidates[2:])), Request(2, kind="gpu")) == [
        ["03", "81"]
    ]


def test_the_switch_with_the_fewest_left_gives_one_away() -> None:
    host = Host(
        (
            gpu("01:00.0", switch="a0:00.0"),
            gpu("02:00.0", switch="a0:00.0"),
            gpu("03:00.0", switch="b0:00.0"),
        )
    )
    assert chosen(host, Request()) == [["03"]]


def test_nothing_wanted_is_chosen_without_devices() -> None:
    (choice,) = ranked(Wanted(cpus=2), dgx(), set())
    assert choice.devices == ()


def test_what_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        Request(2, addresses=(at("01:00.0"),))
    with pytest.raises(InvalidArgument):
        Request.at(at("01:00.0"), at("01:00.0"))
    with pytest.raises(InvalidArgument):
        Request(0)


NODES = st.integers(0, 1)
DEVICES = st.lists(st.tuples(NODES, st.integers(0, 2), st.booleans()), min_size=1, max_size=7)


def built(devices: list[tuple[int, int, bool]]) -> Host:
    """Devices by node, switch of the node, and whether they have the one before them in their group."""
    made: list[Candidate] = []
    for number, (node, switch, joined) in enumerate(devices, 1):
        one = gpu(f"{number:02x}:00.0", node=node, switch=f"{0xA0 + 16 * node + switch:02x}:00.0")
        if joined and made and not made[-1].companions:
            before = made.pop()
            made.append(
                gpu(
                    f"{number - 1:02x}:00.0",
                    node=before.node,
                    switch=str(before.switch),
                    companions=(str(one.address),),
                )
            )
            one = gpu(
                f"{number:02x}:00.0", node=node, switch=str(one.switch), companions=(str(before.address),)
            )
        made.append(one)
    return Host(tuple(made))


@given(devices=DEVICES, count=st.integers(1, 4), same=st.sampled_from([None, *Same]), data=st.data())
def test_one_is_found_exactly_if_there_is_one(
    devices: list[tuple[int, int, bool]], count: int, same: Same | None, data: st.DataObject
) -> None:
    host = built(devices)
    taken = {c.address for c in host.candidates if data.draw(st.booleans())}
    free = [c for c in host.candidates if not ({c.address} | c.companions) & taken]
    possible = [group for group in itertools.combinations(free, count) if same is None or share(group, same)]
    found = ranked(Wanted((Request(count, same=same),)), host, taken)
    assert bool(found) == bool(possible)
    for choice in found:
        assert len(choice.devices) == count
        assert not choice.addresses & taken
        assert same is None or share(choice.devices, same)
    if found:
        # By the first two lines of the rule no other way is better, of all that there are.
        def lost(group: tuple[Candidate, ...]) -> tuple[int, int, int]:
            own = {c.address for c in group}
            along = {other for c in group for other in c.companions} - own
            return len(along), len({c.node for c in group}), len({c.switch for c in group})

        assert lost(found[0].devices) == min(map(lost, possible))


def test_many_functions_that_are_alike_are_quickly_chosen_from() -> None:
    host = Host(
        tuple(
            nic(f"{bus:02x}:{slot:02x}.{f}", node=bus % 2)
            for bus in range(1, 5)
            for slot in range(32)
            for f in range(8)
        )
    )
    began = time.process_time()
    assert len(ranked(Wanted((Request(8, same=Same.NODE),)), host, set())[0].devices) == 8
    assert time.process_time() - began < 1.0


def test_a_host_with_too_many_ways_has_one_of_the_first() -> None:
    host = Host(tuple(gpu(f"{n:02x}:00.0", switch=f"{n + 64:02x}:00.0") for n in range(1, 33)))
    began = time.process_time()
    found = ranked(Wanted((Request(8),)), host, set())
    assert len(found) == MOST_COMPARED
    assert time.process_time() - began < 5.0
