"""What the guest asks at a loopback address of its own is answered by a server of the pod's namespace."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import AlreadyExists
from shim import nameservers
from shim.nameservers import NameServers, named_by, served
from tests.unit.rpc.wires import pass_time, until
from tests.unit.shim.guests import Guest, running_guest
from tests.unit.shim.networks import in_a_network_of_its_own

ADDRESS = "127.0.0.11"
NO_ANSWER = b"?"
Scenario = Callable[[Guest, NameServers, Path], Awaitable[None]]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network")


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        (b"# of Docker's\nnameserver 127.0.0.11\noptions ndots:0\n", ["127.0.0.11"]),
        (b"nameserver 10.0.0.1\nnameserver\t127.0.0.53 # local\n", ["127.0.0.53"]),
        (b"nameserver 10.0.0.1\n" * 3 + b"nameserver 127.0.0.11\n", []),
        (b"nameserver ::1\nnameserver 127.1\nnameserver\nsearch 127.0.0.11\n", []),
        (b"nameserver \xff\0\n;nameserver 127.0.0.11\n", []),
        (b"", []),
    ],
)
def test_the_servers_on_the_loopback_that_somebody_asks(text: bytes, servers: list[str]) -> None:
    assert named_by(text) == servers


def test_an_address_has_a_server_if_it_has_a_socket() -> None:
    table = (
        "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
        "12506: 0B00007F:E429 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2\n"
        "  506: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2\n"
    )
    assert served(table) == {ADDRESS, "0.0.0.0"}


class Turning(asyncio.DatagramProtocol):
    """A server that answers each question with the question, backwards, but for one."""

    transport: asyncio.DatagramTransport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if data != NO_ANSWER:
            self.transport.sendto(data[::-1], addr)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        length = await reader.readexactly(2)
        writer.write(length + (await reader.readexactly(int.from_bytes(length, "big")))[::-1])
        writer.close()


def write(path: Path, text: str) -> None:
    path.write_text(text)


def run(directory: Path, scenario: Scenario) -> None:
    """In a network where names are served at ADDRESS."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30), running_guest(directory) as guest:
            place = (ADDRESS, api.NAME_PORT)
            transport, turning = await loop.create_datagram_endpoint(Turning, place)
            turning.transport = transport
            names = NameServers(guest.machine)
            try:
                async with await asyncio.start_server(turning.connected, *place):
                    await scenario(guest, names, directory / "resolv.conf")
            finally:
                await names.close()
                transport.close()

    in_a_network_of_its_own(lambda: asyncio.run(main()))


def question(number: int, how: int, content: bytes) -> bytes:
    return api.NAME_HEADER.pack(number, how, len(content)) + content


@needs_root
def test_what_the_guest_asks_is_answered_from_the_namespace(tmp_path: Path) -> None:
    async def scenario(guest: Guest, names: NameServers, path: Path) -> None:
        write(path, f"nameserver {ADDRESS}\n")
        names.heed(path)
        await names.settle()
        await names.settle()
        assert guest.agent.calls.count("NameServer") == 1
        said = question(1, api.Asked.BY_DATAGRAM, b"abc")
        await guest.agent.print("", said[:5], ADDRESS)  # as a stream has it, in pieces
        await guest.agent.print("", said[5:], ADDRESS)
        process = guest.agent.process("", ADDRESS)
        await until(lambda: process.stdin == question(1, api.Asked.BY_DATAGRAM, b"cba"))
        process.stdin.clear()
        long = b"x" + bytes(60_000)
        await guest.agent.print("", question(2, api.Asked.BY_CONNECTION, long), ADDRESS)
        await until(lambda: process.stdin == question(2, api.Asked.BY_CONNECTION, long[::-1]))

    run(tmp_path, scenario)


@needs_root
def test_a_server_that_comes_later_is_asked_from_then_on(tmp_path: Path) -> None:
    """As when a container is connected to a network that has one, and its file is written anew."""

    async def scenario(guest: Guest, names: NameServers, path: Path) -> None:
        write(path, "nameserver 10.0.0.1\nnameserver 127.0.0.99\n")
        names.heed(path)
        await names.settle()
        assert "NameServer" not in guest.agent.calls
        write(path, f"nameserver {ADDRESS}\n")
        await names.settle()
        assert list(guest.agent.containers[""]) == [ADDRESS]
        assert names.any
        os.unlink(path)  # with its container
        await names.settle()

    run(tmp_path, scenario)


@needs_root
def test_a_program_of_the_guests_that_serves_names_keeps_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(guest: Guest, names: NameServers, path: Path) -> None:
        write(path, f"nameserver {ADDRESS}\n")
        names.heed(path)
        guest.agent.fails["NameServer"] = AlreadyExists(f"name server at {ADDRESS}", "in use")
        await names.settle()
        await names.settle()
        assert caplog.text.count(f"name server at {ADDRESS}") == 1
        assert not names.any

    run(tmp_path, scenario)


@needs_root
def test_a_question_without_an_answer_makes_room_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nameservers, "MOST_ASKED", 1)

    async def scenario(guest: Guest, names: NameServers, path: Path) -> None:
        write(path, f"nameserver {ADDRESS}\n")
        names.heed(path)
        await names.settle()
        await guest.agent.print("", question(1, api.Asked.BY_DATAGRAM, NO_ANSWER), ADDRESS)
        await guest.agent.print("", question(2, api.Asked.BY_DATAGRAM, b"ab"), ADDRESS)
        await until(names._room.locked)
        await guest.agent.calls_settle()
        pass_time(nameservers.ANSWER_S)
        process = guest.agent.process("", ADDRESS)
        await until(lambda: process.stdin == question(2, api.Asked.BY_DATAGRAM, b"ba"))

    run(tmp_path, scenario)


@needs_root
def test_a_guest_that_answers_more_than_was_asked_for_is_asked_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario(guest: Guest, names: NameServers, path: Path) -> None:
        async def flood(_: object) -> api.ReadOutputResponse:
            return api.ReadOutputResponse(data=bytes(1 << 20))

        guest.agent.answer(api.READ_OUTPUT, flood)
        write(path, f"nameserver {ADDRESS}\n")
        names.heed(path)
        await names.settle()
        await until(lambda: "more than was asked for" in caplog.text)

    run(tmp_path, scenario)
