"""The agent's way to the shim: whom it takes for the shim, and what it says while it waits."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from agent import transport
from agent.transport import Line
from rpc.errors import InvalidArgument
from tests.unit.rpc.wires import run


class Listener:
    """Connections with the addresses that vsock would say they come from."""

    def __init__(self, *peers: tuple[int, int]) -> None:
        self.peers = list(peers)
        self.ends: list[socket.socket] = []

    async def sock_accept(self, _: object) -> tuple[socket.socket, tuple[int, int]]:
        here, there = socket.socketpair()
        self.ends.append(there)
        return here, self.peers.pop(0)


def test_only_the_hosts_root_is_the_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Context 2 is the host's; its ports below 1024 take a capability, as TCP's do."""
    listener = Listener((1, 77), (3, 77), (2, 1024), (2, 70000), (2, 1023))

    async def life() -> None:
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: listener)
        with socket.socket() as unused:
            connection: Any = await transport._accept(unused)
        *refused, taken = listener.ends
        for end in refused:
            assert end.recv(1) == b""
        connection.send(b"x")
        assert taken.recv(1) == b"x"
        connection.close()
        for end in listener.ends:
            end.close()

    run(life())
    assert not listener.peers


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="transport=carrier-pigeon is unknown"):
        Line({"transport": "carrier-pigeon"})


def test_what_is_said_is_a_line_of_the_console(tmp_path: Path) -> None:
    terminal = tmp_path / "console"
    with pytest.raises(FileNotFoundError):
        transport.say("lost", str(terminal))
    terminal.write_text("")
    transport.say("up \udcff", str(terminal))
    assert terminal.read_text() == "up ?\n"
