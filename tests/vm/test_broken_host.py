"""A host that lacks something, or whose programs fail: their own words, at once, and nothing left behind."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ctr import Ctr
from bench.instance import RUNTIME, Instance
from shim.vm.crowding import MOST
from tests.vm import builds, census, faults
from tests.vm.faults import refused
from tests.vm.pods import FULL, IMAGE, Pods, every_version, prepare

NOTICED_S = faults.AT_ONCE_S
"""The second within which it must be noticed, and what ctr, a shim and libvirt's driver take to start."""


@every_version
def test_qemu_that_exits_as_a_machine(pods: Pods) -> None:
    pods.ctr.instance.configure(f'qemu = "{faults.exits_as_machine(pods.ctr.instance)}"\n')
    refused(pods.run("true"), "QEMU", "the flux capacitor is missing", within_s=NOTICED_S)


def test_qemu_that_exits_at_once(pods: Pods) -> None:
    pods.ctr.instance.configure(f'qemu = "{faults.exits_at_once(pods.ctr.instance)}"\n')
    refused(pods.run("true"), "QEMU", "the flux capacitor is missing", within_s=NOTICED_S)


def test_qemu_that_hangs(pods: Pods) -> None:
    qemu = faults.hangs_as_machine(pods.ctr.instance)
    pods.ctr.instance.configure(f'qemu = "{qemu}"\n[timeouts]\nboot_s = 2.0\ntcg_factor = 2.0\n')
    limit_s = 2.0 * 2.0 * MOST + NOTICED_S
    refused(pods.run("true", timeout_s=2 * limit_s), "QEMU", within_s=limit_s)


def test_qemu_that_is_not_there(pods: Pods) -> None:
    pods.ctr.instance.configure('qemu = "/no/such/qemu"\n')
    refused(pods.run("true"), "/no/such/qemu", within_s=NOTICED_S)


def test_qemu_that_is_too_old(pods: Pods) -> None:
    pods.ctr.instance.configure(f'qemu = "{faults.old_qemu(pods.ctr.instance)}"\n')
    refused(pods.run("true"), "QEMU", "2.0", "7.2", within_s=NOTICED_S)


def test_virtiofsd_that_exits_at_once(pods: Pods) -> None:
    pods.ctr.instance.configure(f'virtiofsd = "{faults.virtiofsd_exits(pods.ctr.instance)}"\n')
    refused(pods.run("true"), "virtiofsd", "no more files today", within_s=NOTICED_S)


def test_virtiofsd_that_is_not_there(pods: Pods) -> None:
    pods.ctr.instance.configure('virtiofsd = "/no/such/virtiofsd"\n')
    refused(pods.run("true"), "/no/such/virtiofsd", "hint", within_s=NOTICED_S)


def test_libvirt_that_is_not_there(pods: Pods) -> None:
    runtime = faults.shim_without_libvirt(pods.ctr.instance)
    refused(Pods(pods.ctr, runtime, pods.image).run("true"), "libvirt", "hint", within_s=NOTICED_S)


def test_libvirt_that_is_too_old(pods: Pods) -> None:
    runtime = faults.shim_with_old_libvirt(pods.ctr.instance)
    refused(Pods(pods.ctr, runtime, pods.image).run("true"), "libvirt", "4.0", "too old", within_s=NOTICED_S)


def test_a_firmware_that_is_not_there(pods: Pods) -> None:
    pods.ctr.instance.configure('firmware = "/no/such/firmware.rom"\n')
    refused(pods.run("true"), "/no/such/firmware.rom", within_s=NOTICED_S)


def test_a_user_for_qemu_that_is_not_there(pods: Pods) -> None:
    pods.ctr.instance.configure('qemu_user = "nobody-i-know"\n')
    refused(pods.run("true"), "nobody-i-know", within_s=NOTICED_S)


