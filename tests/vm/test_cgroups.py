"""What a pod runs on the host is counted and limited where its client says, and nowhere else."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from shim import cgroup
from shim.paths import pod_key
from tests.vm import faults
from tests.vm.pods import Pods, every_version


def places(pid: int) -> dict[str, str]:
    """By the names of a hierarchy's controllers, with the empty one for v2: as /proc/PID/cgroup has them."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {names: path for _, names, path in (line.split(":", 2) for line in lines)}


def processes(pods: Pods) -> dict[int, str]:
    """All that live in the shim's PID namespace: what the pod is on the host."""
    shim = faults.shim_pid(pods.ctr.instance)
    inside = os.readlink(f"/proc/{shim}/ns/pid")
    found = {}
    for pid in pods.ctr.instance.descendants():
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            if not Path(f"/proc/{pid}/cmdline").read_bytes():
                continue  # a zombie's is empty
            if os.readlink(f"/proc/{pid}/ns/pid") == inside:
                found[pid] = Path(f"/proc/{pid}/comm").read_text().strip()
    return found


def counted() -> set[str]:
    """The names of the hierarchies that the shim has to enter."""
    mounted = [str(one.mounted) for one in cgroup.hierarchies()]
    names = {"" if Path(path, "cgroup.controllers").exists() else None for path in mounted} - {None}
    return {name for name in places(os.getpid()) if name} | {name for name in names if name is not None}


@every_version
def test_all_that_a_pod_runs_is_below_the_parent_of_its_cgroup(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        own = f"/{pods.ctr.namespace}/casemate-{pod_key(pods.ctr.namespace, name)}"
        found = processes(pods)
        assert {"casemate-shim", "casemate-anchor", "virtiofsd"} < set(found.values())
        for pid, comm in found.items():
            inside = {names for names, path in places(pid).items() if path == own}
            assert inside == counted(), (comm, places(pid))
    assert [one.mounted for one in cgroup.hierarchies() if (one.mounted / own[1:]).exists()] == []


def test_memory_is_charged_to_the_parent(pods: Pods) -> None:
    """The guest's memory is by far most of it."""
    with pods.detached("sleep", "1000") as name:
        parent = next(
            path
            for path in (
                Path(cgroup.CGROUPS, "memory", pods.ctr.namespace),
                Path(cgroup.CGROUPS, pods.ctr.namespace),
            )
            if path.is_dir()
        )
        own = parent / f"casemate-{pod_key(pods.ctr.namespace, name)}"
        files = [own / known for known in ("memory.usage_in_bytes", "memory.current")]
        used = [int(file.read_text()) for file in files if file.exists()]
        if not used:
            pytest.skip(f"{parent} has no memory controller")  # v2, where ctr's parents are given none
        assert used[0] > 64 << 20


def test_systemds_form_is_a_path_of_slices(pods: Pods) -> None:
    stem = f"test{os.getpid()}"
    name = pods.ctr.new_id()
    slices = f"{stem}.slice/{stem}-pod.slice"
    try:
        with pods.detached("sleep", "1000", options=("--cgroup", f"{stem}-pod.slice:ctr:{name}")):
            shim = places(faults.shim_pid(pods.ctr.instance))
            own = [path for names, path in shim.items() if names in counted()]
            assert len(own) == len(counted())
            assert all(path.startswith(f"/{slices}/casemate-") for path in own)
        left = [path for one in cgroup.hierarchies() for path in (one.mounted / slices).glob("casemate-*")]
        assert left == []
    finally:
        for one in cgroup.hierarchies():
            for path in (one.mounted / slices, one.mounted / f"{stem}.slice"):
                if path.is_dir():
                    path.rmdir()


def test_a_container_without_a_cgroup_stays_in_containerds(pods: Pods) -> None:
    with pods.detached("sleep", "1000", options=("--cgroup", "")) as name:
        assert places(faults.shim_pid(pods.ctr.instance)) == places(pods.ctr.instance.containerd_pid)
        words = pods.paths(name).log.read_text()
    assert words.count("the container names no cgroup: the pod's processes stay in containerd's") == 1


def test_a_cgroup_that_cannot_be_is_refused_by_its_name(pods: Pods) -> None:
    """The kernel takes no cgroup with a line's end in its name."""
    result = pods.run("true", options=("--cgroup", f"/{pods.ctr.namespace}/a\nb/c"))
    faults.refused(result, f"cgroup {cgroup.CGROUPS}/", "Invalid argument", within_s=40)


def test_this_machine_has_what_is_tested_here() -> None:
    """Else every test above would be about nothing."""
    assert counted()
