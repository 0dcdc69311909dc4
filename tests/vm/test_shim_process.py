"""What the shim does with root's privileges and without a guest: mounts, namespaces, anchors, clean-up.

Each test that mounts does it in a thread with a mount namespace of its own: nothing of it is seen outside.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rpc.api.types import Mount
from rpc.errors import InvalidArgument, NotFound, Unimplemented
from shim import cleanup, network, seclusion, system
from shim.cleanup import clean_pod, remove_tree
from shim.journal import Entry, Journal, Kind
from shim.paths import PodPaths
from shim.rootfs import bound, mounted
from shim.spec import SharedMount
from shim.vm.share import shared_directories
from shim.vm.users import FIRST_UID, UIDS
from tests.unit.shim.pods import POD, config, running_pod

ROOT = Path(__file__).parents[2]
NOBODYS_UID = FIRST_UID + UIDS + 11

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def isolated(work: Callable[[], None], flags: int = system.CLONE_NEWNS) -> None:
    """Runs it in a thread that has namespaces of its own, and raises what it raises."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            system.unshare(flags)
            if flags & system.CLONE_NEWNS:
                system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
            work()
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def tmpfs(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    system.mount("tmpfs", str(path), "tmpfs")
    return path


def mount_points(below: Path) -> list[str]:
    return cleanup.mount_points_below(str(below))


# --- rootfs ---


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


def test_a_mount_in_a_journal_is_undone_once(tmp_path: Path) -> None:
    paths = PodPaths("default", "web", tmp_path)
    paths.directory.mkdir(parents=True)

    def work() -> None:
        point = tmpfs(tmp_path / "netns")
        journal = Journal(paths.journal)
        journal.add(Entry(Kind.MOUNT, str(point)))
        journal.add(Entry(Kind.MOUNT, str(tmp_path / "never-mounted")))
        journal.add(Entry(Kind.MOUNT, str(tmp_path)))  # a directory that is no mount point
        journal.close()
        assert clean_pod(paths) == [f"mount {point}", f"directory {paths.directory}"]
        assert mount_points(tmp_path) == []

    isolated(work)


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


# --- network ---


def interfaces() -> dict[str, bool]:
    """name: whether it is up. A socket belongs to the namespace that it was made in; /sys does not."""
    import fcntl
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        found = {}
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
            name = line.partition(":")[0].strip()
            answer = fcntl.ioctl(control, 0x8913, struct.pack("16sH14x", name.encode(), 0))  # SIOCGIFFLAGS
            found[name] = bool(struct.unpack_from("H", answer, 16)[0] & 1)
        return found


def test_a_pod_without_a_network_namespace_gets_one_with_a_loopback() -> None:
    def work() -> None:
        before = os.readlink("/proc/thread-self/ns/net")
        network.enter_pod_network(config())
        assert os.readlink("/proc/thread-self/ns/net") != before
        assert {name: up for name, up in interfaces().items() if name == "lo"} == {"lo": True}

    isolated(work, system.CLONE_NEWNS)


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network namespace as a CNI plugin leaves it: a path."""
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "echo; exec sleep 1000"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield f"/proc/{process.pid}/ns/net"
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_namespace_that_is_named_is_entered_and_left_as_it_is(namespace: str) -> None:
    document = config()
    document["linux"] = {
        "namespaces": [
            *(entry for entry in document["linux"]["namespaces"] if entry["type"] != "network"),
            {"type": "network", "path": namespace},
        ]
    }

    def work() -> None:
        network.enter_pod_network(document)
        assert os.readlink("/proc/thread-self/ns/net") == os.readlink(namespace)
        assert interfaces()["lo"] is False

    for _ in range(2):
        isolated(work, system.CLONE_NEWNS)


# --- processes ---


def test_only_the_users_own_processes_are_killed() -> None:
    own = subprocess.Popen(["/bin/sleep", "1000"], user=NOBODYS_UID)
    other = subprocess.Popen(["/bin/sleep", "1000"], user=NOBODYS_UID + 1)
    try:
        system.kill_processes_of(NOBODYS_UID)
        assert own.wait(10) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        own.kill()
        own.wait()


MAKER = """
import os, sys
from shim.anchor import fork_maker
from rpc.errors import Internal

kept = os.open("/etc/hostname", os.O_RDONLY)
os.set_inheritable(kept, True)
proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
maker = fork_maker(proc)
for root in sys.stdin:
    try:
        print(*maker.make(root.rstrip("\\n")), flush=True)
    except Internal as error:
        print(error, flush=True)
"""


class Maker:
    """A process that has an AnchorMaker, as a shim has."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAKER],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.anchors: list[int] = []

    def ask(self, root: Path) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{root}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def make(self, root: Path) -> int:
        pid, shown = map(int, self.ask(root).split())
        assert pid == shown, "the tests' process is in the host's own PID namespace"
        self.anchors.append(pid)
        return pid

    def close(self) -> None:
        for pid in self.anchors:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        self.process.communicate("")


@pytest.fixture
def maker() -> Iterator[Maker]:
    maker = Maker()
    yield maker
    maker.close()


def test_an_anchor_has_the_containers_root_and_nothing_else(tmp_path: Path, maker: Maker) -> None:
    (tmp_path / "of-the-container").touch()
    pid = maker.make(tmp_path)
    proc = Path(f"/proc/{pid}")
    assert os.listdir(proc / "root") == ["of-the-container"]
    assert os.path.samefile(proc / "cwd", tmp_path)
    assert os.listdir(proc / "fd") == []
    status = dict(line.split(":\t") for line in (proc / "status").read_text().splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["65534"] * 4
    assert status["Gid"].split() == ["65534"] * 4
    assert status["Groups"].split() == []
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
    assert status["Name"] == "casemate-anchor"
    assert os.readlink(proc / "ns/net") == os.readlink("/proc/self/ns/net")


def test_anchors_of_two_containers_are_two(tmp_path: Path, maker: Maker) -> None:
    for name in ("first", "second"):
        (tmp_path / name / name).mkdir(parents=True)
    first, second = (maker.make(tmp_path / name) for name in ("first", "second"))
    assert os.listdir(f"/proc/{first}/root") == ["first"]
    assert os.listdir(f"/proc/{second}/root") == ["second"]


def test_an_anchor_that_is_killed_is_gone(tmp_path: Path, maker: Maker) -> None:
    """No zombie is left where nobody waits for it."""
    pid = maker.make(tmp_path)
    fd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    poll_gone(fd)
    assert maker.make(tmp_path) != 0
    assert not Path(f"/proc/{pid}").exists()


def poll_gone(pidfd: int) -> None:
    import select

    assert select.select([pidfd], [], [], 10)[0]
    os.close(pidfd)


def test_an_anchor_that_cannot_be_is_an_error_and_the_next_one_can(tmp_path: Path, maker: Maker) -> None:
    said = maker.ask(tmp_path / "none")
    assert "the container's anchor process failed" in said
    assert "No such file or directory" in said
    maker.make(tmp_path)


def test_the_maker_ends_with_its_shim(tmp_path: Path, maker: Maker) -> None:
    maker.make(tmp_path)
    children = Path(f"/proc/{maker.process.pid}/task/{maker.process.pid}/children").read_text().split()
    assert len(children) == 1
    fd = os.pidfd_open(int(children[0]))
    maker.process.kill()
    poll_gone(fd)
