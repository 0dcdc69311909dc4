"""CPUs that are a pod's alone, on this machine: what runs where, who is refused, and when they are free."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from config.annotations import VCPUS
from config.cpulist import numbers, ranges
from shim import cgroup
from shim.dedicated import may_run_on
from tests.vm.faults import kill_and_wait, refused, shim_pid
from tests.vm.operator import casemate
from tests.vm.pods import Pods

REFUSED_S = 40.0
FREE_S = 60.0
"""From a shim's end until containerd has had its pod cleaned up."""


@pytest.fixture
def own(pods: Pods) -> Iterator[Pods]:
    """Pods whose profile has dedicated CPUs, and a ledger of the test's."""
    ledger = pods.ctr.instance.work / f"ledger-{pods.ctr.new_id()}"
    pods.ctr.instance.configure(
        f'ledger_dir = "{ledger}"\nallowed_annotations = ["{VCPUS}"]\n'
        '[profiles.default]\ncpu_policy = "dedicated"\n'
    )
    yield pods
    shutil.rmtree(ledger)


def vcpus(count: int) -> tuple[str, str]:
    return "--annotation", f"{VCPUS}={count}"


def claimed(pods: Pods) -> dict[str, list[int]]:
    """By pod, as the operator is shown."""
    shown = casemate(pods.ctr.instance, "gpu", "claims", "--json")
    assert shown.returncode == 0, shown.stderr
    claims = json.loads(shown.stdout)["claims"]
    return {claim["pod"]: [cpu for cpus in claim["cpus"].values() for cpu in cpus] for claim in claims}


def affinities(qemu_pid: int) -> tuple[list[list[int]], set[tuple[int, ...]]]:
    """Of each of the guest's CPUs, by its number; and all that QEMU's other threads have."""
    guests: dict[int, list[int]] = {}
    others = set()
    for task in Path(f"/proc/{qemu_pid}/task").iterdir():
        try:
            name, cpus = (task / "comm").read_text(), sorted(os.sched_getaffinity(int(task.name)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # one of QEMU's workers, which come and go
        if name.startswith("CPU "):
            guests[int(name.split()[1].partition("/")[0])] = cpus
        else:
            others.add(tuple(cpus))
    return [guests[number] for number in range(len(guests))], others


def check(pods: Pods, name: str, count: int) -> list[int]:
    """What is said of its CPUs is so. All that were claimed."""
    about, held = pods.state(name), claimed(pods)[name]
    assert len(set(about["cpus"])) == count
    assert set(about["cpus"]) <= set(held)
    guests, others = affinities(about["qemu_pid"])
    assert guests == [[cpu] for cpu in about["cpus"]]
    assert others == {tuple(about["emulator_cpus"])}
    return held


def test_a_guests_cpus_are_nobody_elses_until_the_pod_ends(own: Pods) -> None:
    everything = may_run_on("/proc")
    with own.detached("sleep", "1000") as first:
        assert own.state(first)["source"] == "restore"
        held = check(own, first, 1)
        left = len(everything) - len(held)
        result = own.run("true", options=vcpus(len(everything)))
        words = f"({len(everything)} wanted, {left} free)", f"are claimed, pod {own.ctr.namespace}/{first}"
        refused(result, "not free: ", *words, within_s=REFUSED_S)
        assert claimed(own) == {first: held}
        own.exec(first, "true").ok()
    assert claimed(own) == {}
    several = min(len(everything), 2)
    with own.detached("sleep", "1000", options=vcpus(several)) as second:
        assert own.state(second)["source"] == ("boot" if several > 1 else "restore")
        check(own, second, several)
    assert claimed(own) == {}


@contextmanager
def confined(pods: Pods, cpus: list[int]) -> Iterator[tuple[str, str]]:
    """Options for a pod whose parent has these CPUs of the host's for its cpuset."""
    top = Path(cgroup.CGROUPS, "cpuset")
    if not (top / "cpuset.cpus").exists():
        top = Path(cgroup.CGROUPS)
        if "cpuset" not in (top / "cgroup.subtree_control").read_text().split():
            pytest.skip("the cpuset controller is not enabled below the root")
    parent = top / f"{pods.ctr.namespace}-confined"
    parent.mkdir()
    try:
        (parent / "cpuset.mems").write_text(Path("/sys/devices/system/node/online").read_text())
        (parent / "cpuset.cpus").write_text(ranges(cpus))
        yield ("--cgroup", f"/{parent.name}/x")
    finally:
        for each in cgroup.hierarchies():
            path = each.mounted / parent.name
            if path.is_dir():
                path.rmdir()


def test_only_what_the_pods_cpuset_has_is_claimed(own: Pods) -> None:
    last = Path(f"/sys/devices/system/cpu/cpu{may_run_on('/proc')[-1]}/topology/core_cpus_list")
    core = numbers(last.read_text())
    with confined(own, core) as options:
        with own.detached("sleep", "1000", options=options) as name:
            assert check(own, name, 1) == core
            result = own.run("true", options=options)
            refused(result, "not free: 1 CPUs of NUMA node", "(1 wanted, 0 free)", within_s=REFUSED_S)
        assert claimed(own) == {}


def test_the_cpus_of_a_pod_whose_shim_is_killed_are_free(own: Pods) -> None:
    with own.detached("sleep", "1000") as name:
        check(own, name, 1)
        kill_and_wait(shim_pid(own.ctr.instance))
        deadline = time.monotonic() + FREE_S
        while claimed(own):  # containerd tells nobody when it has cleaned up: hence a bounded poll
            assert time.monotonic() < deadline
            time.sleep(0.1)
