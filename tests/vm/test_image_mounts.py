"""Root file systems that are images, as containerd's erofs snapshotter has them, mounted as a shim does."""

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from rpc.api.types import Mount
from rpc.errors import InvalidArgument
from shim import rootfs, system

GONE_S = 30.0
WHITEOUT = 0  # overlayfs: a character device 0:0


def in_own_mounts(action: Callable[[], None]) -> int:
    """The exit code of a process with a mount namespace of its own that does it: 0, 1 if it raised."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            system.unshare(system.CLONE_NEWNS)
            system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
            action()
            code = 0
        finally:
            if code:
                traceback.print_exc(file=sys.__stderr__)
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def without_loops(directory: Path) -> bool:
    """Whether no loop device has a file of this directory any more. Whoever looks at one, as udev does, has
    it stay until it is done, and tells nobody: hence a bounded poll."""
    deadline = time.monotonic() + GONE_S
    while any(map(loops, directory.glob("*"))):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def loops(image: Path) -> str:
    """The loop devices of a file, as losetup(8) lists them."""
    done = subprocess.run(["losetup", "--associated", image], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def snapshot(tmp_path: Path) -> list[Mount]:
    """A writable disk and two layers, of which the upper one takes a file of the other away."""
    trees = [tmp_path / "lower", tmp_path / "upper"]
    for tree in trees:
        tree.mkdir()
        (tree / f"of-{tree.name}").write_text(tree.name)
    (trees[0] / "gone").write_text("")
    os.mknod(trees[1] / "gone", 0o020000, os.makedev(0, WHITEOUT))
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    mounts = [Mount(type="ext4", source=str(disk), options=["rw", "loop"])]
    for tree in trees:
        image = tree.with_suffix(".erofs")
        subprocess.run(["mkfs.erofs", "--quiet", image, tree], check=True, capture_output=True)
        mounts.append(Mount(type="erofs", source=str(image), options=["ro", "loop"]))
    directories = [f"X-containerd.mkdir.path={{{{ mount 0 }}}}/{name}:0755" for name in ("up", "work")]
    overlay = ["workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/up", "lowerdir={{ overlay 2 1 }}"]
    mounts.append(Mount(type="format/mkdir/overlay", source="overlay", options=[*directories, *overlay]))
    return mounts


def test_a_root_of_images_is_an_overlay_of_them_and_its_changes_stay(
    tmp_path: Path, snapshot: list[Mount]
) -> None:
    target = tmp_path / "root"
    target.mkdir()

    def write_and_see() -> None:
        with rootfs.mounted(snapshot, target, tmp_path / "links"):
            assert {path.name for path in target.iterdir()} >= {"of-lower", "of-upper"}
            assert not (target / "gone").exists()
            (target / "written").write_text("kept")
            assert [name for name in os.listdir(tmp_path) if "parts" in name] == []
            assert loops(tmp_path / "disk")
        assert list(target.iterdir()) == []

    def see_again() -> None:
        with rootfs.mounted(snapshot, target, tmp_path / "links"):
            assert (target / "written").read_text() == "kept"

    for step in (write_and_see, see_again):
        assert in_own_mounts(step) == 0
    assert without_loops(tmp_path)


def test_nothing_is_left_of_a_shim_that_is_killed_or_of_an_image_that_is_none(
    tmp_path: Path, snapshot: list[Mount]
) -> None:
    target = tmp_path / "root"
    target.mkdir()

    def killed() -> None:
        with rootfs.mounted(snapshot, target, tmp_path / "links"):
            os.kill(os.getpid(), 9)

    def refused() -> None:
        (tmp_path / "upper.erofs").write_bytes(b"\0" * 8192)
        with pytest.raises(InvalidArgument, match="cannot mount erofs"):
            rootfs.mounted(snapshot, target, tmp_path / "links").__enter__()
        assert [name for name in os.listdir(tmp_path) if "parts" in name] == []

    assert in_own_mounts(killed) == -9
    assert in_own_mounts(refused) == 0
    assert without_loops(tmp_path)
