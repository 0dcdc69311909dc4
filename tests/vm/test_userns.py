"""Containers and pods with user namespaces: whose IDs are whose, inside, on the host, and on volumes."""

import grp
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.vm import cri as support
from tests.vm.cri import FOREVER, SHIM_HANDLER, Cri, CriPod, failure
from tests.vm.loops import LOOK, SIZE, Loop
from tests.vm.pods import RUN_S, Pods, every_version

MAPPED = ("--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536")
FACTS = """\
import ctypes, json, os, socket, subprocess
def tried(function):
    try:
        function()
        return True
    except OSError as error:
        return error.strerror
def mount():
    if ctypes.CDLL(None, use_errno=True).mount(b"none", b"/mnt", b"tmpfs", 0, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
def read(path):
    with open(path) as file:
        return file.read()
def write(path, text):
    with open(path, "w") as file:
        file.write(text)
print(json.dumps({
    "ids": [os.getuid(), os.getgid()],
    "maps": [read(f"/proc/self/{kind}_map").split() for kind in ("uid", "gid")],
    "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in "user uts ipc net pid".split()},
    "passwd": os.stat("/etc/passwd").st_uid,
    "stdout": tried(lambda: write("/dev/stdout", "")),
    "swappiness": tried(lambda: write("/proc/sys/vm/swappiness", "5")),
    "msgmax": tried(lambda: write("/proc/sys/kernel/msgmax", "9001")),
    "mount": tried(mount),
    "device": tried(lambda: os.mknod("/srv/null", 0o20666, os.makedev(1, 3))),
    "hostname": tried(lambda: socket.sethostname("another")),
    "address": not subprocess.call("ip address add 10.9.8.7/32 dev lo 2>/dev/null", shell=True),
    "links": sorted(os.listdir("/sys/class/net")),
}))
"""
"""What a process is and may do."""
PRIVILEGED = {
    "stdout": True,
    "swappiness": "Permission denied",
    "msgmax": True,
    "mount": True,
    "device": "Operation not permitted",
    "hostname": True,
    "address": True,
}
"""Root of a user namespace with all capabilities: what belongs to the pod, and nothing of its kernel's."""


def maps(uid: int, gid: int) -> list[list[str]]:
    return [["0", str(outside), "65536"] for outside in (uid, gid)]


IN_LABELS = (*MAPPED, "--remap-labels")
"""Without it, ctr copies the whole image for other owners, which takes long, and keeps the copy."""


def volume(pods: Pods, name: str) -> tuple[Path, tuple[str, ...]]:
    """A directory that everybody may write to, and how to have it at /volume."""
    directory = pods.ctr.instance.work / pods.ctr.new_id(name)
    directory.mkdir()
    directory.chmod(0o777)
    return directory, ("--mount", f"type=bind,src={directory},dst=/volume,options=rbind:rw")


def lines(*ranges: tuple[int, int, int]) -> list[dict[str, int]]:
    return [{"containerID": inside, "hostID": outside, "size": size} for inside, outside, size in ranges]


def configured(pods: Pods, script: str, uids: list[dict[str, int]], gids: list[dict[str, int]]) -> list[str]:
    """What ctr of every version has to say for a shell script in a root file system of a mapped owner's."""
    root = pods.ctr.instance.work / pods.ctr.new_id("root")
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin/busybox")
    for name in ("sh", "cat", "id", "mount", "readlink", "sleep"):
        (root / "bin" / name).symlink_to("busybox")
    for path in (root, root / "bin", root / "bin/busybox"):
        os.chown(path, 100000, 200000)
    (root / "bin/busybox").chmod(0o700)
    document = json.loads(pods.ctr("oci", "spec").ok().out)
    document["root"] = {"path": str(root)}
    document["process"]["args"] = ["/bin/sh", "-c", script]
    document["linux"]["namespaces"].append({"type": "user"})
    document["linux"] |= {"uidMappings": uids, "gidMappings": gids}
    document["linux"].pop("cgroupsPath", None)
    path = root.parent / f"{root.name}.json"
    path.write_text(json.dumps(document))
    return ["run", "--runtime", pods.runtime, "--config", str(path)]


