"""CPUs that are a pod's alone: which it may have, who hears what if none are free, and what runs where."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config.settings import Settings
from rpc.errors import CasemateError, ResourceExhausted, Unavailable
from shim import dedicated, reclaim, shortage
from shim.cgroup import Hierarchy
from shim.cleanup import clean_pod
from shim.dedicated import may_run_on
from shim.giving import Given, Giver
from shim.hugepages import Ram
from shim.journal import Kind, read_journal
from shim.vm.backing import Cell
from shim.vm.pinning import Pinning
from tests.unit.shim.devicehosts import FIRST, SECOND, DeviceHost, settings_in_memory, wishes
from tests.unit.shim.devicepods import given_pod, in_a_loop
from tests.unit.shim.pods import POD, config
from tests.unit.vfio.machines import H100, INTEL_PORT
from tests.unit.vfio.trees import ROOT_PORT, Acs
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import NotEnough

FAR = "10:00.0"
DEDICATED = '[profiles.default]\ncpu_policy = "dedicated"\n'


@pytest.fixture
def settings() -> Iterator[Settings]:
    with settings_in_memory() as settings:
        yield settings


@pytest.fixture
def may(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the pod's cpuset has, to be changed."""

    def change(*cpus: int) -> None:
        monkeypatch.setattr(dedicated, "may_run_on", lambda _: list(cpus))

    change(*range(16))
    return change


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may: Any) -> DeviceHost:
    """Two nodes of four cores, whose threads are 0 and 8, 1 and 9 and so on. FAR is of node 1."""
    host = DeviceHost(tmp_path / "host")
    bus = host.tree.root_bus(0x0F, 1)
    host.tree.function(host.tree.bridge(bus, INTEL_PORT, ROOT_PORT, acs=Acs()), H100)
    host.look_again()
    host.memory(0, 1, cpus="0-15")
    host.tree.put("sys/devices/system/node/online", "0-1\n")
    host.tree.put("sys/devices/system/node/node0/cpulist", "0-3,8-11\n")
    host.tree.put("sys/devices/system/node/node1/cpulist", "4-7,12-15\n")
    for cpu in range(16):
        at = f"sys/devices/system/cpu/cpu{cpu}/topology/core_cpus_list"
        host.tree.put(at, f"{cpu % 8},{cpu % 8 + 8}\n")
    monkeypatch.setattr(shortage, "huge_pages_limit", lambda _: None)
    monkeypatch.setattr(shortage, "limit_of", lambda *_: None)
    return host


def alone(host: DeviceHost, settings: Settings, count: int, pod: str = "web") -> Pinning:
    return pinning(host.giver(settings, pod).take_cpus(count))


def take(host: DeviceHost, settings: Settings, wish: str, count: int, pod: str = "web") -> Given:
    return host.giver(settings, pod).take(wishes(text=wish), Ram(256 << 20, "auto"), count)


def pinning(given: Given) -> Pinning:
    assert given.pinning is not None
    return given.pinning


# --- which ---


def test_each_cpu_is_one_of_the_hosts_and_the_core_is_nobody_elses(
    host: DeviceHost, settings: Settings
) -> None:
    assert alone(host, settings, 1) == Pinning((0,), (8,))
    assert alone(host, settings, 2, "other") == Pinning((1, 9), (1, 9))
    with Ledger(Path(settings.ledger_dir)) as ledger:
        assert [claim.own_cpus for claim in ledger.claims()] == [(0, 8), (1, 9)]


def test_they_are_of_the_devices_node_in_one_claim_with_them(host: DeviceHost, settings: Settings) -> None:
    given = take(host, settings, FAR, 3)
    assert pinning(given) == Pinning((4, 5, 12), (13,))
    assert given.backing.cells == (Cell(1, 256 << 20),)  # its own CPUs say more than a node's
    with Ledger(Path(settings.ledger_dir)) as ledger:
        (claim,) = ledger.claims()
    assert (claim.id, dict(claim.cpus)) == (given.claim, {1: (4, 5, 12, 13)})
    assert [str(each) for each in claim.addresses] == [f"0000:{FAR}"]


def test_of_two_nodes_each_guests_node_has_its_own(host: DeviceHost, settings: Settings) -> None:
    given = take(host, settings, f"{FIRST}, {FAR}", 3)
    assert pinning(given) == Pinning((0, 8, 4), (12,))  # as libvirt is told: CPUs 0 and 1, and 2


def test_only_what_the_cpuset_and_the_operator_leave_is_claimed(
    host: DeviceHost, settings: Settings, may: Any
) -> None:
    may(1, 2, 3, 9, 10)  # not all of core 3
    own = settings.replace(dedicated_cpus="2-7,10-15")
    assert alone(host, own, 1) == Pinning((2,), (1, 9))
    with pytest.raises(NotEnough, match="2 CPUs of NUMA node 0 "):
        alone(host, own, 2, "other")
    assert alone(host, settings, 2, "other") == Pinning((1, 9), (1, 9))


def test_a_machine_of_shared_cpus_keeps_off_those_that_pods_may_have_alone(
    host: DeviceHost, settings: Settings
) -> None:
    own = settings.replace(dedicated_cpus="2-3,10-11")
    assert take(host, own, str(FIRST), 0).backing.cells[0].cpus == (0, 1, 8, 9)
    assert take(host, settings, str(SECOND), 0, "other").backing.cells[0].cpus == (0, 1, 2, 3, 8, 9, 10, 11)


def test_a_host_that_tells_of_no_nodes_has_cpus(host: DeviceHost, settings: Settings) -> None:
    (host.tree.sys / "devices/system/node/online").unlink()
    host.tree.put("sys/devices/system/cpu/online", "0-15\n")
    assert alone(host, settings, 2) == Pinning((0, 8), (0, 8))