def test_kvm_asked_for_where_it_runs_no_guest(pods: Pods) -> None:
    from shim.vm.accel import probe

    if probe().kind == "kvm":
        pytest.skip("this host's KVM runs guests")
    pods.ctr.instance.configure('accel = "kvm"\n')
    refused(pods.run("true"), "KVM", within_s=NOTICED_S)


# -- guest images ------------------------------------------------------------------------------------------


def test_a_guest_image_that_is_not_there(pods: Pods) -> None:
    empty = pods.ctr.instance.work / "no-images"
    empty.mkdir(exist_ok=True)
    pods.ctr.instance.configure(f'image_dir = "{empty}"\n')
    refused(pods.run("true"), "default", "casemate image build", within_s=NOTICED_S)


@pytest.mark.parametrize("file", ["rootfs.erofs", "vmlinux"])
def test_a_guest_image_that_is_not_what_it_was(pods: Pods, image_store: Path, file: str) -> None:
    """One byte of one file differs from what the manifest says."""
    store = pods.ctr.instance.work / f"damaged-{file}"
    shutil.copytree(image_store, store, symlinks=True)
    damaged = (store / "names/default").resolve() / file
    damaged.chmod(0o644)
    with open(damaged, "r+b") as data:
        data.seek(damaged.stat().st_size // 2)
        byte = data.read(1)[0]
        data.seek(-1, os.SEEK_CUR)
        data.write(bytes([byte ^ 1]))
    pods.ctr.instance.configure(f'image_dir = "{store}"\n')
    refused(pods.run("true"), file, within_s=NOTICED_S)


# -- the run directory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["size=4k", "nr_inodes=4", "nr_inodes=12"])
def test_no_space_under_the_run_directory(pods: Pods, limit: str) -> None:
    with faults.small_run_dir(pods.ctr.instance, limit):
        refused(pods.run("true"), "No space left on device", "/run/casemate", within_s=30)


def test_no_space_once_the_pod_runs(pods: Pods) -> None:
    """A full file system is no reason to end a pod that runs, nor to leave it behind when it ends."""
    with faults.small_run_dir(pods.ctr.instance, "size=8m") as run:
        with pods.detached("sleep", "1000") as name:
            with open(run / "filler", "wb") as filler, pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(bytes(1 << 16))
                    filler.flush()
            assert pods.exec(name, "echo", "still here").ok().out == "still here\n"
        assert list((run / "pods").iterdir()) == []


# -- devices -------------------------------------------------------------------------------------------------

HIDE = """
mkdir /run/dev && mount -t tmpfs -o mode=755 dev /run/dev
cd /dev && cp -a null zero full random urandom tty fd stdin stdout stderr /run/dev/
for name in ptmx kvm fuse net; do [ ! -e $name ] || cp -a $name /run/dev/; done
mkdir /run/dev/pts /run/dev/shm && mount --bind /dev/pts /run/dev/pts && mount --bind /dev/shm /run/dev/shm
mount --move /run/dev /dev && rmdir /run/dev
"""


@pytest.fixture
def bare(demo_archive: Path, image_store: Path) -> Iterator[Ctr]:
    """A containerd of its own whose /dev has no vhost-net, no vhost-vsock and no loop devices."""
    with Instance(builds.provide(FULL)) as instance:
        faults.inside(instance, "sh", "-ec", HIDE)
        prepare(instance, demo_archive, image_store)
        ctr = Ctr(instance)
        before = census.take(ctr)
        yield ctr
        assert census.left_after(ctr, before) == []


def test_neither_vhost_net_nor_vhost_vsock(bare: Ctr) -> None:
    assert not bare.instance.path("/dev/vhost-vsock").exists()
    pods = Pods(bare, RUNTIME, IMAGE)
    assert pods.run("sh", "-c", "exit 5").code == 5
    bare.instance.configure('transport = "vsock"\n')
    refused(pods.run("true"), "/dev/vhost-vsock", within_s=NOTICED_S)