@every_version
@pytest.mark.client("ctr run --uidmap, --gidmap", "works", "root inside is nobody's root in the VM either")
def test_ids_of_a_container_are_others_outside(pods: Pods) -> None:
    """The shell is one that root alone may execute: whose root, the agent has to find out."""
    script = "cat /proc/self/uid_map /proc/self/gid_map; echo mine >/made; echo said >/dev/stdout"
    whole = lines((0, 100000, 65536)), lines((0, 200000, 65536))
    argv = configured(pods, f"{script}; mount -t tmpfs none /proc || exec sleep 1000", *whole)
    root = Path(argv[-1].removesuffix(".json"))
    name = pods.ctr.new_id()
    with pods.ctr.start(*argv, name) as running:
        try:
            said = running.read_until(b"said\n", RUN_S).split()
            assert said == [b"0", b"100000", b"65536", b"0", b"200000", b"65536", b"said"]
            look = "id -u; readlink /proc/1/ns/user; readlink /proc/self/ns/user"
            uid, first, own = pods.exec(name, "/bin/sh", "-c", look).ok().out.split()
            assert (uid, first) == ("0", own)
            owners = (root / "made").stat()
            assert (owners.st_uid, owners.st_gid) == (100000, 200000)
            refused = pods.exec(name, "/bin/sh", "-c", "true", options=("--user", "1000"))
            assert 'exec: "/bin/sh": permission denied' in failure(refused)
        finally:
            pods.remove(name)
            running.finish(RUN_S)


@pytest.mark.client("ctr run --uidmap, --privileged", "works", "over what is the pod's, not its kernel")
@pytest.mark.client("ctr run --remap-labels", "works", "layers with mapped IDs, of Linux 5.19 and newer")
def test_root_of_a_user_namespace_has_the_pod_and_not_its_kernel(pods: Pods) -> None:
    """In a root file system whose layers are as they were, with mapped IDs."""
    facts = json.loads(pods.run("python3", "-c", FACTS, options=("--privileged", *IN_LABELS)).ok().out)
    assert (facts["ids"], facts["maps"], facts["passwd"]) == ([0, 0], maps(100000, 200000), 0)
    assert {name: facts[name] for name in PRIVILEGED} == PRIVILEGED
    assert facts["links"] == ["lo"]


def test_a_user_of_such_a_container_and_its_terminal(pods: Pods) -> None:
    directory, given = volume(pods, "users")
    script = "id -u; id -g; tty; touch /volume/users; echo again >/dev/tty"
    options = ("--rm", "--tty", "--user", "1000:33", *IN_LABELS, *given)
    argv = pods.argv(pods.ctr.new_id(), ("sh", "-c", script), options)
    with pods.ctr.terminal(*argv, columns=80, rows=24) as terminal:
        terminal.expect(rb"1000\s+33\s+/dev/pts/0\s+again", RUN_S)
        assert terminal.finish(20)[0] == 0
    owners = (directory / "users").stat()
    assert (owners.st_uid, owners.st_gid) == (101000, 200033)


def test_a_block_device_of_such_a_container(pods: Pods, tmp_path: Path) -> None:
    """A node as the host's is, so for who has rights there."""
    loop = Loop(tmp_path / "disk")
    try:
        os.chown(loop.path, 100000, 200000)
        options = (*IN_LABELS, *loop.option)
        assert pods.run("python3", "-c", LOOK, loop.path, options=options).ok().out == f"True {SIZE} host's\n"
    finally:
        os.chown(loop.path, 0, grp.getgrnam("disk").gr_gid)
        loop.close()


@pytest.mark.client("ctr run --uidmap (no IDs)", "refused", "by the guest's kernel, or before")
@pytest.mark.parametrize(
    ("uids", "words"),
    [
        (lines((0, 4294967290, 100)), "linux.uidMappings: 0 4294967290 100 are no IDs"),
        (lines((0, 100000, 10), (5, 200000, 10)), "the kernel does not take linux.uidMappings"),
        ([], "linux.uidMappings and gidMappings do not both say"),
    ],
    ids=["beyond", "overlapping", "none"],
)
def test_mappings_that_are_none_are_refused(pods: Pods, uids: list[dict[str, int]], words: str) -> None:
    refused = pods.ctr(*configured(pods, "true", uids, lines((0, 0, 100))), "--rm", pods.ctr.new_id())
    assert words in failure(refused)


