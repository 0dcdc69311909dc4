"""A pod of containerd's CRI: its sandbox is accounted for and not run, the others find each other."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unimplemented
from shim import oci, sandbox, spec
from shim.oci import Limits
from shim.process import KILLED
from shim.sandbox import GUEST_SHM, Siblings
from tests.unit.rpc.wires import run
from tests.unit.shim.pods import NAMESPACES, POD, config, running_pod

ANNOTATIONS = {"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": POD}
SIBLINGS = Siblings(pids={70: POD, 71: "app"}, sandbox=POD, shm="/run/cri/shm")


def joined(**paths: str) -> dict[str, Any]:
    """A config.json whose namespaces of these kinds have paths."""
    entries = [
        {"type": entry["type"], "path": paths[entry["type"]]} if entry["type"] in paths else entry
        for entry in NAMESPACES
    ]
    return config(linux={"namespaces": entries})


def namespaces_of(document: dict[str, Any], siblings: Siblings = SIBLINGS) -> dict[str, str]:
    guest = spec.for_guest(oci.parse(document), "second", siblings)
    return {entry["type"]: entry.get("path", "") for entry in guest.document["linux"]["namespaces"]}


def pod_config(shm: Path | None = None, **changes: Any) -> dict[str, Any]:
    mounts = (
        [{"destination": "/dev/shm", "type": "bind", "source": str(shm), "options": ["rbind"]}] if shm else []
    )
    return config(annotations=ANNOTATIONS, mounts=mounts, **changes)


# --- what is asked of the guest ---


def test_the_sandboxs_ipc_and_uts_are_the_guests_and_its_pids_are_made() -> None:
    wanted = joined(
        ipc="/proc/70/ns/ipc", uts="/proc/70/ns/uts", pid="/proc/70/ns/pid", network="/proc/70/ns/net"
    )
    assert namespaces_of(wanted) == {"pid": f"{api.NAMESPACES}/{POD}/pid", "mount": "", "cgroup": ""}


def test_another_containers_namespace_is_named_by_its_id() -> None:
    """As an ephemeral container with a target has it."""
    found = namespaces_of(joined(pid="/proc/71/ns/pid", ipc="/proc/71/ns/ipc"))
    assert found["pid"] == f"{api.NAMESPACES}/app/pid"
    assert found["ipc"] == f"{api.NAMESPACES}/app/ipc"
    assert found["uts"] == ""


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("pid", "/proc/72/ns/pid"),
        ("pid", "/proc/70/ns/ipc"),
        ("pid", "/proc/70/ns/pid/../pid"),
        ("ipc", "/run/pod/70/ipc"),
    ],
)
def test_a_namespace_that_is_not_the_pods_is_refused(kind: str, path: str) -> None:
    entries = [*(entry for entry in NAMESPACES if entry["type"] != kind), {"type": kind, "path": path}]
    with pytest.raises(Unimplemented, match=f"{kind} namespace {path}: "):
        spec.for_guest(oci.parse(config(linux={"namespaces": entries})), "second", SIBLINGS)


MAPPED = {
    "uidMappings": [{"containerID": 0, "hostID": 100000, "size": 65536}],
    "gidMappings": [{"containerID": 0, "hostID": 200000, "size": 65536}],
}


def with_users(path: str = "") -> dict[str, Any]:
    """linux of a config.json."""
    users = {"type": "user", **({"path": path} if path else {})}
    return {"namespaces": [*NAMESPACES, users], **MAPPED}


@pytest.mark.parametrize("path", ["", "/run/cri/sandboxes/web/userns"])
def test_a_pod_with_users_of_its_own_has_them_in_the_guest(path: str) -> None:
    """containerd 1.7 asks for a new namespace, 2.x for one that it has made, which is not opened."""
    document = pod_config(linux=with_users(path))
    spec.refuse_host_access(oci.parse(document))
    assert sandbox.has_pods_users(oci.parse(document), sandbox.ALONE)


@pytest.mark.parametrize(
    ("path", "siblings", "found"),
    [
        ("", sandbox.ALONE, api.POD_USERS),
        ("", SIBLINGS, ""),
        ("/proc/70/ns/user", SIBLINGS, api.POD_USERS),
        ("/proc/71/ns/user", SIBLINGS, f"{api.NAMESPACES}/app/user"),
    ],
    ids=["first", "another", "sandbox", "joined"],
)
def test_whose_users_a_container_has(path: str, siblings: Siblings, found: str) -> None:
    guest = spec.for_guest(oci.parse(config(linux=with_users(path))), "second", siblings)
    linux = guest.document["linux"]
    assert {entry["type"]: entry.get("path", "") for entry in linux["namespaces"]}["user"] == found
    assert {name: linux[name] for name in MAPPED} == MAPPED
    assert sandbox.has_pods_users(oci.parse(config(linux=with_users(path))), siblings) is (
        siblings is sandbox.ALONE
    )


def test_the_users_of_a_process_of_the_hosts_are_none_to_join() -> None:
    with pytest.raises(Unimplemented, match="user namespace /proc/1/ns/user: "):
        spec.refuse_host_access(oci.parse(config(linux=with_users("/proc/1/ns/user"))))


@pytest.mark.parametrize(
    ("linux", "words"),
    [
        ({**MAPPED}, "without a user namespace"),
        ({"uidMappings": MAPPED["uidMappings"]}, "without a user namespace"),
        ({"namespaces": [*NAMESPACES, {"type": "user"}]}, "do not both say"),
        ({**with_users(), "gidMappings": None}, "do not both say"),
        ({**with_users(), "gidMappings": [{"size": 0}]}, "linux.gidMappings: 0 0 0 are no IDs"),
        ({**with_users(), "gidMappings": [{"hostID": -1, "size": 1}]}, "0 -1 1 are no IDs"),
        ({**with_users(), "uidMappings": [{"hostID": 2**32 - 2, "size": 2}]}, "are no IDs"),
        ({**with_users(), "uidMappings": [{"hostID": "0", "size": 2}]}, "is not of type int"),
        ({**with_users(), "uidMappings": [{"size": 1}] * 341}, "340 at most"),
    ],
)
def test_mappings_that_are_none_are_refused(linux: dict[str, Any], words: str) -> None:
    document = config(linux={"namespaces": NAMESPACES, **linux})
    with pytest.raises(InvalidArgument, match=words):
        spec.refuse_host_access(oci.parse(document))


def test_the_pods_shared_memory_is_the_guests_wherever_it_is_mounted(tmp_path: Path) -> None:
    bind = {"type": "bind", "options": ["rbind", "ro"]}
    mounts = [
        {"destination": "/dev/shm", "source": "/run/cri/shm", **bind},
        {"destination": "/also", "source": "/run/cri/shm", **bind},
        {"destination": "/volume", "source": str(tmp_path), **bind},
    ]
    guest = spec.for_guest(oci.parse(config(mounts=mounts)), "second", SIBLINGS)
    assert [mount["source"] for mount in guest.document["mounts"][:2]] == [GUEST_SHM, GUEST_SHM]
    assert guest.document["mounts"][1]["options"] == ["rbind", "ro"]
    assert [entry.source for entry in guest.shared] == [str(tmp_path)]


def test_what_the_guest_makes_for_a_pod(tmp_path: Path) -> None:
    about = os.statvfs(tmp_path)
    pod = pod_config(tmp_path, linux={"namespaces": NAMESPACES, "sysctl": {"kernel.msgmax": "9"}})
    request = sandbox.pod_request(oci.parse(pod), POD, str(tmp_path))
    assert (request.container_id, request.shm_path) == (POD, GUEST_SHM)
    assert request.shm_bytes == about.f_blocks * about.f_frsize
    assert request.sysctls == {"kernel.msgmax": "9"}
    without = sandbox.pod_request(oci.parse(pod_config()), POD, "")
    assert (without.shm_path, without.shm_bytes, without.sysctls) == ("", 0, {})
    of_no_host = sandbox.pod_request(oci.parse(pod_config()), POD, GUEST_SHM)
    assert (of_no_host.shm_path, of_no_host.shm_bytes) == (GUEST_SHM, 64 << 20)


def test_a_shared_memory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"mount /dev/shm: source .*gone: No such file"):
        sandbox.pod_request(oci.parse(pod_config()), POD, str(tmp_path / "gone"))


def test_the_kubelets_limits_of_the_pod_are_read() -> None:
    names = {"memory": "1048576", "cpu-quota": "50000", "cpu-period": "100000", "cpu-shares": "2"}
    given = {f"io.kubernetes.cri.sandbox-{name}": text for name, text in names.items()}
    assert sandbox.limits_of(oci.parse(config(annotations=given))) == Limits(1 << 20, 50_000, 100_000)
    assert sandbox.limits_of(oci.parse(config())) == Limits()
    with pytest.raises(InvalidArgument, match="sandbox-memory: 'much' is no number"):
        sandbox.limits_of(oci.parse(config(annotations={"io.kubernetes.cri.sandbox-memory": "much"})))


# --- its life ---


def test_the_guest_makes_the_users_of_a_pod_before_anything_in_it(tmp_path: Path) -> None:
    """Once: a container that comes later has others, or joins these."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run(document=config(linux=with_users()))
            asked = tested.agent.users
            assert asked is not None
            for mapping, outside in ((asked.uids, 100000), (asked.gids, 200000)):
                assert [(line.inside, line.outside, line.size) for line in mapping] == [(0, outside, 65536)]
            await tested.run("second", document=config(linux=with_users()))
            calls = tested.agent.calls
            assert calls.count("MakeUsers") == 1
            assert calls.index("MakeUsers") < calls.index("CreateContainer")

    run(life())


