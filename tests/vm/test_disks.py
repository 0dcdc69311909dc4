"""Block devices of the host's in a container: read, written, read-only, gone again."""

import os
import stat
from pathlib import Path

import pytest

from tests.vm.loops import LOOK, SIZE, WRITE, Loop
from tests.vm.pods import Pods


@pytest.mark.client("ctr run --device (a block device)", "works", "a disk of the VM, under its path")
def test_a_container_reads_and_writes_a_device_of_the_hosts(pods: Pods, loop: Loop) -> None:
    with pods.detached("sleep", "1000", options=loop.option) as name:
        assert pods.exec(name, "python3", "-c", LOOK, loop.path).ok().out == f"True {SIZE} host's\n"
        pods.exec(name, "python3", "-c", WRITE, loop.path).ok()
        assert loop.file.read_bytes()[4096:4102] == b"guest!"
        assert pods.exec(name, "mkdir", "/dev/made").ok().out == ""


def test_one_that_the_host_may_not_write_is_read(pods: Pods, tmp_path: Path) -> None:
    loop = Loop(tmp_path / "disk", "--read-only")
    try:
        with pods.detached("sleep", "1000", options=loop.option) as name:
            assert pods.exec(name, "python3", "-c", LOOK, loop.path).ok().out == f"True {SIZE} host's\n"
            assert pods.exec(name, "python3", "-c", WRITE, loop.path).code != 0
    finally:
        loop.close()


def test_one_that_is_not_there_is_named(pods: Pods, tmp_path: Path) -> None:
    node = tmp_path / "device"
    os.mknod(node, stat.S_IFBLK | 0o600, os.makedev(240, 77))  # a number for local use: no driver has it
    failed = pods.run("true", options=("--device", str(node)))
    assert failed.code != 0
    assert f"device {node}: the host's block device 240:77 cannot be opened" in failed.err


@pytest.mark.client(
    "ctr run --device (more than four, with interfaces)", "refused", "a machine has room for 4"
)
def test_more_than_there_is_room_for_is_refused(pods: Pods, tmp_path: Path) -> None:
    loops = [Loop(tmp_path / f"disk{number}") for number in range(5)]
    try:
        four = [word for loop in loops[:4] for word in loop.option]
        script = f"{LOOK}\nprint(*sorted(name for name in os.listdir('/dev') if name.startswith('loop')))"
        seen = pods.run("python3", "-c", script, loops[0].path, options=tuple(four)).ok().out.splitlines()
        assert seen[1].split() == sorted(Path(loop.path).name for loop in loops[:4])
        refused = pods.run("true", options=(*four, *loops[4].option))
        assert "a machine has room for 4 network interfaces and disks" in refused.err
    finally:
        for loop in loops:
            loop.close()


@pytest.mark.client("ctr run --device /dev/net/tun, /dev/fuse", "works", "the guest's own")
def test_devices_of_every_kernel_are_the_guests(pods: Pods) -> None:
    """A tunnel that the container makes is in its VM alone; fuse answers to a version."""
    script = """\
import fcntl, os, struct
fcntl.ioctl(os.open("/dev/net/tun", os.O_RDWR), 0x400454CA, struct.pack("16sH22x", b"mine", 0x1001))
print("mine" in os.listdir("/sys/class/net"), os.open("/dev/fuse", os.O_RDWR) > 0)
"""
    options = ("--device", "/dev/net/tun", "--device", "/dev/fuse", "--cap-add", "CAP_NET_ADMIN")
    assert pods.run("python3", "-c", script, options=options).ok().out == "True True\n"
    assert "mine" not in os.listdir("/sys/class/net")
