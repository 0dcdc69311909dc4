"""What a container asks of its host: turned into what its guest can give, or refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from rpc.errors import InvalidArgument, Unimplemented
from shim import oci, spec
from shim.oci import Document, IdMappings, Mount
from shim.spec import GUEST_SHARE, GuestSpec, SharedMount, refuse_mount_options
from tests.unit.shim.pods import NAMESPACES, config


def for_guest(document: dict[str, Any]) -> GuestSpec:
    return spec.for_guest(oci.parse(document), "web")


def linux(**changes: Any) -> dict[str, Any]:
    return config(linux={"namespaces": NAMESPACES} | changes)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("network", "host network"),
        ("pid", "host PID namespace"),
        ("ipc", "host IPC namespace"),
        ("uts", "host UTS namespace"),
    ],
)
def test_a_namespace_of_the_hosts_is_refused_by_name(kind: str, words: str) -> None:
    document = linux(namespaces=[entry for entry in NAMESPACES if entry["type"] != kind])
    with pytest.raises(Unimplemented, match=f"{words}: not possible in a VM") as caught:
        for_guest(document)
    assert "run without" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["pid", "ipc", "uts", "mount", "cgroup", "time"])
def test_joining_a_namespace_on_the_host_is_refused_by_name(kind: str) -> None:
    path = f"/proc/7/ns/{kind}"
    rest = [entry for entry in NAMESPACES if entry["type"] != kind]
    with pytest.raises(Unimplemented, match=f"{kind} namespace {path}: "):
        for_guest(linux(namespaces=[*rest, {"type": kind, "path": path}]))


def test_a_network_namespace_is_the_pods_and_not_the_containers() -> None:
    rest = [entry for entry in NAMESPACES if entry["type"] != "network"]
    guest = for_guest(linux(namespaces=[*rest, {"type": "network", "path": "/run/netns/x"}]))
    assert guest.document["linux"]["namespaces"] == rest


BIND = {"destination": "/volume", "type": "bind", "source": "/", "options": ["rbind", "ro"]}
PROC = {"destination": "/proc", "type": "proc", "source": "proc"}


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, True),
        ({"mounts": [PROC]}, True),
        ({"mounts": [PROC, BIND]}, False),
        ({"root": {"path": "/srv/tree"}}, False),
        ({"annotations": {"io.kubernetes.cri.sandbox-id": "web"}}, False),
        ({"annotations": {"io.containerd.runc.v2.group": "web"}}, False),
        ({"annotations": {"any.other": "web"}}, True),
    ],
)
def test_whose_files_a_pods_only_container_sees(changes: dict[str, Any], own: bool) -> None:
    assert spec.has_own_files(oci.parse(config(**changes))) is own


def test_a_pod_shares_directories_if_it_may_be_given_one(tmp_path: Path) -> None:
    file, directory = tmp_path / "file", tmp_path / "directory"
    file.touch()
    directory.mkdir()

    def shares(*sources: Path, **changes: Any) -> bool:
        mounts = [
            {"destination": f"/{source.name}", "type": "bind", "source": str(source), "options": ["rbind"]}
            for source in sources
        ]
        mounts.append({"destination": "/proc", "type": "proc", "source": "proc"})
        return spec.shares_directories(oci.parse(config(mounts=mounts, **changes)))

    assert not shares()
    assert not shares(file)
    assert shares(directory)
    assert shares(file, directory)
    assert shares(tmp_path / "nothing")
    assert shares(annotations={"io.kubernetes.cri.sandbox-id": "pod"})


def test_a_character_device_of_the_hosts_is_refused_by_name() -> None:
    with pytest.raises(Unimplemented, match="device /dev/kvm: ") as caught:
        for_guest(linux(devices=[{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}]))
    assert "/dev/fuse" in (caught.value.hint or "")


def test_a_privileged_container_gets_none_of_the_hosts_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which clients list, every one, where they are not told to leave them out."""
    links = {"/sys/dev/char/243:0": "../../devices/virtual/vfio/12"}
    monkeypatch.setattr(os, "readlink", lambda path: links.get(path, "../../devices/other"))
    every = [
        {"path": "/dev/vfio/12", "type": "c", "major": 243, "minor": 0},
        {"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232},
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
        {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0},
    ]
    guest = for_guest(linux(devices=every, resources={"devices": [{"allow": True, "access": "rwm"}]}))
    assert guest.disks == ()
    assert not guest.devices
    assert guest.document["linux"]["devices"] == every[2:3]
    assert guest.document["linux"]["resources"]["devices"] == [{"allow": True, "access": "rwm"}]
    assert any("the host's 4" in line for line in guest.ignored)


def test_what_a_privileged_container_asks_for_by_itself_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the client leaves the host's devices out, what it lists was asked for."""
    monkeypatch.setattr(os, "readlink", lambda path: "../../devices/virtual/vfio/12")
    devices = [
        {"path": "/dev/vfio/12", "type": "c", "major": 243, "minor": 0},
        {"path": "/dev/data", "type": "b", "major": 8, "minor": 0},
    ]
    guest = for_guest(linux(devices=devices, resources={"devices": [{"allow": True, "access": "rwm"}]}))
    assert [each.path for each in guest.disks] == ["/dev/data"]
    assert [node.group for node in guest.devices.nodes] == [12]


def test_devices_of_every_kernel_are_the_guests() -> None:
    fuse = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}
    guest = for_guest(linux(devices=[fuse, {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]))
    assert guest.document["linux"]["devices"] == [fuse]
    assert guest.disks == ()


def test_nodes_of_vfio_are_a_wish_and_not_the_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    links = {"/sys/dev/char/243:0": "../../devices/virtual/vfio/12"}
    monkeypatch.setattr(os, "readlink", lambda path: links[path])
    entry = {"path": "/dev/vfio/12", "type": "c", "major": 243, "minor": 0}
    rules = [{"allow": False, "access": "rwm"}, entry | {"allow": True, "access": "rw"}]
    annotations = {"dev.casemate/devices": "kind=gpu"}
    guest = for_guest(linux(devices=[entry], resources={"devices": rules}) | {"annotations": annotations})
    assert [(node.group, node.path) for node in guest.devices.nodes] == [(12, "")]
    assert guest.devices.text == "kind=gpu"
    assert "devices" not in guest.document["linux"]
    assert guest.document["linux"]["resources"]["devices"] == rules[:1]


def test_a_block_device_comes_as_a_disk_and_not_by_the_hosts_numbers() -> None:
    entry = {"path": "/dev/data", "type": "b", "major": 8, "minor": 16}
    rules = [{"allow": False, "access": "rwm"}, entry | {"allow": True, "access": "rw"}]
    guest = for_guest(linux(devices=[entry], resources={"devices": rules}))
    assert [(disk.path, disk.read_only) for disk in guest.disks] == [("/dev/data", False)]
    assert "devices" not in guest.document["linux"]
    assert guest.document["linux"]["resources"]["devices"] == rules[:1]


def test_devices_that_every_container_has_are_no_request() -> None:
    devices = [{"path": path, "type": "c", "major": 1, "minor": 3} for path in sorted(spec.DEFAULT_DEVICES)]
    guest = for_guest(linux(devices=devices))
    assert "devices" not in guest.document["linux"]


def test_the_guest_is_handed_its_hooks_and_no_other() -> None:
    kinds = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    hooks = {kind: [{"path": f"/{kind}", "env": ["A=b"], "timeout": 3}] for kind in kinds}
    guest = for_guest(config(hooks=hooks)).document["hooks"]
    assert guest == {kind: hooks[kind] for kind in ("createContainer", "startContainer")}
    assert "hooks" not in for_guest(config(hooks={"poststop": hooks["poststop"]})).document
    assert "hooks" not in for_guest(config(hooks={"startContainer": []})).document


def test_hooks_that_nobody_knows_are_refused_by_name() -> None:
    hooks = {"prestart": [{"path": "/x"}], "prelunch": [{"path": "/y"}], "postlunch": []}
    with pytest.raises(Unimplemented, match="hooks prelunch: not known"):
        for_guest(config(hooks=hooks))


def test_a_hook_that_gives_the_hosts_gpus_is_refused_by_name() -> None:
    hook = {"path": "/usr/bin/nerdctl", "args": ["nerdctl", "oci-hook", "--", "/opt/nvidia-container-cli"]}
    with pytest.raises(Unimplemented, match="createRuntime hook /opt/nvidia-container-cli: the host's GPU"):
        for_guest(config(hooks={"createRuntime": [hook]}))


def test_a_namespace_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(Unimplemented, match="'wormhole' namespace"):
        for_guest(linux(namespaces=[*NAMESPACES, {"type": "wormhole"}]))


def test_a_namespace_of_its_own_for_the_time_is_the_guests() -> None:
    guest = for_guest(linux(namespaces=[*NAMESPACES, {"type": "time"}]))
    assert {"type": "time"} in guest.document["linux"]["namespaces"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("netDevices", {"eth1": {}}),
        ("intelRdt", {"closID": "gold"}),
        ("timeOffsets", {"monotonic": {"secs": 1}}),
        ("memoryPolicy", {"mode": "MPOL_BIND"}),
    ],
)
def test_what_only_the_host_could_give_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(Unimplemented, match=f"linux.{field}: not possible in a VM") as caught:
        for_guest(linux(**{field: value}))
    assert caught.value.hint
    assert for_guest(linux(**{field: None})).unmet == ()


