"""A name server for the installation that the suite runs in, whose network has no way out.

One of the suite's tests looks up a name of the world by whatever resolv.conf(5) of the host names.
"""

import os
import subprocess
import sys

from bench.instance import Instance

RESOLV_CONF = "/etc/resolv.conf"
READY_S = 10.0
PROGRAM = """\
import os, socket
with socket.socket(type=socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 53))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    while True:
        question, peer = server.recvfrom(512)
        end = question.index(0, 12)
        body = question[12 : end + 5]
        # RFC 1035, 4.1: an A record, with an address of RFC 5737; of another type there is none.
        record = bytes((0xC0, 12, 0, 1, 0, 1, 0, 0, 0, 1, 0, 4, 192, 0, 2, 1))
        found = record if question[end + 1 : end + 3] == b"\\0\\1" else b""
        head = question[:2] + bytes((0x81, 0x80, 0, 1, 0, len(found) // 16, 0, 0, 0, 0))
        server.sendto(head + body + found, peer)
"""


def serve(instance: Instance) -> None:
    """Every name has one address, until the end of the instance. Raises InstanceError with its last words."""
    conf = instance.base / "resolv.conf"
    conf.write_text("nameserver 127.0.0.1\n")
    place = os.path.realpath(RESOLV_CONF)
    if place.startswith("/run/"):  # of which the instance has its own
        there = instance.path(place)
        there.parent.mkdir(parents=True)
        there.touch()
    subprocess.run(instance.inside("mount", "--bind", str(conf), place), check=True, capture_output=True)
    instance.spawn_ready([os.path.realpath(sys.executable), "-IS", "-c", PROGRAM], READY_S)
