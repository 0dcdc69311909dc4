"""A pod's network: what its namespace has, its guest has, and packets go both ways."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from bench.netns import Namespace, connect, namespace
from tests.vm.faults import kill_and_wait
from tests.vm.pods import Pods

SERVE = """\
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 8000), family=family) as server:
    print("serving", flush=True)
    connection, peer = server.accept()
    with connection:
        data = b""
        while more := connection.recv(65536):
            data += more
        connection.sendall(str(len(data)).encode() + b" from " + peer[0].encode())
"""
SEND = """\
import socket, sys
with socket.create_connection((sys.argv[1], 8000), timeout=20) as connection:
    connection.sendall(bytes(int(sys.argv[2])))
    connection.shutdown(socket.SHUT_WR)
    print(connection.recv(1000).decode())
"""
# The client is told nothing of what comes later: hence bounded polls, inside the guest.
UNTIL = 'for i in {1..300}; do [[ $(ip address) == *" $1 "* ]] && exit 0; sleep 0.1; done; exit 1'
UNTIL_MAC = 'for i in {1..300}; do [[ $(ip link show $0) == *" $1 "* ]] && exit 0; sleep 0.1; done; exit 1'
UNTIL_NONE = "for i in {1..300}; do [[ -e /sys/class/net/$1 ]] || exit 0; sleep 0.1; done; exit 1"


# Frames of a protocol for experiments (IEEE 802), the last of them as an honest guest sends one.
FORGE = """\
import socket
with open("/sys/class/net/eth0/address") as file:
    own = bytes.fromhex(file.read().strip().replace(":", ""))
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
    raw.bind(("eth0", 0))
    for source in (bytes.fromhex("02aabbccddee"), own[:5] + bytes((own[5] ^ 1,)), bytes(4) + own[4:], own):
        raw.send(bytes.fromhex("ffffffffffff") + source + bytes.fromhex("88b5") + bytes(46))
"""
SEE = """\
import socket
with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as raw:
    raw.bind(("v0", 0x88B5))
    raw.settimeout(60)
    print("looking", flush=True)
    print(raw.recv(2000)[6:12].hex(":"))
