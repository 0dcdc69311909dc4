"""How a `start` gets a machine of the pool: in the fork server's child that serves it, the machine's side is
node/spare.py.

    child                                                the spare
    who asks, for what; order, nature                 ->
                                                      <- granted, or declined
    go: when the socket was bound; the connection to
        `start`, its listener, its network as fds     ->
                                                      <- has: from here on the child is not needed

Until then the child can go on alone. It must not know how many spares there are, nor who makes them.
"""

import os
import socket
import time
from typing import Any

from config import places
from config.settings import Settings
from node.likeness import Likeness
from node.order import Order
from rpc.errors import CasemateError
from shim import forkserver
from shim.bootstrap import Start
from shim.bundle import is_containers
from shim.network import open_pod_network
from shim.paths import CLAIM, SPARES
from shim.wants import Wants, wants_of

ANSWER_S = 0.5


class Claimed:
    """A spare that waits for the word. network: a descriptor of the pod's, if it has one already."""

    def __init__(self, connection: socket.socket, network: int | None) -> None:
        self._connection = connection
        self._network = network

    def hand_over(self, start: socket.socket, listener: int, bound_s: float) -> bool:
        """Whether the spare says the last word to `start`; if not, nothing was done."""
        fds = [start.fileno(), listener, *([] if self._network is None else [self._network])]
        until_s = time.monotonic() + ANSWER_S
        try:
            forkserver.send(self._connection, {"bound_s": bound_s}, until_s, fds)
            return "has" in forkserver.receive(self._connection, until_s)[0]
        except (OSError, ValueError):
            return False
        finally:
            self.close()

    def close(self) -> None:
        """The spare ends: who was shown to one `start` is not given to another."""
        self._connection.close()
        if self._network is not None:
            os.close(self._network)
            self._network = None


def order_of(request: Start, settings: Settings, alike: Likeness) -> Order | None:
    """None for a pod that the pool has nothing for, or that is to be refused anyway, or that says only later
    what it wants (the Sandbox API), or of which a kubelet has to be asked."""
    if not is_containers(request.spec):
        return None
    try:
        wants = wants_of(request.spec, settings, request.namespace, request.pod_id)
    except CasemateError:
        return None  # the pod's shim raises it, where the client is told
    order = Order(settings, wants, alike.nature)
    return order if order.is_pooled and not _may_have_devices(settings, wants) else None


def _may_have_devices(settings: Settings, wants: Wants) -> bool:
    """By a kubelet's word, which the pod's shim asks for: nobody waits for that here."""
    if wants.kubelet_pod is None:
        return False
    from shim import kubelet

    return kubelet.may_have(settings, wants)


def claim(order: Order, request: Start, hello: dict[str, Any], alike: Likeness) -> tuple[Claimed | None, str]:
    """A spare that was made to this order, or why there is none."""
    try:
        network = open_pod_network(request.spec)
    except CasemateError:
        return None, ""  # as order_of()
    words = {
        "order": order.words(),
        "cgroups": alike.cgroups,
        "oom_score_adj": alike.oom_score_adj,
        "ignored": alike.ignored,
        **{name: hello[name] for name in ("request", "unreported", "environment", "argv", "started")},
    }
    why = "the pool is empty"
    for path in _sockets(order.digest):
        connection = socket.socket(socket.AF_UNIX)
        try:
            until_s = time.monotonic() + ANSWER_S
            connection.settimeout(ANSWER_S)
            connection.connect(path)
            forkserver.send(connection, words, until_s)
            answer, _ = forkserver.receive(connection, until_s)
        except (FileNotFoundError, ConnectionRefusedError, ConnectionResetError, BrokenPipeError):
            connection.close()  # another pod's by now
            continue
        except (OSError, ValueError) as error:
            connection.close()
            why = f"a machine of the pool does not answer: {error}"
            continue
        if "granted" in answer:
            return Claimed(connection, network), ""
        connection.close()
        why = f"a machine of the pool was given up: {answer.get('declined')}"
    if network is not None:
        os.close(network)
    return None, why


def _sockets(digest: str) -> list[str]:
    """Of the spares that were made to such an order."""
    home = os.path.join(places.run_dir(), SPARES)
    try:
        names = os.listdir(home)
    except FileNotFoundError:
        return []
    return [os.path.join(home, name, CLAIM) for name in names if name.startswith(digest)]
