"""CPUs and huge pages: on the nodes of the devices, in whole cores, with numbers where they are missing."""

from tests.unit.vfio.hosts import TWO_MIB, dgx
from vfio.ledger.allotment import Allotment, Shortage, Spoken, allot, available
from vfio.ledger.demand import Host, HostNode, HugePages, Pages, Wanted


def test_nothing_is_wanted() -> None:
    assert allot(Wanted(), Host(), [0], Spoken()) == Allotment()


def test_cpus_and_pages_are_of_the_devices_node() -> None:
    found = allot(Wanted(cpus=4, pages=HugePages(100, TWO_MIB)), dgx(), [1], Spoken())
    assert found == Allotment({1: (8, 72, 9, 73)}, {1: 100})


def test_several_nodes_share_evenly() -> None:
    found = allot(Wanted(cpus=5, pages=HugePages(101, TWO_MIB)), dgx(), [1, 0, 1], Spoken())
    assert found == Allotment({0: (0, 64, 1, 65), 1: (8, 72)}, {0: 51, 1: 50})


def test_a_core_is_nobody_elses_although_one_thread_was_asked_for() -> None:
    first = allot(Wanted(cpus=1), dgx(), [0], Spoken())
    assert first == Allotment({0: (0, 64)})
    # A core of which another has only one thread is not free.
    assert allot(Wanted(cpus=1), dgx(), [0], Spoken(cpus={64})) == Allotment({0: (1, 65)})


def test_what_is_missing_is_said_in_numbers() -> None:
    spoken = Spoken(cpus=set(range(7)), pages={(0, TWO_MIB): 990})
    found = allot(Wanted(cpus=4, pages=HugePages(30, TWO_MIB)), dgx(), [0], spoken)
    assert isinstance(found, Shortage)
    assert found.words == (
        "2 CPUs of NUMA node 0 (4 wanted, 2 free); "
        "20 huge pages of 2048 KiB of NUMA node 0 (30 wanted, 10 free)"
    )


def test_a_pod_without_devices_is_on_the_fuller_node_that_suffices() -> None:
    wanted = Wanted(cpus=2)
    assert allot(wanted, dgx(), [], Spoken(cpus={8, 9})) == Allotment({1: (10, 74)})
    assert allot(wanted, dgx(), [None], Spoken(cpus=set(range(8, 16)))) == Allotment({0: (0, 64)})


def test_a_pod_that_no_node_has_room_for_is_on_both() -> None:
    found = allot(Wanted(cpus=20), dgx(), [], Spoken())
    assert isinstance(found, Allotment)
    assert {node: len(cpus) for node, cpus in found.cpus.items()} == {0: 10, 1: 10}


def test_cpus_alone_are_taken_wherever_they_are_if_nodes_differ() -> None:
    spoken = Spoken(cpus={*range(8, 15)})  # 16 free CPUs of node 0, 2 of node 1
    found = allot(Wanted(cpus=18), dgx(), [], spoken)
    assert isinstance(found, Allotment)
    assert {node: len(cpus) for node, cpus in found.cpus.items()} == {0: 16, 1: 2}
    short = allot(Wanted(cpus=20), dgx(), [], spoken)
    assert short == Shortage("2 CPUs of 2 NUMA nodes (20 wanted, 18 free)")
    one = Host(nodes=dgx().nodes[:1])
    assert allot(Wanted(cpus=20), one, [], Spoken()) == Shortage("4 CPUs of NUMA node 0 (20 wanted, 16 free)")


def test_an_unknown_node_has_nothing() -> None:
    assert isinstance(allot(Wanted(cpus=1), dgx(), [7], Spoken()), Shortage)
    assert isinstance(allot(Wanted(cpus=1), Host(), [], Spoken()), Shortage)


def test_pages_are_promised_once_whether_touched_or_not() -> None:
    def left(total: int, free: int, promised: int, size: int = TWO_MIB) -> int:
        node = HostNode(0, pages={TWO_MIB: Pages(total, free)})
        return available(node, size, Spoken(pages={(0, TWO_MIB): promised}))

    assert left(100, 100, 40) == 60  # promised, not touched yet
    assert left(100, 60, 40) == 60  # touched
    assert left(100, 20, 0) == 20  # others have 80
    assert left(100, 0, 120) == 0  # the pool was made smaller
    assert left(100, 100, 0, size=1 << 30) == 0
