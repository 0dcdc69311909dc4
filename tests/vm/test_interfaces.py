"""Interfaces of a pod's network that are no veth, and the queues and flags that its guest's have."""

import json
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bench.netns import Namespace, connect, namespace
from config import annotations
from tests.vm.pods import Pods
from tests.vm.test_network import SEND, SERVE

TWO_CPUS = ("--annotation", f"{annotations.VCPUS}=2")
BESIDES = """\
import socket, struct, sys
with socket.socket(type=socket.SOCK_DGRAM) as listening:
    listening.bind(("239.7.7.7", 9000))
    group = socket.inet_aton("239.7.7.7") + socket.inet_aton("10.77.0.2")
    listening.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
    with socket.create_server(("10.77.0.2", 8000)) as server:
        print("serving", flush=True)
        for _ in range(2):
            connection, peer = server.accept()
            with connection:
                length = 0
                while more := connection.recv(65536):
                    length += len(more)
                connection.sendall(f"{length} from {peer[0]}".encode())
    print(listening.recv(100).decode(), flush=True)
"""
"""Takes two connections, and a packet to a group that nothing on the host has joined."""
TELL_GROUP = """\
import socket
with socket.socket(type=socket.SOCK_DGRAM) as sending:
    sending.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("10.77.0.1"))
    sending.sendto(b"to the group", ("239.7.7.7", 9000))
"""


@pytest.fixture
def namespaces() -> Iterator[tuple[Namespace, Namespace, Namespace]]:
    """The pod's, and two others."""
    with ExitStack() as stack:
        yield (
            stack.enter_context(namespace()),
            stack.enter_context(namespace()),
            stack.enter_context(namespace()),
        )


@pytest.mark.client(
    "ctr run --with-ns network:PATH (macvlan)", "works", "its MAC, and what is sent to a group, too"
)
def test_a_macvlan_is_the_guests(pods: Pods, namespaces: tuple[Namespace, Namespace, Namespace]) -> None:
    pod, host, beyond = namespaces
    # The parent's other end is another machine of its network; a second macvlan is another pod of its own.
    connect(host, "parent", beyond, "far", ("10.77.1.1/24", "10.77.0.1/24"), ("fd77:1::1/64", "fd77::1/64"))
    for name, place in (("eth0", pod), ("other", host)):
        host.ip("link", "add", "link", "parent", "name", name, "type", "macvlan", "mode", "bridge")
        host.ip("link", "set", name, "netns", str(place.pid))
    pod.ip("link", "set", "eth0", "address", "02:00:00:00:00:77", "mtu", "1400")
    for place, name, number in ((pod, "eth0", 2), (host, "other", 3)):
        place.ip("address", "add", f"10.77.0.{number}/24", "dev", name)
        place.ip("address", "add", f"fd77::{number}/64", "dev", name, "nodad")
        place.ip("link", "set", name, "up")
    with pods.start("python3", "-uc", BESIDES, options=pod.options) as running:
        assert running.read_until(b"\n", 60).decode() == "serving\n"
        assert "allmulti 1" in pod.ip("-details", "link", "show", "eth0")
        # To it: from beyond the parent, and from beside it.
        assert beyond.run("python3", "-c", SEND, "10.77.0.2", "3000000") == "3000000 from 10.77.0.1\n"
        assert host.run("python3", "-c", SEND, "10.77.0.2", "3000000") == "3000000 from 10.77.0.3\n"
        beyond.run("python3", "-c", TELL_GROUP)
        done = running.finish(20)
        assert (done.code, done.out.splitlines()[-1:]) == (0, ["to the group"]), done
    assert "allmulti 0" in pod.ip("-details", "link", "show", "eth0")
    # By it: to either, in either family.
    script = 'ip -json link show eth0; python3 -c "$0" 10.77.0.1 1000; exec python3 -c "$0" fd77::3 1000'
    with (
        beyond.start("python3", "-uc", SERVE, "10.77.0.1") as one,
        host.start("python3", "-uc", SERVE, "fd77::3") as other,
    ):
        for server in (one, other):
            assert server.stdout is not None
            assert server.stdout.readline() == "serving\n"
        link, *sent = pods.run("sh", "-c", script, SEND, options=pod.options).ok().out.splitlines()
    assert sent == ["1000 from 10.77.0.2", "1000 from fd77::2"]
    (about,) = json.loads(link)
    assert (about["address"], about["mtu"]) == ("02:00:00:00:00:77", 1400)


@pytest.mark.client(
    "ctr run --with-ns network:PATH (an interface of `arp off`)", "works", "as of an ipvlan of mode l3"
)
def test_several_queues_and_an_interface_that_asks_for_no_neighbours(
    pods: Pods, namespaces: tuple[Namespace, Namespace, Namespace]
) -> None:
    """Both ends have one MAC, to which each sends everything, as interfaces do that ask for none."""
    pod, outside, _ = namespaces
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    for place, name in ((pod, "eth0"), (outside, "v0")):
        place.ip("link", "set", name, "address", "02:00:00:00:00:77", "arp", "off")
    pods.ctr.instance.configure(f'allowed_annotations = ["{annotations.VCPUS}"]\n')
    with outside.start("python3", "-uc", SERVE, "10.77.0.1") as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "serving\n"
        script = 'ls /sys/class/net/eth0/queues; ip link show eth0; exec python3 -c "$0" 10.77.0.1 3000000'
        seen = pods.run("sh", "-c", script, SEND, options=(*pod.options, *TWO_CPUS)).ok().out
    *shown, sent = seen.splitlines()
    assert shown[:4] == ["rx-0", "rx-1", "tx-0", "tx-1"]
    assert "NOARP" in shown[4]
    assert sent == "3000000 from 10.77.0.2"