@pytest.mark.parametrize("field", ["execCPUAffinity", "scheduler", "ioPriority"])
def test_a_processs_place_on_the_host_is_refused_by_name(field: str) -> None:
    document = config()
    document["process"][field] = {"x": "y"}
    with pytest.raises(Unimplemented, match=f"process.{field}: not possible in a VM"):
        for_guest(document)
    with pytest.raises(Unimplemented, match=f"process.{field}: not possible in a VM"):
        spec.process_for_guest(document["process"])


def test_an_exec_has_no_labels_either() -> None:
    process, lines = spec.process_for_guest({"args": ["sh"], "apparmorProfile": "docker-default"})
    assert process == {"args": ["sh"]}
    assert [line.partition(" ")[0] for line in lines] == ["process.apparmorProfile"]


def test_the_hosts_cpus_are_left_out_with_a_note() -> None:
    document = linux(resources={"cpu": {"cpus": "2-3", "mems": "1", "shares": 512}, "pids": {"limit": 9}})
    guest = for_guest(document)
    assert guest.document["linux"]["resources"] == {"cpu": {"shares": 512}, "pids": {"limit": 9}}
    assert [line.partition(" ")[0] for line in guest.unmet] == [
        "linux.resources.cpu.cpus",
        "linux.resources.cpu.mems",
    ]
    assert document["linux"]["resources"]["cpu"]["cpus"] == "2-3"