USERS = {
    "mode": 0,
    **{kind: [{"host_id": 300000, "container_id": 0, "length": 65536}] for kind in ("uids", "gids")},
}
IN_USERS = {"security_context": {"namespace_options": {"pid": 1, "userns_options": USERS}}}
"""Of a pod and its containers: mode POD."""
POD_PIDS = {"security_context": {"namespace_options": {"pid": 0, "userns_options": USERS}}}
WITH_ALL = {
    "security_context": {**IN_USERS["security_context"], "capabilities": {"add_capabilities": ["ALL"]}}
}
LINES = pytest.mark.parametrize("cri_instance", ["v1.7", "v2"], indirect=True)
"""Of containerd, that know of it: 1.6 does not."""


def facts_of(pod: CriPod, container: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(pod.exec(container, "python3", "-c", FACTS).ok().out)
    return facts


def check_pod(pod: CriPod) -> None:
    """Two containers of a pod with USERS share what a pod's do, and the user namespace that it belongs to."""
    one, two = pod.run(*FOREVER, linux=WITH_ALL), pod.run(*FOREVER, linux=POD_PIDS)
    first, second = facts_of(pod, one), facts_of(pod, two)
    assert (first["ids"], first["maps"]) == ([0, 0], maps(300000, 300000))
    assert {
        kind: first["namespaces"][kind] == second["namespaces"][kind] for kind in first["namespaces"]
    } == {
        **dict.fromkeys(("user", "uts", "ipc", "net"), True),
        "pid": False,
    }
    assert {name: first[name] for name in PRIVILEGED} == PRIVILEGED
    assert first["links"] == ["eth0", "lo"]
    assert second["mount"] == second["hostname"] == "Operation not permitted"
    seen = (
        pod.exec(two, "sh", "-c", "hostname; cat /proc/1/comm; ps -o user= -p 1; ls /sys/class/net").ok().out
    )
    assert seen.split() == ["another", "pause", "nobody", "eth0", "lo"]
    address = pod.cri.json("inspectp", pod.id)["status"]["network"]["ip"]
    assert f" {address}/" in pod.exec(one, "ip", "-4", "-o", "address").ok().out
    shm = "import os; os.mkdir('/dev/shm/made'); print(os.stat('/dev/shm').st_uid)"
    assert pod.exec(one, "python3", "-c", shm).ok().out == "0\n"


@LINES
@pytest.mark.client("crictl runp, create (a user namespace of the pod's)", "works", "containerd 1.7 and 2.x")
def test_containers_of_a_pod_share_its_user_namespace(cri: Cri) -> None:
    with cri.pod(linux=IN_USERS) as pod:
        check_pod(pod)


@pytest.mark.client('crictl runp of sandboxer = "shim" (a user namespace)', "works", "")
def test_a_sandbox_has_a_user_namespace(cri: Cri) -> None:
    with cri.pod(SHIM_HANDLER, linux=IN_USERS) as pod:
        check_pod(pod)


@pytest.mark.client(
    "crictl create (a mount with uidMappings, gidMappings)", "works", "IDs on disk are the container's"
)
def test_ids_of_a_volume_are_mapped_back(cri: Cri) -> None:
    directory = cri.instance.work / "mapped"
    directory.mkdir()
    (directory / "hosts").write_text("the host's\n")
    os.chown(directory / "hosts", 1000, 33)
    (directory / "hosts").chmod(0o600)
    mapped = dict.fromkeys(("uidMappings", "gidMappings"), USERS["uids"])
    given = {**support.mount(directory, "/volume"), **mapped}
    with cri.pod(linux=IN_USERS) as pod:
        container = pod.run(*FOREVER, linux=IN_USERS, mounts=[given])
        script = (
            "stat -c %u:%g /volume /volume/hosts; cat /volume/hosts; touch /volume/mine;"
            "stat -c %u /volume/mine"
        )
        assert pod.exec(container, "sh", "-c", script).ok().out.split() == [
            *("0:0", "1000:33", "the", "host's", "0"),
        ]
    owners = (directory / "mine").stat()
    assert (owners.st_uid, owners.st_gid) == (0, 0)


@pytest.mark.client("crictl start (a mount with uidMappings of a proc)", "refused", "the kernel cannot")
def test_a_volume_whose_ids_cannot_be_mapped_is_refused(cri: Cri) -> None:
    mapped = dict.fromkeys(("uidMappings", "gidMappings"), USERS["uids"])
    given = {**support.mount(Path("/proc/sys"), "/volume"), **mapped}
    with cri.pod(linux=IN_USERS) as pod:
        container = pod.create("true", linux=IN_USERS, mounts=[given])
        assert "cannot be mounted with mapped IDs" in failure(cri("start", container))
