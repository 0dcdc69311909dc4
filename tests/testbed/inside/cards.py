"""Run in the bed by device_pods.py: a pod with a virtual function of a network card, and who is on its wire.

What should be seen is the test's business.
"""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.testbed.inside import places
from tests.testbed.inside.given import PCI, casemate, ctr, driver, until_free
from tests.testbed.inside.one_pod import timed

CARD, OTHER = "nic0", "nic1"  # on one wire
HOST, POD, NETWORK = "192.0.2.1", "192.0.2.2", 24
HOST6, POD6, NETWORK6 = "2001:db8::1", "2001:db8::2", 64
BYTES = 200_000
NAME = "net1"
TALK = f"""\
import socket, subprocess
for address in ("{HOST}", "{HOST6}"):
    with socket.create_connection((address, 7), 60) as other:
        other.sendall(b"x" * {BYTES})
        other.shutdown(socket.SHUT_WR)
        print(address, other.makefile().read())
print(subprocess.run(["ip", "-o", "address", "show", "{NAME}"], capture_output=True, text=True).stdout)
"""


def interface(name: str) -> str:
    (found,) = os.listdir(PCI / "devices" / places.addresses()[name] / "net")
    return found


@contextmanager
def virtual_function(name: str) -> Iterator[str]:
    """The address of the first of a card that has one."""
    directory = PCI / "devices" / places.addresses()[name]
    (directory / "sriov_numvfs").write_text("1")
    try:
        yield (directory / "virtfn0").readlink().name
    finally:
        (directory / "sriov_numvfs").write_text("0")


@contextmanager
def counting() -> Iterator[list[str]]:
    """Whoever connects is told how much he sent; the list has where each came from."""
    callers: list[str] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, (address, *_) = listener.accept()
            except OSError:
                return  # it is over
            with connection:
                count = 0
                while data := connection.recv(65536):
                    count += len(data)
                callers.append(address)
                connection.sendall(b"%d" % count)

    with socket.create_server(("::", 7), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield callers
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def look() -> dict[str, Any]:
    other = interface(OTHER)
    for name in (other, interface(CARD)):
        ip("link", "set", name, "up")
    ip("address", "add", f"{HOST}/{NETWORK}", "dev", other)
    ip("address", "add", f"{HOST6}/{NETWORK6}", "dev", other, "nodad")
    seen: dict[str, Any] = {}
    try:
        with virtual_function(CARD) as address, counting() as callers:
            seen["before"] = driver_at(address)
            wish = f"{address},interface={NAME},ip={POD}/{NETWORK},ip={POD6}/{NETWORK6}"
            seen["talk"] = timed(ctr("card", "python3", "-c", TALK, wish=wish, options=()))
            seen["callers"] = callers
            seen["after"] = driver_at(address)
            seen["whole"] = timed(ctr("whole", "true", wish=places.addresses()[CARD]))
            seen["log"] = [entry["detail"] for entry in casemate("gpu", "log", address)]
            disk = f"{places.addresses()['nvme0']},interface={NAME}"
            seen["disk"] = timed(ctr("disk", "true", wish=disk))
        seen["left"] = until_free((CARD, "nvme0"))
        seen["card"] = driver(CARD)
    finally:
        ip("address", "flush", "dev", other)
    return seen


def driver_at(address: str) -> str:
    link = PCI / "devices" / address / "driver"
    return link.readlink().name if link.is_symlink() else ""