def test_labels_that_a_guest_does_not_know_are_left_out_with_a_note() -> None:
    document = linux(mountLabel="system_u:x")
    document["process"] |= {"apparmorProfile": "docker-default", "selinuxLabel": "system_u:y", "cwd": "/srv"}
    guest = for_guest(document)
    assert [line.partition(" ")[0] for line in guest.ignored] == [
        "process.apparmorProfile",
        "process.selinuxLabel",
        "linux.mountLabel",
    ]
    assert guest.document["process"]["cwd"] == "/srv"
    assert "apparmorProfile" not in guest.document["process"]
    assert "mountLabel" not in guest.document["linux"]
    assert document["process"]["apparmorProfile"] == "docker-default"


def test_without_labels_there_is_no_note() -> None:
    assert for_guest(config()).ignored == for_guest(config()).unmet == ()


def test_the_root_is_where_the_guest_finds_it() -> None:
    guest = for_guest(config(root={"path": "/var/lib/x/rootfs", "readonly": True}))
    assert guest.document["root"] == {"path": f"{GUEST_SHARE}/web/rootfs", "readonly": True}


def test_the_hosts_cgroup_is_not_the_guests() -> None:
    guest = for_guest(linux(cgroupsPath="kubepods.slice:cri:web"))
    assert "cgroupsPath" not in guest.document["linux"]


def test_what_nobody_here_understands_reaches_the_guest() -> None:
    document = config(process={"args": ["sh"], "rlimits": [{"type": "RLIMIT_NOFILE"}]}, x={"y": [1]})
    guest = for_guest(document)
    assert guest.document["process"] == document["process"]
    assert guest.document["x"] == {"y": [1]}


def test_mounts_that_need_no_host_stay_as_they_are() -> None:
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
    ]
    guest = for_guest(config(mounts=mounts))
    assert guest.document["mounts"] == mounts
    assert guest.shared == ()


def test_bind_mounts_are_shared_by_names_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    mounts = [
        {
            "destination": "/data",
            "type": "bind",
            "source": str(tmp_path),
            "options": ["rbind", "ro", "nosuid"],
        },
        {"destination": "/proc", "type": "proc"},
        {"destination": "/etc/hosts", "type": "none", "source": f"{tmp_path}/file", "options": ["bind"]},
    ]
    guest = for_guest(config(mounts=mounts))
    assert guest.shared == (
        SharedMount("mount0", str(tmp_path), read_only=True, recursive=True, destination="/data"),
        SharedMount("mount1", f"{tmp_path}/file", read_only=False, recursive=False, destination="/etc/hosts"),
    )
    data, proc, hosts = guest.document["mounts"]
    assert data == {
        "destination": "/data",
        "type": "bind",
        "source": f"{GUEST_SHARE}/web/mount0",
        "options": ["rbind", "ro", "nosuid"],
    }
    assert proc["type"] == "proc"
    assert (hosts["source"], hosts["options"]) == (f"{GUEST_SHARE}/web/mount1", ["rbind"])


@pytest.mark.parametrize(
    ("options", "read_only"), [(["ro"], True), (["rro"], True), (["rw"], False), ([], False)]
)
def test_read_only_is_so_on_the_host_too(tmp_path: Path, options: list[str], read_only: bool) -> None:
    mounts = [{"destination": "/x", "type": "bind", "source": str(tmp_path), "options": options}]
    assert for_guest(config(mounts=mounts)).shared[0].read_only is read_only


