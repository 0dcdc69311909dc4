"""What the shim mounts for a container, with root's privileges and without a guest; and its clean-up."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rpc.api.types import Mount
from rpc.errors import InvalidArgument, NotFound, Unimplemented
from shim import cleanup, seclusion, system
from shim.cleanup import remove_tree
from shim.paths import PodPaths
from shim.rootfs import bound, mounted
from shim.spec import SharedMount
from shim.vm.share import bounded_directory, shared_directories
from tests.unit.shim.pods import POD, config, running_pod
from tests.vm.isolation import isolated, mount_points, tmpfs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def layered(directory: Path, count: int) -> list[Mount]:
    """An overlay of many layers, each with a file of its own, with paths as long as containerd's."""
    base = directory / "io.containerd.snapshotter.v1.overlayfs" / "snapshots"
    layers = []
    for number in range(count):
        layer = base / f"{number:06}" / "fs"
        layer.mkdir(parents=True)
        (layer / f"file-{number}").write_text(str(number))
        (layer / "top").write_text(str(number))
        layers.append(str(layer))
    for name in ("upper", "work"):
        (directory / name).mkdir()
    options = [f"workdir={directory}/work", f"upperdir={directory}/upper", "lowerdir=" + ":".join(layers)]
    return [Mount(type="overlay", source="overlay", options=options)]


@pytest.mark.parametrize("count", [2, 128, 300])
def test_an_overlay_of_many_layers_has_them_all(tmp_path: Path, count: int) -> None:
    def work() -> None:
        base = tmpfs(tmp_path / "snapshots")
        target, links = base / "root", base / "links"
        target.mkdir()
        with mounted(layered(base, count), target, links):
            assert sorted(os.listdir(target)) == sorted(
                ["top", *(f"file-{number}" for number in range(count))]
            )
            assert (target / "top").read_text() == "0", "the first named is the uppermost"
            (target / "written").write_text("by the container")
        assert os.listdir(target) == []
        assert not links.exists()
        assert (base / "upper/written").exists()
        assert mount_points(base) == []

    isolated(work)


def test_too_many_layers_are_refused_and_not_cut(tmp_path: Path) -> None:
    def work() -> None:
        base = tmpfs(tmp_path / "snapshots")
        options = ["lowerdir=" + ":".join(f"/layer/{number}" for number in range(2000))]
        mounts = [Mount(type="overlay", source="overlay", options=options)]
        with pytest.raises(Unimplemented, match="bytes of mount options"), mounted(mounts, base, base / "l"):
            pass
        assert os.listdir(base) == []

    isolated(work)


def test_a_bind_with_options_has_them(tmp_path: Path) -> None:
    def work() -> None:
        base = tmpfs(tmp_path / "base")
        (base / "source").mkdir()
        (base / "target").mkdir()
        mounts = [Mount(type="bind", source=str(base / "source"), options=["rbind", "ro", "nosuid"])]
        with mounted(mounts, base / "target", base / "l"):
            flags = os.statvfs(base / "target").f_flag
            assert flags & os.ST_RDONLY
            assert flags & os.ST_NOSUID
            with pytest.raises(OSError, match="Read-only"):
                (base / "target/x").touch()
        assert not os.statvfs(base / "source").f_flag & os.ST_RDONLY

    isolated(work)


def test_a_mount_that_fails_takes_the_earlier_ones_with_it(tmp_path: Path) -> None:
    def work() -> None:
        base = tmpfs(tmp_path / "base")
        mounts = [
            Mount(type="tmpfs", source="tmpfs", options=["size=1m"]),
            Mount(type="bind", source="/nowhere/at/all", options=["bind"]),
        ]
        with (
            pytest.raises(InvalidArgument, match="cannot mount bind /nowhere/at/all") as caught,
            mounted(mounts, base, base / "l"),
        ):
            pass
        assert caught.value.details == "No such file or directory"
        assert mount_points(tmp_path) == [str(base)]

    isolated(work)