def test_nothing_of_a_sandbox_runs_in_the_guest(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run(document=pod_config())
            assert tested.agent.containers == {}
            assert tested.agent.calls.count("MakePod") == 1
            assert not {"CreateContainer", "StartContainer"} & set(tested.agent.calls)
            assert tested.state()["containers"][0]["state"] == "running"
            assert Metrics.decode(await tested.pod.stats(POD)) == Metrics()
            for ask in (tested.pod.pause(POD), tested.pod.resume(POD), tested.pod.update(POD, b"{}")):
                with pytest.raises(FailedPrecondition, match="nothing of it runs in the virtual machine"):
                    await ask
            with pytest.raises(FailedPrecondition, match="exec: container web is its pod's sandbox"):
                tested.add_exec("shell")
            assert container.pid == tested.anchors.pids[0] + 1_000_000

    run(life())


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGKILL, KILLED), (signal.SIGTERM, 0), (signal.SIGINT, 0)]
)
def test_a_sandbox_ends_by_the_signals_that_end_a_pause_program(
    tmp_path: Path, number: int, status: int
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run(document=pod_config())
            await tested.run("app")
            await tested.pod.kill(POD, "", signal.SIGHUP)
            assert not tested.pod.container(POD).init.ended
            await tested.pod.kill(POD, "", number)
            assert tested.told[-1] == f"exit web {status}"
            assert not tested.pod.container("app").init.ended
            with pytest.raises(NotFound, match="has ended already"):
                await tested.pod.kill(POD, "", number)
            await tested.pod.delete(POD)
            assert tested.told[-2:] == ["exit app 137", f"delete web {status}"]

    run(life())


def test_a_sandbox_ends_with_its_machine(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run(document=pod_config())
            tested.guest.machine.qemu.kill()
            await tested.pod.container(POD).init.exited.wait()
            assert tested.told[-1] == "exit web 137"

    run(life())


def test_the_others_join_the_sandbox_by_the_pid_that_was_told(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            pod = await tested.run(document=pod_config())
            paths = {kind: f"/proc/{pod.pid}/ns/{kind}" for kind in ("pid", "ipc", "uts")}
            await tested.run("app", document=joined(**paths))
            document = json.loads(tested.agent.process("app").document)
            assert {"type": "pid", "path": f"{api.NAMESPACES}/web/pid"} in document["linux"]["namespaces"]

    run(life())


def test_a_pod_that_the_guest_refuses_leaves_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.fails["MakePod"] = AlreadyExists("this guest is that of pod other")
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(AlreadyExists, match="pod other"):
                await tested.create(document=pod_config())
            assert list(tested.guest.machine.share.iterdir()) == []
            assert (tested.pod.containers, tested.told) == ({}, [])
            assert len(os.listdir("/proc/self/fd")) == before

    run(life())