def test_a_link_is_followed_to_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    mounts = [{"destination": "/data", "type": "bind", "source": f"{tmp_path}/link"}]
    assert len(for_guest(config(mounts=mounts)).shared) == 1


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    mounts = [{"destination": "/data", "type": "bind", "source": f"{tmp_path}/none"}]
    with pytest.raises(InvalidArgument, match=f"mount /data: source {tmp_path}/none: No such file"):
        for_guest(config(mounts=mounts))


@pytest.mark.parametrize("source", ["/a\0b", "/\ud800"])
def test_a_source_that_cannot_be_a_path_is_named(source: str) -> None:
    with pytest.raises(InvalidArgument, match="mount /data: source"):
        for_guest(config(mounts=[{"destination": "/data", "type": "bind", "source": source}]))


@pytest.mark.parametrize("kind", ["socket", "FIFO", "device"])
def test_a_source_with_another_end_on_the_host_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    mounts = [{"destination": "/x", "type": "bind", "source": str(path)}]
    with pytest.raises(Unimplemented, match=f"mount /x: source {path} is a {kind}"):
        for_guest(config(mounts=mounts))


@pytest.mark.parametrize("option", ["shared", "rshared", "slave", "rslave"])
def test_a_volume_that_would_have_to_propagate_is_refused_by_name(tmp_path: Path, option: str) -> None:
    with pytest.raises(Unimplemented, match=option):
        refuse_mount_options(Mount("/volume", "bind", str(tmp_path), ("rbind", option)))


LINE = {"containerID": 0, "hostID": 300000, "size": 65536}
MAPPED = {"uidMappings": [LINE], "gidMappings": [LINE]}
RANGES = IdMappings(((0, 300000, 65536),), ((0, 300000, 65536),))
USERS = {"namespaces": [*NAMESPACES, {"type": "user"}], **MAPPED}


@pytest.mark.parametrize(
    ("options", "said", "linux", "mapped", "below"),
    [
        (["rbind", "ro"], MAPPED, {}, RANGES, False),
        (["bind", "ridmap"], MAPPED, {}, RANGES, True),
        (["rbind", "idmap"], {}, USERS, RANGES, False),
        (["rbind"], {}, USERS, IdMappings(), False),
    ],
    ids=["said", "below", "the container's", "none"],
)
def test_a_volume_with_mapped_ids_is_mapped_on_the_host(
    tmp_path: Path, options: list[str], said: Document, linux: Document, mapped: IdMappings, below: bool
) -> None:
    mount = {"destination": "/volume", "type": "bind", "source": str(tmp_path), "options": options, **said}
    guest = for_guest(config(mounts=[mount], linux={"namespaces": NAMESPACES, **linux}))
    assert [(entry.mapped, entry.maps_below) for entry in guest.shared] == [(mapped, below)]
    (seen,) = guest.document["mounts"]
    assert seen.keys() == {"destination", "type", "source", "options"}
    assert {"idmap", "ridmap"}.isdisjoint(seen["options"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"uidMappings": [LINE]}, InvalidArgument, "go together"),
        ({"options": ["rbind", "idmap"]}, InvalidArgument, "there are no mappings"),
        ({"type": "tmpfs", "options": [], **MAPPED}, Unimplemented, "of type tmpfs"),
    ],
    ids=["half", "none", "not the host's"],
)
def test_mappings_that_a_mount_cannot_have_are_refused(
    tmp_path: Path, changes: Document, error: type[Exception], words: str
) -> None:
    mount = {
        "destination": "/volume",
        "type": "bind",
        "source": str(tmp_path),
        "options": ["rbind"],
        **changes,
    }
    with pytest.raises(error, match=f"mount /volume: .*{words}"):
        for_guest(config(mounts=[mount]))


@pytest.mark.parametrize("kind", ["ext4", "overlay", "nfs", "9p", "virtiofs", ""])
def test_a_file_system_of_the_hosts_is_refused_by_name(kind: str) -> None:
    mount = {"destination": "/data", "type": kind, "source": "/dev/sda1", "options": ["ro"]}
    with pytest.raises(Unimplemented, match=f"^mount /data: type '{kind}': the host's disk") as caught:
        for_guest(config(mounts=[PROC, mount]))
    assert "bind mount" in (caught.value.hint or "")


@pytest.mark.parametrize("kind", sorted(spec.KERNELS_OWN))
def test_a_file_system_of_a_kernels_own_is_the_guests(kind: str) -> None:
    mount = {"destination": "/own", "type": kind, "source": kind, "options": ["ro"]}
    assert for_guest(config(mounts=[mount])).document["mounts"] == [mount]
