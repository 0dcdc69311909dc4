"""The real guest image: built twice from Debian packages, booted by QEMU alone, down to each kernel module.

No containerd, no libvirt, no shim: what fails here is the image's fault.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from images import builder
from images.apt import read_sources
from images.image import KERNEL, ROOTFS, GuestImage, sha256_of
from images.packages import cache_dir
from images.store import ImageStore
from rpc.api import agent as api
from rpc.client import Client
from rpc.errors import ResourceExhausted
from shim.vm.designer import EMULATED_CMDLINE

FIRMWARE = "/usr/share/qemu/qboot.rom"
MACHINE = "q35,accel=tcg,sata=off,smbus=off,i8042=off,vmport=off,hpet=off,usb=off,graphics=off,smm=off"
CMDLINE = f"console=ttyS0 quiet panic=-1 {EMULATED_CMDLINE} casemate.transport=serial"
ANSWER_S = 180.0  # an emulated guest on a busy machine
BUILD_S = 120.0
"""Of processors: what else runs on the machine, and how far the mirror is, is none of the builder's."""

# an agent that tries what the image promises, tells on the console, and powers off
PROBE = """
import os, subprocess
from agent import boot, libc
from rpc.errors import CasemateError

def main():
    boot.mount_all()
    with open("/dev/console", "w") as console:
        for feature in boot.features():
            try:
                boot.load_feature(feature)
            except CasemateError as error:
                print("PROBE", feature, error, file=console)
            print("PROBE", feature, "done", file=console)
        for command in (["crun", "--version"], ["sh", "-c", "echo shell works"]):
            done = subprocess.run(command, capture_output=True, text=True)
            print("PROBE", done.returncode, done.stdout.splitlines()[:1], done.stderr, file=console)
        try:
            open("/usr/written", "w")
        except OSError as error:
            print("PROBE root", error.strerror, file=console)
        print("PROBE cmdline", open("/proc/cmdline").read().strip(), file=console)
        print("PROBE end", file=console, flush=True)
    libc.power_off()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    base = tmp_path_factory.mktemp("images")
    return ImageStore(base / "store", base / "run")


@pytest.fixture(scope="module")
def image(store: ImageStore) -> GuestImage:
    return builder.build(store, builder.Options()).image


@contextmanager
def qemu(image: GuestImage, *more: str, disk: Path | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """QEMU with the image; its output is the guest's console. disk: instead of the image's root."""
    root = disk or image.rootfs
    command = [
        *("qemu-system-x86_64", "-M", MACHINE, "-cpu", "max", "-m", "256M", "-bios", FIRMWARE),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd)),
        *("-append", f"{image.cmdline} {CMDLINE}", "-serial", "stdio"),
        *("-drive", f"if=none,id=root,file={root},format=raw,readonly=on"),
        *("-device", "virtio-blk-pci,drive=root", *more),
    ]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def console(process: "subprocess.Popen[bytes]") -> str:
    """Everything the guest says until QEMU ends by itself."""
    said, _ = process.communicate(timeout=ANSWER_S)
    return said.decode(errors="replace")


def processor_s() -> float:
    """What this process and its children have had of processors."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def test_a_second_build_from_nothing_gives_the_same_image(
    store: ImageStore, image: GuestImage, tmp_path: Path
) -> None:
    """Packages are downloaded and unpacked again, into another directory, and in time."""
    start = processor_s()
    again = builder.build(
        ImageStore(tmp_path / "store", tmp_path / "run"), builder.Options(), tmp_path / "cache"
    )
    assert processor_s() - start < BUILD_S
    assert again.image.manifest == image.manifest
    assert again.image.digest == image.digest
    for first, second in ((image.rootfs, again.image.rootfs), (image.kernel, again.image.kernel)):
        assert sha256_of(first) == sha256_of(second)


def test_nothing_of_the_build_machine_gets_into_the_image(image: GuestImage) -> None:
    mirrors = {source.uri.split("/")[2] for source in read_sources()}
    foreign = [str(builder.Options().source), str(cache_dir()), "casemate-image-", *mirrors]
    for path in (image.rootfs, image.initrd, image.directory / "manifest.json"):
        assert path is not None
        content = path.read_bytes()
        assert [word for word in foreign if word.encode() in content] == []


