"""User namespaces of pods and containers, made by this machine's kernel as a guest's would."""

import asyncio
import fcntl
import os
import signal
import socket
import stat
import subprocess
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agent import boot, devices, ids, libc, network, uevents, users
from agent.files import read
from agent.ids import Ids
from agent.pod import Pod
from agent.reaper import Reaper
from agent.stdio import Stdio
from agent.users import Users
from rpc.api import agent as api
from rpc.errors import InvalidArgument
from rpc.netlink import Netlink

RANGES = [(0, 100000, 65536)]
MAPPED = Ids(RANGES, [(0, 200000, 1000), (1000, 5, 1)])
NS_GET_USERNS = 0xB701  # ioctl_ns(2)
by_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may map IDs that are not its own")


def owner_of(namespace: int) -> int:
    """The inode of the user namespace that another one belongs to."""
    owner = fcntl.ioctl(namespace, NS_GET_USERNS)
    try:
        return os.fstat(owner).st_ino
    finally:
        os.close(owner)


def ip(words: str) -> bytes:
    return subprocess.run(["ip", *words.split()], check=True, stdout=subprocess.PIPE).stdout


def change(device: str) -> None:
    """The kernel tells of it as if it had changed."""
    Path(device, "uevent").write_text("change")


def in_child(function: Callable[[], None]) -> int:
    """The status of a process that runs it: what it enters, this one does not."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            function()
            status = 0
        except BaseException:  # noqa: BLE001 - it is shown, and makes the status
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@by_root
def test_what_a_pod_has_in_common_belongs_to_its_users() -> None:
    made = Users(MAPPED)

    def look() -> None:
        before = os.stat("/proc/self/ns/user").st_ino
        made.enter()
        assert os.stat("/proc/self/ns/user").st_ino == before  # the agent stays whose it is
        for kind in ("net", "ipc", "uts"):
            fd = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
            assert owner_of(fd) == os.stat(made.path).st_ino
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
        with made.where_devices_come():
            assert os.stat("/proc/self/ns/net").st_ino == first_net
        assert os.stat("/proc/self/ns/net").st_ino == os.fstat(made.net).st_ino

    first_net = os.stat("/proc/self/ns/net").st_ino
    assert in_child(look) == 0
    assert os.stat("/proc/self/ns/net").st_ino == first_net


@by_root
def test_devices_are_told_of_where_the_agent_is_no_more() -> None:
    """The kernel tells no network namespace of another user namespace of a device that comes or changes."""
    found = iter((None, "there"))

    async def look() -> None:
        Users(MAPPED).enter()
        waiting = asyncio.create_task(uevents.appearance(lambda: next(found), "device", 5.0))
        await asyncio.sleep(0)  # it has looked once, and waits
        change("/sys/class/mem/null")
        assert await waiting == "there"
        assert [name for _, name in socket.if_nameindex()] == ["lo"]

    assert in_child(lambda: asyncio.run(look())) == 0


@by_root
def test_mappings_that_the_kernel_does_not_take_leave_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(InvalidArgument, match=r"the kernel does not take linux\.gidMappings"):
        Users(Ids(RANGES, [*RANGES, *RANGES]))
    assert os.listdir("/proc/self/fd") == before


@by_root
def test_the_first_process_of_a_pods_pids_is_one_of_its_users(tmp_path: Path) -> None:
    """And nobody in particular, where nobody has no place."""

    async def look() -> None:
        made = Users(MAPPED)
        pod = Pod("web", str(tmp_path), Reaper(), made)
        path = pod.pid_namespace()
        pid = int(path.split("/")[2])
        try:
            assert users.of_process(pid) == MAPPED
            fd = os.open(path, os.O_RDONLY)
            assert owner_of(fd) == os.stat(made.path).st_ino
            lines = read(f"/proc/{pid}/status").decode().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            assert (status["Uid"].split(), status["Gid"].split()) == (["165534"] * 4, ["5"] * 4)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    assert in_child(lambda: asyncio.run(look())) == 0


def test_ids_inside_and_outside() -> None:
    assert [MAPPED.gid_inside(gid) for gid in (200000, 200999, 5, 201000, 0)] == [0, 999, 1000, None, None]
    assert [MAPPED.gid_outside(gid) for gid in (0, 1000, 1001)] == [200000, 5, None]
    assert [MAPPED.uid_inside(uid) for uid in (100000, 0)] == [0, None]
    assert MAPPED.uid_outside(65535) == 165535
    assert (Ids().uid_inside(7), Ids().gid_outside(7)) == (7, 7)
    assert ids.read_lines("         0     100000      65536\n") == RANGES
    assert ids.lines(RANGES) == "0 100000 65536\n"


def spec(**linux: Any) -> dict[str, Any]:
    return {"linux": {"namespaces": [{"type": "user"}], **linux}}


@by_root
def test_more_ranges_than_the_kernel_keeps_in_their_order_are_the_same() -> None:
    """It sorts what are more than five (kernel/user_namespace.c), and shows them so."""
    ranges = [(each, 300000 + each, 1) for each in (5, 0, 1, 2, 3, 4)]

    def look() -> None:
        made = Users(Ids(ranges, ranges))
        libc.setns(made.fd, libc.CLONE_NEWUSER)
        assert users.of_process(os.getpid()) == Ids(ranges, ranges)

    assert in_child(look) == 0


def test_ids_of_a_config() -> None:
    line = {"containerID": 0, "hostID": 100000, "size": 65536}
    assert ids.of_spec(spec(uidMappings=[line], gidMappings=[line])) == Ids(RANGES, RANGES)
    assert ids.of_spec({}).is_same()


@pytest.mark.parametrize("given", [None, [], {}, [1], [{"hostID": -1}], [{"size": 2**32}], [{}] * 341])
def test_a_user_namespace_without_ids_is_none(given: object) -> None:
    with pytest.raises(InvalidArgument, match="uidMappings"):
        ids.of_spec(spec(uidMappings=given))


@by_root
def test_pipes_are_given_to_who_is_to_have_them() -> None:
    stdio = Stdio.pipes(stdin=False)
    try:
        stdio.give_to(100001, 200002)
        owners = [(os.fstat(fd).st_uid, os.fstat(fd).st_gid) for fd in stdio.inherited]
        assert owners == [(0, 0), (100001, 200002), (100001, 200002)]  # /dev/null stays everybody's
    finally:
        stdio.close()


@by_root
def test_nodes_of_devices_are_bound_from_where_they_are_right(tmp_path: Path) -> None:
    disk = {"path": "/dev/sdb", "type": "b", "major": 7, "minor": 3, "fileMode": 0o640, "uid": 100000}
    tun = {"path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200}
    asked: dict[str, Any] = {"linux": {"devices": [disk, tun]}}
    directory = tmp_path / "nodes" / "web"
    with devices.nodes_of(asked, str(directory)):
        assert asked["linux"]["devices"] == []
        assert [mount["destination"] for mount in asked["mounts"]] == ["/dev/sdb", "/dev/net/tun"]
        abouts = [os.stat(mount["source"]) for mount in asked["mounts"]]
        assert [(about.st_mode, about.st_uid, about.st_gid) for about in abouts] == [
            (stat.S_IFBLK | 0o640, 100000, 0),
            (stat.S_IFCHR | 0o666, 0, 0),
        ]
        assert [about.st_rdev for about in abouts] == [os.makedev(7, 3), os.makedev(10, 200)]
    assert not directory.exists()


@pytest.mark.parametrize("waits", [False, True], ids=["there", "awaited"])
@by_root
def test_the_pods_network_is_its_users_whenever_they_are_made(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for before they were made, or is being done then, is there with all that it has."""
    local, port = b"\xc0\x00\x02\x07", "01.0"
    asked = api.NetworkRequest(
        interfaces=[
            api.Interface(
                name="eth0",
                port=port,
                mtu=1400,
                addresses=[api.Address(local=local, prefix=24, prefix_route=True)],
            )
        ]
    )

    def by_port(asking: Netlink) -> dict[str, tuple[int, str]]:
        there = [each for each in socket.if_nameindex() if each[1] not in ("lo", "other")]
        return dict(zip([port], there, strict=False))

    monkeypatch.setattr(network, "_by_port", by_port)
    monkeypatch.setattr(boot, "load_feature", lambda _: None)

    async def look() -> None:
        libc.unshare(libc.CLONE_NEWNET)
        tested = network.Network()
        if waits:
            applying = asyncio.create_task(tested.apply(asked))
            await asyncio.sleep(0)  # it waits for the device
            moving = asyncio.create_task(tested.move(enter))
            await asyncio.sleep(0)
            ip("link add vm type veth peer name other")
            await applying
            await moving
        else:
            ip("link add vm type veth peer name other")
            await tested.apply(asked)
            await tested.move(enter)
        assert b"inet 192.0.2.7/24" in ip("-o address show dev eth0")
        assert os.stat("/proc/self/ns/net").st_ino == os.fstat(made[0].net).st_ino
        await tested.move(lambda: made[0])  # a container that could not be made, and the next one
        await tested.apply(asked)

    def enter() -> Users:
        made.append(Users(MAPPED))
        made[0].enter()
        return made[0]

    made: list[Users] = []
    assert in_child(lambda: asyncio.run(look())) == 0


@by_root
def test_a_network_card_goes_to_where_the_pods_network_is() -> None:
    """One that came before the pod had users: it is up, and has its addresses, once more."""
    local = bytes((192, 0, 2, 7))
    address = api.Address(local=local, prefix=24, broadcast=bytes((192, 0, 2, 255)))
    wanted = api.PciDevice(name="card", kind="nic", interface="net1", addresses=[address])

    def look() -> None:
        libc.unshare(libc.CLONE_NEWNET)
        subprocess.run("ip link add card type veth peer name other".split(), check=True)
        assert network.set_up_card("card", wanted) == "net1"
        made = Users(MAPPED)
        made.enter()
        network.move_card("net1", wanted, made)
        shown = subprocess.run("ip -o address show dev net1".split(), check=True, capture_output=True).stdout
        assert b" 192.0.2.7/24 " in shown
        assert sorted(name for _, name in socket.if_nameindex()) == ["lo", "net1"]

    assert in_child(look) == 0