# --- volumes ---


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    (path / "below").mkdir(parents=True)
    (path / "file").write_text("the host's")
    return path


def test_a_directory_and_a_file_are_bound_by_their_names(tmp_path: Path, source: Path) -> None:
    def work() -> None:
        directory = tmp_path / "share"
        directory.mkdir()
        with (
            bound(SharedMount("mount0", str(source), read_only=False, recursive=True), directory),
            bound(SharedMount("mount1", str(source / "file"), read_only=True, recursive=False), directory),
        ):
            assert (directory / "mount0/file").read_text() == "the host's"
            (directory / "mount0/new").touch()
            assert (directory / "mount1").read_text() == "the host's"
            with pytest.raises(OSError, match="Read-only"):
                (directory / "mount1").write_text("no")
        assert (source / "new").exists()
        assert (source / "file").read_text() == "the host's"
        assert mount_points(tmp_path) == []

    isolated(work)


@pytest.mark.parametrize("recursive", [True, False])
def test_what_is_mounted_below_a_source_comes_along_if_it_was_asked_for(
    tmp_path: Path, source: Path, recursive: bool
) -> None:
    def work() -> None:
        tmpfs(source / "below")
        (source / "below/inner").touch()
        directory = tmp_path / "share"
        directory.mkdir()
        with bound(SharedMount("m", str(source), read_only=False, recursive=recursive), directory):
            assert (directory / "m/below/inner").exists() is recursive

    isolated(work)


def test_a_source_that_went_away_is_named(tmp_path: Path) -> None:
    def work() -> None:
        entry = SharedMount("m", str(tmp_path / "gone"), read_only=False, recursive=False)
        with pytest.raises(NotFound, match="gone does not exist"), bound(entry, tmp_path):
            pass
        assert mount_points(tmp_path) == []

    isolated(work)


# --- the share ---


def test_a_guest_sees_what_is_mounted_later_and_can_write_nowhere_else(tmp_path: Path) -> None:
    """virtiofsd has a mount namespace of its own, made before any container came."""
    paths = PodPaths("default", "web", tmp_path)
    paths.directory.mkdir(parents=True)

    def work() -> None:
        asked, answered = threading.Event(), threading.Event()
        seen: list[str] = []

        def serve() -> None:
            system.unshare(system.CLONE_NEWNS)
            system.mount("none", "/", None, system.MS_REC | system.MS_SLAVE)
            answered.set()
            asked.wait()
            seen.extend(os.listdir(paths.served / "web/rootfs"))
            (paths.served / "web/rootfs/by-the-guest").touch()
            for path in (paths.served / "x", paths.served / "web/x"):
                try:
                    path.symlink_to("/etc")
                except OSError as error:
                    seen.append(str(error.strerror))

        with shared_directories(paths):
            virtiofsd = threading.Thread(target=serve)
            virtiofsd.start()
            answered.wait()
            root = paths.shared / "web/rootfs"
            root.mkdir(parents=True)
            system.mount("tmpfs", str(root), "tmpfs")
            (root / "by-the-shim").touch()
            asked.set()
            virtiofsd.join()
            assert seen == ["by-the-shim", "Read-only file system", "Read-only file system"]
            assert (root / "by-the-guest").exists()
            system.umount(str(root))
        assert mount_points(tmp_path) == []
        remove_tree(paths.directory)

    isolated(work)