# --- who hears what ---


def test_who_gets_none_hears_who_has_them_and_has_no_device_either(
    host: DeviceHost, settings: Settings
) -> None:
    take(host, settings, FAR, 5, "first")
    with pytest.raises(ResourceExhausted) as caught:
        alone(host, settings, 11)
    assert caught.value.brief == "not free: 1 CPUs of 2 NUMA nodes (11 wanted, 10 free)"
    assert caught.value.details == "CPUs 4-6,12-14 of NUMA node 1 are claimed, pod default/first"
    alone(host, settings, 8, "second")
    before = host.states(settings), host.drivers()
    with pytest.raises(CasemateError, match=r"not free: 2 CPUs of NUMA node 0 \(2 wanted, 0 free\)"):
        take(host, settings, str(FIRST), 2, "third")
    assert (host.states(settings), host.drivers()) == before


def test_a_refused_device_leaves_cpus_free(host: DeviceHost, settings: Settings) -> None:
    take(host, settings, str(FIRST), 0, "first")
    with pytest.raises(ResourceExhausted, match=f"not free: {FIRST}"):
        take(host, settings, str(FIRST), 2)
    with Ledger(Path(settings.ledger_dir)) as ledger:
        assert [claim.own_cpus for claim in ledger.claims()] == [()]


def test_what_was_given_back_is_free(host: DeviceHost, settings: Settings) -> None:
    for _ in range(3):
        given = host.giver(settings).take_cpus(16)
        host.giver(settings).give_back(given.claim)
    with Ledger(Path(settings.ledger_dir)) as ledger:
        assert ledger.claims() == []


# --- of a pod ---


@pytest.fixture
def giving(host: DeviceHost, monkeypatch: pytest.MonkeyPatch) -> DeviceHost:
    monkeypatch.setattr(Giver, "of", lambda _, __, settings: host.giver(settings, POD))
    return host


def claimed(settings: Settings) -> list[tuple[int, ...]]:
    with Ledger(Path(settings.ledger_dir)) as ledger:
        return [claim.own_cpus for claim in ledger.claims()]


@in_a_loop
async def test_a_pod_has_them_from_its_machine_on_until_delete_is_answered(
    giving: DeviceHost, tmp_path: Path, settings: Settings
) -> None:
    async with given_pod(tmp_path, settings=DEDICATED, document=config()) as pod:
        await pod.create()
        (request,) = pod.requests
        assert (request.functions, request.backing, request.pinning) == ((), None, Pinning((0,), (8,)))
        assert claimed(settings) == [(0, 8)]
        await pod.test.pod.start(POD)
        await pod.test.exit()
        assert claimed(settings) == [(0, 8)]
        await pod.test.pod.delete(POD)
        assert claimed(settings) == []


@in_a_loop
async def test_a_machine_that_cannot_be_made_leaves_them_free(
    giving: DeviceHost, tmp_path: Path, settings: Settings
) -> None:
    failure = Unavailable("QEMU did not start")
    async with given_pod(tmp_path, settings=DEDICATED, document=config(), fails=failure) as pod:
        with pytest.raises(Unavailable, match="QEMU did not start"):
            await pod.test.pod.machine()
        assert [request.pinning for request in pod.requests] == [Pinning((0,), (8,))]
        assert claimed(settings) == []


@in_a_loop
async def test_what_a_killed_shim_had_is_taken_back_from_its_journal(
    host: DeviceHost, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Giver, "of", lambda _, __, settings: host.giver(settings, POD, started=1))
    monkeypatch.setattr(reclaim, "Bus", lambda _: host.pci())
    async with given_pod(tmp_path, settings=DEDICATED, document=config()) as pod:
        await pod.test.pod.machine()
        paths = pod.test.pod.paths
        assert [entry.kind for entry in read_journal(paths.journal)] == [Kind.DEVICES]
        assert f"claim of CPUs 0,8, pod default/{POD}" in clean_pod(paths)
        assert claimed(settings) == []
        paths.directory.mkdir(parents=True)  # the pod of this test ends as if it lived


@in_a_loop
async def test_a_pod_of_shared_cpus_claims_nothing(
    giving: DeviceHost, tmp_path: Path, settings: Settings
) -> None:
    async with given_pod(tmp_path, document=config()) as pod:
        await pod.test.pod.machine()
        assert [request.pinning for request in pod.requests] == [None]
        assert not os.path.exists(settings.ledger_dir)  # noqa: ASYNC240 - it is in memory


# --- the cpuset ---


@pytest.mark.parametrize("name", ["cpuset.cpus.effective", "cpuset.effective_cpus"])
def test_the_nearest_cgroup_that_has_a_cpuset_says_which(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "cpuset/pods/casemate-1"
    inner.mkdir(parents=True)
    other = tmp_path / "memory"
    other.mkdir()
    (tmp_path / "cpuset" / name).write_text("0-15\n")
    (tmp_path / "cpuset/pods" / name).write_text("2-3,6\n")
    found = [Hierarchy(other, other), Hierarchy(tmp_path / "cpuset", inner)]
    assert may_run_on("/proc", found) == [2, 3, 6]


def test_without_a_cpuset_it_is_what_the_process_runs_on(tmp_path: Path) -> None:
    assert set(may_run_on("/proc", [Hierarchy(tmp_path, tmp_path)])) == os.sched_getaffinity(0)


def test_this_process_may_run_on_what_it_runs_on() -> None:
    assert set(may_run_on("/proc")) >= os.sched_getaffinity(0)
