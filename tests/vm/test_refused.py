"""What cannot be run is refused: one clear error, in time, and nothing left behind (the `ctr` fixture)."""

import io
import struct
import tarfile
from pathlib import Path

import pytest

from images import oci
from shim.spec import KERNELS_OWN
from tests.vm.faults import AT_ONCE_S, inside, refused
from tests.vm.pods import Pods, every_version

BOOT_S = 60.0
"""A refusal that needs the guest: a boot under TCG on a busy machine."""


@every_version
def test_a_command_that_is_not_in_the_image(pods: Pods) -> None:
    result = pods.run("no-such-program", "argument")
    refused(result, "no-such-program", "not found", within_s=BOOT_S)
    assert len(result.err.strip().splitlines()) <= 2, "not one line"


def test_a_command_path_that_does_not_exist(pods: Pods) -> None:
    refused(pods.run("/no/such/program"), "/no/such/program", "no such file", within_s=BOOT_S)


def test_a_command_that_is_not_executable(pods: Pods) -> None:
    refused(pods.run("/etc/passwd"), "/etc/passwd", "permission denied", within_s=BOOT_S)


def test_a_working_directory_that_does_not_exist(pods: Pods) -> None:
    result = pods.run("true", options=("--cwd", "/no/such/directory"))
    # runc and crun make it; what counts is that it is not silently another one
    if result.code == 0:
        assert pods.run("pwd", options=("--cwd", "/no/such/directory")).out == "/no/such/directory\n"
    else:
        refused(result, "/no/such/directory", within_s=BOOT_S)


def test_a_working_directory_that_is_a_file(pods: Pods) -> None:
    refused(pods.run("true", options=("--cwd", "/etc/passwd")), "/etc/passwd", "directory", within_s=BOOT_S)


def test_an_image_of_another_architecture(pods: Pods) -> None:
    """An ELF program for aarch64: the guest's kernel cannot run it, and the error says that."""
    header = struct.pack(
        "<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 183, 1, 0x400078, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, 0x400000, 0x400000, 120, 120, 4096)
    work = pods.ctr.instance.work
    with tarfile.open(work / "layer.tar", "w") as layer:
        member = tarfile.TarInfo("hello")
        member.mode, member.size = 0o755, len(header + segment)
        layer.addfile(member, io.BytesIO(header + segment))
    reference = "localhost/test/aarch64:latest"
    # The image claims amd64: one that says what it is, containerd does not even unpack here.
    archive = work / "aarch64.tar"
    oci.write_archive(oci.OciImage(reference), work / "layer.tar", archive)
    pods.ctr.import_image(archive)
    refused(
        Pods(pods.ctr, pods.runtime, reference).run("/hello"),
        "/hello",
        "aarch64",
        "architecture",
        within_s=BOOT_S,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param(("--net-host",), ("host network",), id="network"),
        pytest.param(("--with-ns", "pid:/proc/1/ns/pid"), ("pid namespace",), id="pid"),
        pytest.param(("--with-ns", "ipc:/proc/1/ns/ipc"), ("ipc namespace",), id="ipc"),
        pytest.param(("--device", "/dev/kvm"), ("/dev/kvm",), id="device"),
        pytest.param(("--rdt-class", "gold"), ("linux.intelRdt",), id="caches"),
    ],
)
def test_what_only_the_host_has(pods: Pods, options: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(pods.run("true", options=options), *words, "hint", within_s=AT_ONCE_S)


def test_a_bind_mount_of_what_is_not_there(pods: Pods) -> None:
    mount = "type=bind,src=/no/such/source,dst=/mnt,options=rbind:ro"
    refused(
        pods.run("true", options=("--mount", mount)), "/no/such/source", "no such file", within_s=AT_ONCE_S
    )


@pytest.mark.client("ctr run --mount type=bind (a socket)", "refused", "its other end is on the host")
def test_a_bind_mount_of_a_socket(pods: Pods) -> None:
    source = "/run/containerd/containerd.sock"
    mount = f"type=bind,src={source},dst=/mnt/sock,options=bind"
    refused(pods.run("true", options=("--mount", mount)), source, "socket", within_s=AT_ONCE_S)


@pytest.mark.client(
    "ctr run --mount type=ext4 (and nfs, overlay ...)", "refused", "the host mounts, the pod binds"
)
def test_a_file_system_of_a_disk_of_the_hosts(pods: Pods) -> None:
    mount = "type=ext4,src=/dev/sda1,dst=/data,options=ro"
    refused(pods.run("true", options=("--mount", mount)), "/data", "ext4", "hint", within_s=AT_ONCE_S)


@pytest.mark.client("ctr run --mount type=debugfs (and others of a kernel's own)", "works", "of the guest's")
def test_file_systems_of_a_kernels_own_are_the_guests(pods: Pods) -> None:
    """What its kernel has is mounted, and what it lacks is named."""
    lines = pods.run("cat", "/proc/filesystems").ok().out.splitlines()
    had = {line.split()[-1] for line in lines}
    mount = "type={0},src={0},dst=/mnt,options=ro".format
    assert "securityfs" in had
    mounted = pods.run("cat", "/proc/mounts", options=("--mount", mount("securityfs"))).ok().out
    assert "securityfs /mnt securityfs ro" in mounted
    lacks = sorted(KERNELS_OWN - had)
    assert lacks, "every guest's kernel lacks one"
    refused(
        pods.run("true", options=("--mount", mount(lacks[0]))), "/mnt", lacks[0], "kernel", within_s=BOOT_S
    )


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        pytest.param("dev.casemate.memory=1GiB", ("dev.casemate.memory", "not allowed"), id="not-allowed"),
        pytest.param(
            "dev.casemate.memroy=1GiB", ("dev.casemate.memroy", "dev.casemate.memory"), id="unknown"
        ),
        pytest.param("dev.casemate.profile=huge", ("profile", "huge"), id="no-such-profile"),
    ],
)
def test_annotations(pods: Pods, annotation: str, words: tuple[str, ...]) -> None:
    refused(pods.run("true", options=("--annotation", annotation)), *words, within_s=AT_ONCE_S)