class Served:
    """A thread that sees files as virtiofsd does: in a mount namespace made before any container came."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._results: queue.Queue[object] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._results.get(timeout=60) is None

    def _run(self) -> None:
        system.unshare(system.CLONE_NEWNS)
        system.mount("none", "/", None, system.MS_REC | system.MS_SLAVE)
        self._results.put(None)
        while (work := self._work.get()) is not None:
            try:
                self._results.put(work())
            except OSError as error:
                self._results.put(error)

    def do(self, work: Callable[[], object]) -> object:
        """The result, or the error."""
        self._work.put(work)
        return self._results.get(timeout=60)

    def flags(self, path: Path) -> int:
        flags = self.do(lambda: os.statvfs(path).f_flag)
        assert isinstance(flags, int), flags
        return flags & (os.ST_RDONLY | os.ST_NOSUID | os.ST_NODEV)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_volume_is_sealed_before_a_guest_can_see_it(tmp_path: Path, source: Path, read_only: bool) -> None:
    """Its copy in virtiofsd's namespace has the same attributes, below it too, and stays as it was made."""
    paths = PodPaths("default", "web", tmp_path)
    paths.directory.mkdir(parents=True)
    sealed = os.ST_NOSUID | os.ST_NODEV | (os.ST_RDONLY if read_only else 0)

    def work() -> None:
        tmpfs(source / "below")
        with shared_directories(paths):
            guest = Served()
            try:
                directory = paths.shared / "web"
                directory.mkdir()
                entry = SharedMount("mount0", str(source), read_only=read_only, recursive=True)
                with bound(entry, directory):
                    served = paths.served / "web/mount0"
                    assert guest.flags(served) == sealed
                    assert guest.flags(served / "below") == sealed
                    written = guest.do((served / "by-the-guest").touch)
                    assert isinstance(written, OSError) is read_only
                    (source / "later").mkdir(exist_ok=True)
                    tmpfs(source / "later")
                    (source / "later/of-the-host").touch()
                    assert guest.do(lambda: os.listdir(served / "later")) == []
                assert guest.do(lambda: os.listdir(paths.served / "web/mount0")) == []
            finally:
                guest.close()
        assert [point for point in mount_points(tmp_path) if "/pods/" in point] == []

    isolated(work)
    assert (source / "by-the-guest").exists() is not read_only


def test_a_root_that_is_bound_is_sealed_too(tmp_path: Path, source: Path) -> None:
    def work() -> None:
        target = tmp_path / "rootfs"
        target.mkdir()
        mounts = [Mount(type="bind", source=str(source), options=["rbind", "rw"])]
        with mounted(mounts, target, tmp_path / "l"):
            flags = os.statvfs(target).f_flag
            assert flags & os.ST_NOSUID
            assert flags & os.ST_NODEV
            assert not flags & os.ST_RDONLY

    isolated(work)


def test_a_mount_within_a_root_is_refused(tmp_path: Path) -> None:
    """The image could have a link in its place, which the host would follow."""

    def work() -> None:
        mounts = [Mount(type="tmpfs", source="tmpfs", target="/etc")]
        with pytest.raises(Unimplemented, match="a mount at /etc"), mounted(mounts, tmp_path, tmp_path / "l"):
            pass

    isolated(work)


def test_what_qemu_writes_is_bounded(tmp_path: Path) -> None:
    def work() -> None:
        directory = tmp_path / "libvirt"
        with bounded_directory(directory):
            for path, most in ((directory / "log/vm.log", 2 << 20), (directory / "core", 8 << 20)):
                with pytest.raises(OSError, match="No space"):
                    path.write_bytes(bytes(most + 1))
                assert path.stat().st_size <= most
            (directory / "log/vm.log").unlink()
            (directory / "log/vm.log").write_text("there is room in one when the other is full")
        assert mount_points(tmp_path) == []
        assert os.listdir(directory) == []

    isolated(work)


def test_a_pod_sees_no_other_pods_directory(tmp_path: Path) -> None:
    own, other = PodPaths("default", "own", tmp_path), PodPaths("default", "other", tmp_path)
    for paths in (own, other):
        paths.directory.mkdir(parents=True)
        paths.state.write_text("{}")

    def work() -> None:
        seclusion.hide_other_pods(own)
        assert os.listdir(own.directory.parent) == [own.key]
        assert own.state.exists()
        own.log.touch()
        seclusion.show_other_pods(own)
        assert len(os.listdir(own.directory.parent)) == 2
        assert own.log.exists()

    isolated(work)
    assert own.log.exists()
    assert other.state.exists()


