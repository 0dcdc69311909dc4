"""What the RAM of a machine with devices is made of: pages, of which node, and why none but ordinary ones."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.settings import Settings
from rpc.errors import CasemateError, FailedPrecondition, ResourceExhausted
from shim import shortage
from shim.cgroup import Hierarchy
from shim.giving import Given
from shim.hugepages import Ram
from shim.shortage import Limit
from shim.vm.backing import (
    ANYWHERE,
    PREFERRED,
    STRICT,
    Backing,
    Cell,
    allowed_cpus,
    allowed_nodes,
    cells_of,
    cpus_of,
)
from tests.unit.shim.devicehosts import FIRST, SECOND, DeviceHost, settings_in_memory, wishes
from tests.unit.vfio.machines import H100, INTEL_PORT
from tests.unit.vfio.trees import ROOT_PORT, Acs
from vfio.ledger.demand import HostNode, HugePages, Pages
from vfio.ledger.ledger import Ledger

MIB, GIB = 1 << 20, 1 << 30
SMALL, LARGE = 2 * MIB, GIB
FAR = "10:00.0"
NODE_0, NODE_1 = f"{FIRST}", FAR


@pytest.fixture
def settings() -> Iterator[Settings]:
    with settings_in_memory() as settings:
        yield settings


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DeviceHost:
    """Two nodes: those of every DeviceHost are of node 0, and an H100 of node 1."""
    host = DeviceHost(tmp_path / "host")
    bus = host.tree.root_bus(0x0F, 1)
    host.tree.function(host.tree.bridge(bus, INTEL_PORT, ROOT_PORT, acs=Acs()), H100)
    host.look_again()
    host.memory(0, 1)
    host.tree.put("sys/devices/system/node/online", "0-1\n")
    for node in (0, 1):
        host.tree.put(f"sys/devices/system/node/node{node}/cpulist", f"{node}\n")
    monkeypatch.setattr(shortage, "huge_pages_limit", lambda _: None)
    monkeypatch.setattr(shortage, "limit_of", lambda *_: None)
    return host


def pages(host: DeviceHost, node: int, size: int, total: int, free: int | None = None) -> None:
    at = f"sys/devices/system/node/node{node}/hugepages/hugepages-{size >> 10}kB"
    host.tree.put(f"{at}/nr_hugepages", f"{total}\n")
    host.tree.put(f"{at}/free_hugepages", f"{total if free is None else free}\n")


def take(
    host: DeviceHost, settings: Settings, wish: str, mib: int = 256, how: str = "auto", pod: str = "web"
) -> Given:
    return host.giver(settings, pod).take(wishes(text=wish), Ram(mib * MIB, how))


def refusal(host: DeviceHost, settings: Settings, wish: str, mib: int = 256) -> CasemateError:
    """Nothing is claimed by it, and nothing bound."""
    before = host.states(settings), host.drivers()
    with pytest.raises(CasemateError) as caught:
        take(host, settings, wish, mib, "required", "other")
    assert (host.states(settings), host.drivers()) == before
    return caught.value


# --- of a pod ---


def test_they_are_of_the_devices_node_and_in_the_ledger(host: DeviceHost, settings: Settings) -> None:
    for node in (0, 1):
        pages(host, node, SMALL, 200)
    given = take(host, settings, NODE_1)
    assert given.backing == Backing(SMALL, "", (Cell(1, 256 * MIB, STRICT),))
    with Ledger(Path(settings.ledger_dir)) as ledger:
        (claim,) = ledger.claims()
    assert (dict(claim.pages), claim.page_bytes) == ({1: 128}, SMALL)
    host.giver(settings).give_back(given.claim)
    assert take(host, settings, NODE_1).backing.page_bytes == SMALL


def test_devices_of_two_nodes_have_half_of_the_memory_on_each(host: DeviceHost, settings: Settings) -> None:
    for node in (0, 1):
        pages(host, node, SMALL, 200)
    cells = take(host, settings, f"{NODE_0}, {NODE_1}", 258).backing.cells
    assert cells == (Cell(0, 130 * MIB, STRICT), Cell(1, 128 * MIB, STRICT))


def test_cpus_run_near_the_memory_as_far_as_the_pods_cgroup_lets_them(
    host: DeviceHost, settings: Settings
) -> None:
    host.tree.put("sys/devices/system/node/node0/cpulist", "0-3\n")
    host.tree.put("sys/devices/system/node/node1/cpulist", "4-7\n")
    host.memory(0, 1, cpus="5-8")
    cells = take(host, settings, f"{NODE_0}, {NODE_1}").backing.cells
    assert [cell.cpus for cell in cells] == [(), (5, 6, 7)]


def test_the_largest_that_suffice_are_taken(host: DeviceHost, settings: Settings) -> None:
    pages(host, 0, LARGE, 1)
    pages(host, 0, SMALL, 1024)
    assert take(host, settings, NODE_0, 1024).backing.page_bytes == LARGE
    assert take(host, settings, str(SECOND), 1024, pod="other").backing.page_bytes == SMALL


def test_without_enough_ram_is_of_ordinary_pages_and_says_why(host: DeviceHost, settings: Settings) -> None:
    pages(host, 0, LARGE, 1)
    pages(host, 0, SMALL, 200, free=100)
    backing = take(host, settings, NODE_0).backing
    assert backing == Backing(0, backing.why, (Cell(0, 256 * MIB, PREFERRED),))
    assert "256 MiB are no whole number of 1 GiB" in backing.why
    assert "28 huge pages of 2048 KiB of NUMA node 0 (128 wanted, 100 free)" in backing.why
    assert str(backing) == f"ordinary pages, NUMA nodes 0 ({backing.why})"


def test_what_other_pods_were_promised_is_not_free(host: DeviceHost, settings: Settings) -> None:
    """Of two that race for the last, one hears who has them: also before that one has touched any."""
    pages(host, 0, SMALL, 200)
    take(host, settings, NODE_0)
    error = refusal(host, settings, str(SECOND))
    assert isinstance(error, ResourceExhausted)
    assert "56 huge pages of 2048 KiB of NUMA node 0 (128 wanted, 72 free)" in error.brief
    assert error.details == "128 huge pages of NUMA node 0 are claimed, pod default/web"


def test_where_they_are_required_a_host_without_says_how_many_it_lacks(
    host: DeviceHost, settings: Settings
) -> None:
    error = refusal(host, settings, f"{NODE_0}, {NODE_1}")
    assert isinstance(error, ResourceExhausted)
    for node in (0, 1):
        missing = f"64 huge pages of 2048 KiB of NUMA node {node} (64 wanted, 0 free)"
        assert missing in error.brief


def test_where_none_would_ever_do_that_is_another_error(
    host: DeviceHost, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages(host, 0, SMALL, 200)
    assert "129 MiB are no whole number of 2 MiB" in refusal(host, settings, NODE_0, 129).brief
    limit = Limit(0, Path("/sys/fs/cgroup/pod"))
    monkeypatch.setattr(shortage, "huge_pages_limit", lambda _: limit)
    error = refusal(host, settings, NODE_0)
    assert isinstance(error, FailedPrecondition)
    assert "of huge pages of 2 MiB, the cgroup /sys/fs/cgroup/pod may have 0 MiB" in error.brief
    assert "0 MiB" in take(host, settings, NODE_0).backing.why


def test_never_takes_none(host: DeviceHost, settings: Settings) -> None:
    pages(host, 0, SMALL, 200)
    assert take(host, settings, NODE_0, how="never").backing.page_bytes == 0


def test_they_are_not_worth_devices_far_from_each_other(host: DeviceHost, settings: Settings) -> None:
    pages(host, 1, SMALL, 200)
    pages(host, 0, SMALL, 64)
    two = "count=2,device=2330"
    given = take(host, settings, two)
    assert [each.address for each in given.functions] == [str(FIRST), str(SECOND)]
    assert given.backing.page_bytes == 0
    host.giver(settings).give_back(given.claim)
    assert len(take(host, settings, two, how="required").backing.cells) == 2  # unless they are a must


def test_devices_as_good_where_they_are_free_are_preferred(host: DeviceHost, settings: Settings) -> None:
    pages(host, 1, SMALL, 200)
    given = take(host, settings, "device=2330")
    assert ([each.node for each in given.functions], given.backing.page_bytes) == ([1], SMALL)


def test_a_host_of_one_node_has_nothing_to_tell_the_guest_of(host: DeviceHost, settings: Settings) -> None:
    host.tree.put("sys/devices/system/node/online", "0\n")
    pages(host, 0, SMALL, 200)
    assert take(host, settings, NODE_0).backing == Backing(SMALL)
    backing = take(host, settings, str(SECOND), pod="other").backing
    assert (backing.page_bytes, backing.cells) == (0, ())


def test_memory_that_a_cpuset_keeps_from_the_pod_is_not_asked_for(
    host: DeviceHost, settings: Settings
) -> None:
    host.memory(0)
    pages(host, 1, SMALL, 200)
    backing = take(host, settings, NODE_1).backing
    assert (backing.page_bytes, backing.cells) == (0, (Cell(1, 256 * MIB, ANYWHERE),))


def test_ram_of_ordinary_pages_has_to_fit_into_the_pods_cgroup(
    host: DeviceHost, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = Limit(256 * MIB, Path("/sys/fs/cgroup/pod"))
    monkeypatch.setattr(shortage, "limit_of", lambda *_: limit)
    with pytest.raises(ResourceExhausted, match="may have 256 MiB: a machine takes 320 MiB"):
        take(host, settings, NODE_0)
    assert (host.states(settings), host.kernel.written) == ({}, [])
    pages(host, 0, SMALL, 128)
    assert take(host, settings, NODE_0).backing.page_bytes == SMALL  # charged to no memory controller


# --- by itself ---


def choices(mib: int, how: str, *nodes: HostNode) -> object:
    return list(Ram(mib * MIB, how).choices(nodes, lambda _: None))


def test_sizes_that_the_host_has_are_tried_from_the_largest_on() -> None:
    node = HostNode(0, pages={SMALL: Pages(8, 0), LARGE: Pages(1, 1), 64 << 10: Pages(0, 0)})
    assert choices(2048, "auto", node) == [HugePages(2, LARGE), HugePages(1024, SMALL)]
    assert choices(2048, "auto", HostNode(0)) == ["this host has no huge pages"]
    assert choices(2048, "required", HostNode(0)) == [HugePages(1024, SMALL)]
    assert choices(2048, "never", node) == ['the profile says hugepages = "never"']


@pytest.mark.parametrize(("vcpus", "expected"), [(1, ["0", ""]), (2, ["0", "1"]), (5, ["0 1 2", "3 4"])])
def test_cpus_are_divided_in_blocks(vcpus: int, expected: list[str]) -> None:
    assert [" ".join(map(str, each)) for each in cpus_of(vcpus, 2)] == expected


def test_memory_of_ordinary_pages_is_divided_in_whole_mib() -> None:
    cells = cells_of(101 * MIB, [0, 2, 5], [0, 1, 2])
    assert cells == (Cell(0, 34 * MIB), Cell(2, 34 * MIB), Cell(5, 33 * MIB, ANYWHERE))
    assert Backing(0, "", cells).cell_of(2) == 1
    assert Backing(0, "", cells).cell_of(None) is None


def test_allowed_nodes_are_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Cpus_allowed_list:\t\nMems_allowed_list:\t0-1,4\n")
    assert allowed_nodes(str(tmp_path)) == [0, 1, 4]
    assert allowed_cpus(str(tmp_path)) == []
    assert 0 in allowed_nodes("/proc")
    assert set(allowed_cpus("/proc")) == os.sched_getaffinity(0)


@pytest.mark.parametrize(("name", "none"), [("max", "max"), ("limit_in_bytes", str((1 << 63) - 4096))])
def test_what_a_cgroup_may_have_of_a_size(tmp_path: Path, name: str, none: str) -> None:
    inner = tmp_path / "pods/casemate-1"
    inner.mkdir(parents=True)
    (inner / f"hugetlb.2MB.{name}").write_text(f"{none}\n")
    (inner / f"hugetlb.1GB.{name}").write_text("0\n")
    (inner.parent / f"hugetlb.2MB.{name}").write_text(f"{64 * MIB}\n")
    (tmp_path / "cpu").mkdir()
    found = [Hierarchy(tmp_path / "cpu", tmp_path / "cpu"), Hierarchy(tmp_path, inner)]
    assert shortage.huge_pages_limit(SMALL, found) == Limit(64 * MIB, inner.parent)
    assert shortage.huge_pages_limit(LARGE, found) == Limit(0, inner)
    assert shortage.huge_pages_limit(64 << 10, found) is None