def test_a_malformed_annotation_that_is_allowed(pods: Pods) -> None:
    pods.ctr.instance.configure('allowed_annotations = ["dev.casemate.memory"]\n')
    result = pods.run("true", options=("--annotation", "dev.casemate.memory=plenty"))
    refused(result, "dev.casemate.memory", "plenty", within_s=AT_ONCE_S)


def test_an_allowed_annotation_is_obeyed(pods: Pods) -> None:
    pods.ctr.instance.configure('allowed_annotations = ["dev.casemate.memory", "dev.casemate.vcpus"]\n')
    options = ("--annotation", "dev.casemate.memory=384MiB", "--annotation", "dev.casemate.vcpus=2")
    result = pods.run("sh", "-c", "grep MemTotal /proc/meminfo; nproc", options=options).ok()
    words = result.out.split()
    assert 320 << 10 < int(words[1]) < 384 << 10
    assert words[3] == "2"


def test_an_unknown_key_in_the_configuration(pods: Pods) -> None:
    pods.ctr.instance.configure("[profiles.default]\nmemroy = '256MiB'\n")
    result = pods.run("true")
    refused(result, "test.toml", "memroy", "memory", within_s=AT_ONCE_S)


def test_a_configuration_that_is_not_toml(pods: Pods) -> None:
    pods.ctr.instance.configure("accel = auto\n")
    refused(pods.run("true"), "test.toml", "line 1", within_s=AT_ONCE_S)


def test_more_memory_than_the_host_has(pods: Pods) -> None:
    pods.ctr.instance.configure("[profiles.default]\nmemory = '64TiB'\n")
    refused(pods.run("true"), "memory", "64", "host", within_s=AT_ONCE_S)


def test_a_second_container_with_the_same_name(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        result = pods.run("true", name=name)
        assert result.code != 0
        assert "already exists" in result.err
        assert pods.exec(name, "echo", "fine").ok().out == "fine\n"


@pytest.mark.client("ctr run --with-ns network:PATH", "works", "")
def test_a_network_namespace_is_entered_and_can_be_used_again(pods: Pods) -> None:
    """Twice one after another, and twice at once: nothing of the first start is in the way of the second."""
    instance = pods.ctr.instance
    inside(instance, "ip", "netns", "add", "pod-net")
    try:
        options = ("--with-ns", "network:/run/netns/pod-net")
        for _ in range(2):
            pods.run("true", options=options).ok()
        with pods.detached("sleep", "1000", options=options) as first:
            wanted = Path(instance.path("/run/netns/pod-net")).stat().st_ino
            pid = next(int(line.split()[1]) for line in pods.tasks() if line.split()[0] == first)
            assert Path(f"/proc/{pid}/ns/net").stat().st_ino == wanted
            pods.run("true", options=options).ok()
            assert pods.exec(first, "echo", "fine").ok().out == "fine\n"
    finally:
        inside(instance, "ip", "netns", "delete", "pod-net")
        inside(instance, "umount", "/run/netns")
        instance.path("/run/netns").rmdir()
