"""A 9P2000.L client of a few lines, that a test can also have say nonsense; and a server to talk to."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from shim.ninep import wire

CHECKOUT = Path(__file__).resolve().parents[4]
# As __main__ does, but unconfined: these tests need no root.
SERVER = """
import os, socket, sys
from shim.ninep.server import Session
os.umask(0)
root = os.open(sys.argv[1], os.O_PATH | os.O_DIRECTORY)
os.chdir("/proc/self/fd")
Session(socket.socket(fileno=int(sys.argv[2])), root, int(sys.argv[3])).serve()
"""
ROOT = 0
MOST_FIDS = 64


class Refused(Exception):
    """The server's answer was an error: its errno."""

    def __init__(self, number: int) -> None:
        super().__init__(os.strerror(number))
        self.number = number


class Client:
    def __init__(self, connection: socket.socket, server: subprocess.Popen[bytes]) -> None:
        self.connection = connection
        self.server = server
        self._next = 1

    def send(self, kind: int, body: bytes, tag: int = 1) -> None:
        self.connection.sendall(wire.HEAD.pack(wire.HEAD.size + len(body), kind, tag) + body)

    def receive(self) -> tuple[int, int, bytes]:
        """(type, tag, body). Raises EOFError if the server hangs up."""
        head = self._exactly(wire.HEAD.size)
        size, kind, tag = wire.HEAD.unpack(head)
        return kind, tag, self._exactly(size - wire.HEAD.size)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.connection.recv(count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def ask(self, kind: int, body: bytes) -> bytes:
        self.send(kind, body)
        answered, tag, said = self.receive()
        assert tag == 1
        if answered == wire.RLERROR:
            raise Refused(*struct.unpack("<I", said))
        assert answered == kind + 1
        return said

    # what Linux' client does

    def begin(self, user: int = 0) -> None:
        said = self.ask(wire.VERSION_REQUEST, struct.pack("<I", 1 << 19) + wire.text(wire.VERSION))
        assert said == struct.pack("<I", 1 << 19) + wire.text(wire.VERSION)
        names = wire.text(b"") + wire.text(b"/")
        self.ask(wire.ATTACH, struct.pack("<II", ROOT, wire.NO_FID) + names + struct.pack("<I", user))

    def walk(self, *names: str | bytes, start: int = ROOT) -> int:
        """The new fid. Raises Refused, and FileNotFoundError where only a part of the way is there."""
        number, self._next = self._next, self._next + 1
        words = [name.encode() if isinstance(name, str) else name for name in names]
        body = struct.pack("<IIH", start, number, len(words)) + b"".join(map(wire.text, words))
        (found,) = struct.unpack_from("<H", self.ask(wire.WALK, body))
        if found < len(words):
            raise FileNotFoundError(names[found])
        return number

    def open(self, fid: int, flags: int = os.O_RDONLY) -> None:
        self.ask(wire.LOPEN, struct.pack("<II", fid, flags))

    def create(self, directory: int, name: str, flags: int, mode: int = 0o644, group: int = 0) -> None:
        body = struct.pack("<I", directory) + wire.text(name.encode())
        self.ask(wire.LCREATE, body + struct.pack("<III", flags, mode, group))

    def read(self, fid: int, count: int, offset: int = 0) -> bytes:
        return self.ask(wire.READ, struct.pack("<IQI", fid, offset, count))[4:]

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        said = self.ask(wire.WRITE, struct.pack("<IQI", fid, offset, len(data)) + data)
        return int.from_bytes(said, "little")

    def clunk(self, fid: int) -> None:
        self.ask(wire.CLUNK, struct.pack("<I", fid))

    def attributes(self, fid: int) -> dict[str, int]:
        said = self.ask(wire.GETATTR, struct.pack("<IQ", fid, 0x7FF))
        (valid,) = struct.unpack_from("<Q", said)
        assert valid == 0x7FF
        kind, version, path = wire.QID.unpack_from(said, 8)
        mode, user, group, links, device, size = struct.unpack_from("<IIIQQQ", said, 8 + wire.QID.size)
        times = struct.unpack_from("<6Q", said, 8 + wire.QID.size + 12 + 8 * 5)
        return {
            "kind": kind,
            "version": version,
            "path": path,
            "mode": mode,
            "user": user,
            "group": group,
            "links": links,
            "device": device,
            "size": size,
            "modified_ns": times[2] * 10**9 + times[3],
        }

    def names(self, directory: int, room: int = 4096) -> list[str]:
        """Of an open directory, in as many answers as it takes."""
        found: list[str] = []
        offset = 0
        while data := self.ask(wire.READDIR, struct.pack("<IQI", directory, offset, room))[4:]:
            while data:
                offset, _, length = struct.unpack_from("<QBH", data, wire.QID.size)
                start = wire.QID.size + 11
                found.append(data[start : start + length].decode())
                data = data[start + length :]
        return found


@contextlib.contextmanager
def client_of(directory: Path, *, most_fids: int = MOST_FIDS, begun: bool = True) -> Iterator[Client]:
    """A client of a server of its own, which has to end well when the client hangs up."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(20)
        argv = [sys.executable, "-B", "-c", SERVER, str(directory), str(theirs.fileno()), str(most_fids)]
        with subprocess.Popen(
            argv, cwd=CHECKOUT, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE
        ) as server:
            try:
                theirs.close()
                client = Client(ours, server)
                if begun:
                    client.begin()
                yield client
                ours.close()
                assert server.wait(20) == 0, server.stderr.read() if server.stderr else None
            finally:
                server.kill()
