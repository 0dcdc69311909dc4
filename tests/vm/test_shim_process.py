"""Namespaces, anchors and other processes of the shim's, with root's privileges and without a guest."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from shim import network, system
from shim.namespaces import HostNamespaces
from shim.vm.users import FIRST_ANCHOR_UID, FIRST_UID, UIDS
from tests.unit.shim.pods import config
from tests.vm.isolation import isolated

ROOT = Path(__file__).parents[2]
NOBODYS_UID = FIRST_UID + 2 * UIDS + 11

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


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
        network.enter_network(network.open_pod_network(config()))
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
        network.enter_network(network.open_pod_network(document))
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
        assert own.wait(60) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        own.kill()
        own.wait()


MAKER = """
import asyncio, os, sys
from pathlib import Path
from shim.anchor import Anchors
from shim.helper import in_thread
from rpc.errors import Internal

async def main():
    while root := await in_thread(sys.stdin.readline):
        try:
            anchor, pid = await anchors.make(root.rstrip("\\n"))
            print(anchor.pid, pid, flush=True)
        except Internal as error:
            print(error, flush=True)

kept = os.open("/etc/hostname", os.O_RDONLY)
os.set_inheritable(kept, True)
proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
anchors = Anchors(proc, Path(sys.argv[1]), Path(sys.argv[2]))
asyncio.run(main())
"""


class Maker:
    """A process that has Anchors, as a shim has: a directory of its own, users from where all take them."""

    def __init__(self, locks: Path, directory: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", MAKER, str(locks), str(directory)],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.anchors: list[int] = []
        """By descriptors: a pid may be another's by the time that they are killed."""

    def ask(self, root: Path) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{root}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def make(self, root: Path) -> int:
        pid, shown = map(int, self.ask(root).split())
        assert pid == shown, "the tests' process is in the host's own PID namespace"
        self.anchors.append(os.pidfd_open(pid))
        return pid

    def close(self) -> None:
        for pidfd in self.anchors:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
        self.process.communicate("")


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    maker = Maker(tmp_path / "users", tmp_path)
    yield maker
    maker.close()


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t") for line in lines if ":\t" in line)


def test_an_anchor_has_the_containers_root_and_nothing_else(tmp_path: Path, maker: Maker) -> None:
    (tmp_path / "of-the-container").touch()
    pid = maker.make(tmp_path)
    proc = Path(f"/proc/{pid}")
    assert sorted(os.listdir(proc / "root")) == ["of-the-container", "users"]
    assert os.path.samefile(proc / "cwd", tmp_path)
    assert os.listdir(proc / "fd") == []
    status = status_of(pid)
    assert status["Uid"].split() == [str(FIRST_ANCHOR_UID)] * 4
    assert status["Gid"].split() == [str(FIRST_ANCHOR_UID)] * 4
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


def test_anchors_of_one_pod_have_a_user_that_no_other_pods_have(tmp_path: Path, maker: Maker) -> None:
    (tmp_path / "other").mkdir()
    other = Maker(tmp_path / "users", tmp_path / "other")
    try:
        uids = [status_of(who.make(tmp_path))["Uid"].split()[0] for who in (maker, maker, other)]
    finally:
        other.close()
    assert uids == [str(FIRST_ANCHOR_UID), str(FIRST_ANCHOR_UID), str(FIRST_ANCHOR_UID + 1)]


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

    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


def test_an_anchor_that_cannot_be_is_an_error_and_the_next_one_can(tmp_path: Path, maker: Maker) -> None:
    said = maker.ask(tmp_path / "none")
    assert "the container's anchor process failed" in said
    assert "No such file or directory" in said
    maker.make(tmp_path)


def test_an_anchor_is_small_and_has_nothing_of_the_shims(tmp_path: Path, maker: Maker) -> None:
    proc = Path(f"/proc/{maker.make(tmp_path)}")
    assert os.listdir(tmp_path) == ["users"]
    assert "casemate-anchor (deleted)" in os.readlink(proc / "exe")
    assert (proc / "cmdline").read_bytes() == b"casemate-anchor\0"
    mapped = [line.split() for line in (proc / "maps").read_text().splitlines()]
    assert not [line for line in mapped if "w" in line[1] and "x" in line[1]]
    assert {line[5] for line in mapped if len(line) > 5 and "w" in line[1]} == {"[stack]"}
    rollup = (proc / "smaps_rollup").read_text()
    assert int(rollup.partition("\nRss:")[2].split()[0]) <= 64  # KiB


# --- programs of the host's ---


def test_what_is_run_in_the_host_is_there_and_the_caller_is_not() -> None:
    def links() -> list[str]:
        return [os.readlink(f"/proc/thread-self/ns/{kind}") for kind in ("net", "mnt")]

    before = links()
    host = HostNamespaces.current()

    def work() -> None:
        own = links()
        assert not set(own) & set(before)
        assert host.run(links) == before
        process = host.run(
            lambda: subprocess.Popen(["readlink", "/proc/self/ns/net"], stdout=subprocess.PIPE, text=True)
        )
        assert process.communicate()[0].strip() == before[0]
        with pytest.raises(FileNotFoundError, match="nowhere"):
            host.run(lambda: os.stat("/nowhere"))
        assert links() == own

    try:
        isolated(work, system.CLONE_NEWNS | system.CLONE_NEWNET)
    finally:
        os.close(host.net)
        os.close(host.mnt)