"""


@pytest.fixture
def pod() -> Iterator[Namespace]:
    with namespace() as found:
        yield found


@pytest.fixture
def outside() -> Iterator[Namespace]:
    with namespace() as found:
        yield found


def addresses_of(entries: list[dict[str, Any]]) -> dict[str, set[tuple[str, int]]]:
    """By interface, of `ip -json address`."""
    return {
        entry["ifname"]: {(each["local"], each["prefixlen"]) for each in entry["addr_info"]}
        for entry in entries
    }


@pytest.mark.client("ctr run --with-ns network:PATH (interfaces, addresses, routes)", "works", "")
def test_a_guest_has_what_its_namespace_has(pods: Pods, pod: Namespace, outside: Namespace) -> None:
    connect(
        pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"), ("fd77::2/64", "fd77::1/64"), mtu=1400
    )
    pod.ip("route", "add", "default", "via", "10.77.0.1")
    pod.ip("-6", "route", "add", "default", "via", "fd77::1", "metric", "7")
    pod.ip("route", "add", "192.0.2.0/24", "via", "10.77.0.9", "mtu", "1300")
    pod.ip("route", "add", "blackhole", "198.51.100.0/24")
    pod.ip("neighbour", "add", "10.77.0.9", "lladdr", "02:00:00:00:00:09", "dev", "eth0")
    before = pod.run("tc", "qdisc")
    with pods.detached("sleep", "1000", options=pod.options) as name:

        def same(*words: str) -> None:
            guest = json.loads(pods.exec(name, "ip", "-json", *words).ok().out)
            host = json.loads(pod.ip("-json", *words))
            for entries in (guest, host):
                for entry in entries:
                    entry.pop("protocol", None)
                entries[:] = [
                    entry for entry in entries if not str(entry.get("dev", "")).startswith("casemate")
                ]
            assert guest == host, words

        guest = json.loads(pods.exec(name, "ip", "-json", "address").ok().out)
        host = [
            entry for entry in json.loads(pod.ip("-json", "address")) if "casemate" not in entry["ifname"]
        ]
        assert addresses_of(guest) == addresses_of(host)
        for key in ("ifname", "address", "mtu"):
            assert [entry[key] for entry in guest] == [entry[key] for entry in host]
        same("route")
        same("-6", "route")
        same("neighbour", "show", "nud", "permanent")
    assert pod.run("tc", "qdisc") == before
    assert "casemate" not in pod.ip("link")


@pytest.mark.parametrize(("address", "peer"), [("10.77.0.2", "10.77.0.1"), ("fd77::2", "fd77::1")])
def test_packets_go_both_ways(
    pods: Pods, pod: Namespace, outside: Namespace, address: str, peer: str
) -> None:
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"), ("fd77::2/64", "fd77::1/64"))
    with pods.start("python3", "-uc", SERVE, address, options=pod.options) as running:
        assert running.read_until(b"\n", 60).decode() == "serving\n"
        assert outside.run("python3", "-c", SEND, address, "3000000") == f"3000000 from {peer}\n"
        assert running.finish(20).code == 0
    with outside.start("python3", "-uc", SERVE, peer) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "serving\n"
        sent = pods.run("python3", "-c", SEND, peer, "3000000", options=pod.options).ok()
        assert sent.out == f"3000000 from {address}\n"


@pytest.mark.client(
    "ctr run (another MAC for a source than the interface's)", "differs", "no such frame leaves the VM"
)
def test_a_guest_sends_nothing_by_anothers_mac(pods: Pods, pod: Namespace, outside: Namespace) -> None:
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    own = json.loads(pod.ip("-json", "link", "show", "eth0"))[0]["address"]
    with outside.start("python3", "-uc", SEE) as looking:
        assert looking.stdout is not None
        assert looking.stdout.readline() == "looking\n"
        pods.run("python3", "-c", FORGE, options=(*pod.options, "--cap-add", "CAP_NET_RAW")).ok()
        assert looking.stdout.readline().strip() == own


def test_interfaces_that_come_and_go_later(pods: Pods, pod: Namespace, outside: Namespace) -> None:
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    with pods.detached("sleep", "1000", options=pod.options) as name:
        connect(pod, "eth1", outside, "v1", ("10.78.0.2/24", "10.78.0.1/24"), ("fd78::2/64", "fd78::1/64"))
        pods.exec(name, "bash", "-c", UNTIL, "x", "fd78::2/64").ok()
        sent = pods.exec(
            name, "python3", "-c", "import socket; socket.create_connection(('10.78.0.1', 8000))"
        )
        assert "Connection refused" in sent.err
        pod.ip("address", "add", "10.79.0.2/24", "dev", "eth1")
        pods.exec(name, "bash", "-c", UNTIL, "x", "10.79.0.2/24").ok()
        pod.ip("link", "delete", "eth1")
        pods.exec(name, "bash", "-c", UNTIL_NONE, "x", "eth1").ok()
        assert "eth0" in pods.exec(name, "ip", "route", "get", "10.77.0.1").ok().out


@pytest.mark.client(
    "ctr run --with-ns network:PATH (two interfaces of one MAC)", "works", "on two networks, as of nerdctl"
)
def test_two_interfaces_may_have_one_mac_and_another_one_later(
    pods: Pods, pod: Namespace, outside: Namespace
) -> None:
    """nerdctl run --mac-address says it of all networks of a container."""

    def macs(where: str) -> dict[str, str]:
        return {each["ifname"]: each["address"] for each in json.loads(where) if "eth" in each["ifname"]}

    for number in (0, 1):
        ends = (f"10.7{number}.1.2/24", f"10.7{number}.1.1/24")
        connect(pod, f"eth{number}", outside, f"v{number}", ends)
        pod.ip("link", "set", f"eth{number}", "address", "02:00:00:00:00:77")
    with pods.detached("sleep", "1000", options=pod.options) as name:
        shown = pods.exec(name, "ip", "-json", "address").ok().out
        assert macs(shown) == {"eth0": "02:00:00:00:00:77", "eth1": "02:00:00:00:00:77"}
        addresses = addresses_of(json.loads(shown))
        assert addresses["eth0"] >= {("10.70.1.2", 24)}
        assert addresses["eth1"] >= {("10.71.1.2", 24)}
        pod.ip("link", "set", "eth1", "address", "02:00:00:00:00:78")
        pods.exec(name, "bash", "-c", UNTIL_MAC, "eth1", "02:00:00:00:00:78", timeout_s=60).ok()
        pods.exec(name, "bash", "-c", UNTIL, "bash", "10.71.1.2/24", timeout_s=60).ok()


def test_a_network_is_one_pods_alone(pods: Pods, pod: Namespace, outside: Namespace) -> None:
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    with pods.detached("sleep", "1000", options=pod.options) as name:
        second = pods.run("true", options=pod.options)
        assert second.code != 0
        assert "eth0 is another pod's already" in second.err
        assert "10.77.0.1" in pods.exec(name, "ip", "route", "get", "10.77.0.1").ok().out


def test_a_pod_finds_its_network_as_a_killed_one_left_it(
    pods: Pods, pod: Namespace, outside: Namespace
) -> None:
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    with pods.detached("sleep", "1000", options=pod.options) as name:
        kill_and_wait(pods.state(name)["pid"])
    with outside.start("python3", "-uc", SERVE, "10.77.0.1") as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "serving\n"
        sent = pods.run("python3", "-c", SEND, "10.77.0.1", "1000", options=pod.options).ok()
        assert sent.out == "1000 from 10.77.0.2\n"


def test_what_a_guest_cannot_have_is_named(pods: Pods, pod: Namespace, outside: Namespace) -> None:
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    pod.ip("tuntap", "add", "tunnel", "mode", "tun")
    pod.ip("link", "set", "tunnel", "up")
    pod.ip("address", "add", "10.99.0.1/24", "dev", "tunnel")
    pod.ip("route", "add", "10.98.0.0/24", "dev", "eth0", "table", "77")
    with pods.detached("sleep", "1000", options=pod.options) as name:
        log = pods.paths(name).log.read_text()
        assert "interface tunnel is no Ethernet" in log
        assert "a route of table 77" in log
        assert "tunnel" not in pods.exec(name, "ip", "link").ok().out
    for number in range(1, 5):
        connect(pod, f"eth{number}", outside, f"v{number}", (f"10.7{number}.1.2/24", f"10.7{number}.1.1/24"))
    refused = pods.run("true", options=pod.options)
    assert "a machine has room for 4 network interfaces" in refused.err


def test_an_interface_that_had_no_ipv6_gets_some_later(
    pods: Pods, pod: Namespace, outside: Namespace
) -> None:
    """As each does for a moment while CNI's plug-ins make it."""
    connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
    switch = "echo $0 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6"
    pod.run("sh", "-c", switch, "1")
    with pods.detached("sleep", "1000", options=pod.options) as name:
        shown = json.loads(pods.exec(name, "ip", "-json", "address").ok().out)
        assert addresses_of(shown)["eth0"] == {("10.77.0.2", 24)}
        pod.run("sh", "-c", switch, "0")
        pod.ip("address", "add", "fd77::2/64", "dev", "eth0", "nodad")
        pods.exec(name, "bash", "-c", UNTIL, "bash", "fd77::2/64", timeout_s=60).ok()
        shown = json.loads(pods.exec(name, "ip", "-json", "address").ok().out)
        assert {address for address, _ in addresses_of(shown)["eth0"]} >= {"10.77.0.2", "fd77::2"}