async def _hello(path: Path) -> api.HelloResponse:
    client = await Client.connect_unix(str(path))
    try:
        request = api.HelloRequest(protocol=api.PROTOCOL, pod_id="pod", hostname="h", entropy=os.urandom(32))
        return await client.call(api.HELLO, request, timeout_s=ANSWER_S)
    finally:
        await client.close()


def _wait_for_listener(path: Path, output: "IO[bytes] | None") -> None:
    """QEMU prints where it waits for a connection (server=on,wait=on) and boots when it has one."""
    assert output is not None
    while b"waiting for connection" not in (line := output.readline()):
        assert line, "QEMU ended before it listened"
    assert path.exists()


def test_the_image_boots_to_the_agents_answer(image: GuestImage, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    channel = (
        *("-chardev", f"socket,id=agent,path={path},server=on,wait=on", "-device", "virtio-serial-pci"),
        *("-device", "virtserialport,chardev=agent,name=dev.casemate.agent"),
    )
    with qemu(image, *channel) as process:
        _wait_for_listener(path, process.stdout)
        answer = asyncio.run(_hello(path))
    assert answer.protocol == api.PROTOCOL
    assert answer.kernel_release == image.manifest["kernel"]
    assert answer.python.startswith(image.manifest["python"])
    names = [span.name for span in answer.spans]
    assert {"kernel", "initramfs modules", "initramfs mounts"} <= set(names)
    assert all(span.start_ns <= span.end_ns <= answer.monotonic_ns for span in answer.spans)


def test_what_the_image_promises_works_in_the_guest(
    image: GuestImage, store: ImageStore, tmp_path: Path
) -> None:
    """Every module of every feature loads, programs run, the root cannot be written."""
    source = builder.Options().source
    for package in ("agent", "rpc"):
        shutil.copytree(source / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "agent/__main__.py").write_text(PROBE)
    probe = builder.build(store, builder.Options(name="probe", source=tmp_path)).image
    assert probe.kernel.stat().st_ino == image.kernel.stat().st_ino
    with qemu(probe) as process:
        said = [line.split("PROBE ")[1].strip() for line in console(process).splitlines() if "PROBE " in line]
    promised = [line.split(":")[0] for line in _feature_lines(probe)]
    assert {"vsock", "overlay", "net", "rng", "serial", "virtiofs", "ext4"} <= set(promised)
    assert said[: len(promised)] == [f"{feature} done" for feature in promised]
    crun, shell, root, cmdline, end = said[len(promised) :]
    assert crun.startswith("0 ['crun version")
    assert shell.startswith("0 ['shell works']")
    assert root == "root Read-only file system"
    assert image.cmdline in cmdline
    assert end == "end"


def test_a_full_disk_is_told_and_left_as_it_was(image: GuestImage, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "casemate-test", small], check=True)
    try:
        store = ImageStore(small / "store", tmp_path / "run")
        with pytest.raises(ResourceExhausted) as caught:
            store.add("default", {KERNEL: image.kernel, ROOTFS: image.rootfs}, {"cmdline": ""})
        assert "no space left" in caught.value.brief
        assert caught.value.hint == "casemate image gc"
        assert store.list() == ()
        assert list((small / "store/tmp").iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def _feature_lines(image: GuestImage) -> list[str]:
    """modules.txt, found in the (uncompressed) root file system."""
    content = image.rootfs.read_bytes()
    start = content.index(b"serial:\nvsock:")
    return content[start : content.index(b"\n\0", start)].decode().splitlines()


@pytest.mark.parametrize(
    ("disk", "complaint", "errno"),
    [(b"\0" * 65536, "cannot mount /dev/vda as erofs", 0x16), (None, "cannot execute /usr/bin/python3", 2)],
)
def test_a_root_that_cannot_be_used_is_told_on_the_console(
    image: GuestImage, tmp_path: Path, disk: bytes | None, complaint: str, errno: int
) -> None:
    root = tmp_path / "root"
    if disk is None:
        (tmp_path / "tree").mkdir()
        for name in ("dev", "proc", "sys", "run", "tmp"):
            (tmp_path / "tree" / name).mkdir()
        subprocess.run(["mkfs.erofs", "--quiet", root, tmp_path / "tree"], check=True)
    else:
        root.write_bytes(disk)
    with qemu(image, disk=root) as process:
        said = console(process)
    assert f"casemate: {complaint}" in said
    assert f"exitcode=0x{errno << 8:08x}" in said
