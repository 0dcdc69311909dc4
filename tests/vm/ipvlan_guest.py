"""Run in a VM whose kernel has ipvlan: one redirected as a pod's, and who is behind it.

`python3 -m tests.vm.ipvlan_guest`, privileged, prints by mode what the pod's namespace is seen to have, and
what comes of a connection to it and of one from it. A thread each is in the namespaces of the pod, of its
guest, and of another machine.
"""

import json
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rpc.netlink import Netlink
from shim import interfaces, redirect, system

FAR, GUEST = "10.76.0.2", "10.77.0.2"
PORT = 8000
MAC = "02:00:00:00:00:77"


class Place(ThreadPoolExecutor):
    """A thread in a network namespace of its own."""

    def __init__(self) -> None:
        super().__init__(1)
        self.pid = self.submit(self._enter).result()

    def ip(self, *lines: str) -> None:
        """`ip LINE`, each."""
        self.submit(_ip, lines).result()

    @staticmethod
    def _enter() -> int:
        system.unshare(system.CLONE_NEWNET)
        return threading.get_native_id()


def _ip(lines: tuple[str, ...]) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


def listen(address: str) -> socket.socket:
    return socket.create_server((address, PORT))


def come_of(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as error:
        return type(error).__name__
    return "connected"


def connect(address: str) -> str:
    return come_of(lambda: socket.create_connection((address, PORT), timeout=10).close())


def pod_view() -> tuple[list[str], list[str]]:
    with Netlink() as asking:
        view = interfaces.read(asking)
    return [link.kind for link in view.links.values()], view.impossible


def redirect_to_guest() -> None:
    with Netlink() as asking:
        tap = interfaces.index_of(asking, "casemate7")
        redirect.be_quiet(asking, tap, 1500)
        redirect.join(asking, interfaces.index_of(asking, "eth0"), tap, bytes.fromhex(MAC.replace(":", "")))


def main() -> None:
    system.unshare(system.CLONE_NEWNET)  # the node, whose interface the parent is
    pod, guest, far = Place(), Place(), Place()
    _ip(
        (
            f"link add parent address {MAC} type veth peer name eth0 netns {far.pid}",
            "link set parent up",
            "address add 10.76.0.1/24 dev parent",
            "link add link parent name eth0 type ipvlan mode l2",
            f"link set eth0 netns {pod.pid}",
        )
    )
    far.ip(
        "link set eth0 up",
        f"address add {FAR}/24 dev eth0",
        "route add 10.77.0.0/24 dev eth0",
        # Of the modes but l2 nobody answers for the pod.
        f"neighbour add {GUEST} lladdr {MAC} dev eth0",
    )
    pod.ip(
        f"link add casemate7 type veth peer name eth0 netns {guest.pid} address {MAC}",
        "link set casemate7 up",
        "link set eth0 up",
        f"address add {GUEST}/24 dev eth0",
        "route add default dev eth0",
    )
    guest.ip("link set eth0 up", f"address add {GUEST}/24 dev eth0", "route add default dev eth0")
    pod.submit(redirect_to_guest).result()
    servers = [place.submit(listen, address).result() for place, address in ((guest, GUEST), (far, FAR))]
    for mode in ("l2", "l3", "l3s"):
        pod.ip(f"link set eth0 type ipvlan mode {mode}")
        kinds, impossible = pod.submit(pod_view).result()
        if mode == "l3":
            guest.ip("link set eth0 arp off", "route replace default dev eth0")
        found = {
            "kinds": kinds,
            "impossible": impossible,
            "to": far.submit(connect, GUEST).result(),
            # In mode l3s this would only wait: the answers go astray.
            "from": "" if impossible else guest.submit(connect, FAR).result(),
        }
        print(json.dumps({mode: found}), flush=True)
    for server in servers:
        server.close()


if __name__ == "__main__":
    main()