def test_threads_that_stay_behind_make_nothing_anew_of_a_directory_that_is_removed(tmp_path: Path) -> None:
    """libvirt's make what they miss of its root, parents included, at any moment until the process ends."""
    paths = PodPaths("default", "own", tmp_path)
    paths.directory.mkdir(parents=True)
    status = paths.libvirt / "run" / "vm.xml"
    ready, removed = threading.Event(), threading.Event()
    errors: list[OSError | None] = []

    def stay() -> None:
        status.parent.mkdir(parents=True)
        ready.set()
        removed.wait()
        try:
            status.parent.mkdir(parents=True, exist_ok=True)
            status.touch()
            errors.append(None)
        except OSError as error:
            errors.append(error)

    def work() -> None:
        seclusion.hide_other_pods(paths)
        tmpfs(paths.libvirt)
        thread = threading.Thread(target=stay)
        thread.start()
        try:
            assert ready.wait(60)
            seclusion.step_out(paths)
            cleanup.retire(paths, 3)
        finally:
            removed.set()
            thread.join()

    isolated(work)
    assert len(errors) == 1
    assert isinstance(errors[0], FileNotFoundError)
    assert not paths.directory.exists()


# --- a pod's containers, with real mounts ---


def test_a_container_with_a_root_and_volumes_leaves_no_mount(tmp_path: Path, source: Path) -> None:
    document = config(
        mounts=[
            {"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind", "ro"]},
            {"destination": "/file", "type": "bind", "source": str(source / "file"), "options": ["bind"]},
        ]
    )

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            share = tested.guest.machine.share
            mounts = (Mount(type="bind", source=str(source), options=["rbind", "rw"]),)
            for name in (POD, "second"):
                await tested.run(name, document=document, mounts=mounts)
                assert (share / name / "rootfs/file").read_text() == "the host's"
                assert (share / name / "mount0/file").read_text() == "the host's"
                assert (share / name / "mount1").read_text() == "the host's"
            await tested.exit("second")
            await tested.pod.delete("second")
            assert os.listdir(share) == [POD]
            refused = config(mounts=[{"destination": "/x", "type": "bind", "source": "/nowhere"}])
            with pytest.raises(InvalidArgument):
                await tested.create("third", document=refused, mounts=mounts)
            assert os.listdir(share) == [POD]
            await tested.pod.stop()
            assert os.listdir(share) == []
            assert mount_points(tmp_path) == []

    isolated(lambda: asyncio.run(life()))
    assert (source / "file").read_text() == "the host's"


# --- clean-up ---


@pytest.mark.parametrize("kind", ["bind of the same file system", "tmpfs"])
def test_remove_tree_empties_no_mount(tmp_path: Path, source: Path, kind: str) -> None:
    def work() -> None:
        below = tmp_path / "pod/a b/c"
        below.mkdir(parents=True)
        if kind == "tmpfs":
            tmpfs(below)
            (below / "file").touch()
        else:
            system.mount(str(source), str(below), None, system.MS_BIND)
        remove_tree(tmp_path / "pod")
        assert not (tmp_path / "pod").exists()
        assert mount_points(tmp_path) == []

    isolated(work)
    assert (source / "file").read_text() == "the host's"
    assert (source / "below").is_dir()


def test_two_cleaners_unmount_beside_each_other(tmp_path: Path) -> None:
    def work() -> None:
        errors: list[BaseException] = []
        for _ in range(20):
            for number in range(10):
                (tmp_path / f"pod/{number}").mkdir(parents=True)
                tmpfs(tmp_path / f"pod/{number}")

            def clean() -> None:
                try:
                    remove_tree(tmp_path / "pod")
                except BaseException as error:  # noqa: BLE001 - any error fails the test
                    errors.append(error)

            cleaners = [threading.Thread(target=clean) for _ in range(3)]
            for cleaner in cleaners:
                cleaner.start()
            for cleaner in cleaners:
                cleaner.join()
            assert errors == []
            assert not (tmp_path / "pod").exists()

    isolated(work)
