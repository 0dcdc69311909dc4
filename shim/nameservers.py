"""Name servers on the loopback of the pod's network namespace, for the guest, whose loopback is another.

Docker has its own at 127.0.0.11 there, for the names of a network's containers, and names it in resolv.conf.
What the guest's programs ask at that address its agent hands over, and is answered from here. It must not
know of containers, nor read what is asked.

Its sockets are of the network namespace that the calling thread is in.
"""

import asyncio
import logging
import socket
import struct
from pathlib import Path

from rpc.api import agent as api
from rpc.errors import AlreadyExists, CasemateError, DataLoss, Unavailable
from shim.tasks import Tasks
from shim.vm.guest import Machine

ANSWER_S = 10.0
READ_BYTES = 128 << 10
MOST_ASKED = 64
"""Questions at a time. More wait until one is answered."""
MOST_FILE_BYTES = 64 << 10
MOST_TABLE_BYTES = 1 << 20
MOST_SERVERS = 3
"""That a C library asks (resolv.conf(5), MAXNS)."""
MOST_MESSAGE_BYTES = 65535
RESOLV_CONF = "/etc/resolv.conf"
SOCKETS = Path("/proc/thread-self/net/udp")
log = logging.getLogger("casemate")


def named_by(resolv_conf: bytes) -> list[str]:
    """The servers on the loopback that it names, in its order: those that anybody asks."""
    found: list[str] = []
    for line in resolv_conf.decode(errors="replace").splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            found.append(words[1])
    return [address for address in found[:MOST_SERVERS] if _is_loopback(address)]


def _is_loopback(text: str) -> bool:
    try:
        return socket.inet_pton(socket.AF_INET, text)[0] == 127
    except (OSError, ValueError):
        return False


def served(table: str) -> set[str]:
    """The addresses that have a UDP socket, of /proc/net/udp (proc(5)); of any port, as Docker's gets the
    packets of port 53 by a rule of its own for the namespace."""
    found = set()
    for line in table.splitlines()[1:]:
        number = int(line.split()[1].partition(":")[0], 16)
        found.add(socket.inet_ntoa(struct.pack("=I", number)))
    return found


class NameServers:
    """Of one machine's pod."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._files: list[Path] = []
        self._known: set[str] = set()
        self.any = False
        """Whether one of them is asked."""
        self._tasks = Tasks("a name server could not be asked")
        self._room = asyncio.Semaphore(MOST_ASKED)

    def heed(self, resolv_conf: Path) -> None:
        """A container's file, which its client may write anew."""
        self._files.append(resolv_conf)

    async def settle(self) -> None:
        """Returns when the guest can ask all that there are now and that a container is told of.

        Raises Unavailable, or what the guest says.
        """
        try:
            self._files = [path for path in self._files if path.exists()]  # others' containers are gone
            wanted = [address for path in self._files for address in named_by(_read(path))]
            if set(wanted) <= self._known:
                return
            there = served(_read(SOCKETS, MOST_TABLE_BYTES).decode())
        except OSError as error:
            raise Unavailable("the pod's name servers cannot be found", str(error)) from error
        for address in dict.fromkeys(wanted):
            if address in there and address not in self._known:
                await self._open(address)

    async def _open(self, address: str) -> None:
        try:
            await self._machine.call(api.NAME_SERVER, api.NameServerRequest(address=address))
        except AlreadyExists as error:  # a program of the guest's serves names there: they are its own
            log.warning("names are not asked of the pod's network: %s", error)
        else:
            self.any = True
            self._tasks.start(self._serve(address))
        self._known.add(address)

    async def close(self) -> None:
        await self._tasks.cancel()

    async def _serve(self, address: str) -> None:
        request = api.ReadOutputRequest(exec_id=address, stream=api.STDOUT, max_bytes=READ_BYTES)
        header = api.NAME_HEADER
        held = b""
        try:
            while not (answer := await self._machine.call(api.READ_OUTPUT, request, patient=True)).eof:
                if len(answer.data) > READ_BYTES:
                    raise DataLoss("the guest answered more than was asked for")
                held += answer.data
                while len(held) >= header.size:
                    number, how, length = header.unpack_from(held)
                    if len(held) < header.size + length:
                        break
                    question = held[header.size : header.size + length]
                    held = held[header.size + length :]
                    await self._room.acquire()
                    self._tasks.start(self._ask(address, number, how, question))
        except CasemateError as error:  # the machine's end is told elsewhere
            log.info("names are not asked any more at %s: %s", address, error)

    async def _ask(self, address: str, number: int, how: int, question: bytes) -> None:
        """Without an answer there is none in the guest either: whoever asks there has a time limit."""
        ask = _by_connection if how == api.Asked.BY_CONNECTION else _by_datagram
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await ask(address, question)
            data = api.NAME_HEADER.pack(number, how, len(answer)) + answer
            await self._machine.call(
                api.WRITE_STDIN, api.WriteStdinRequest(exec_id=address, data=data), patient=True
            )
        except (CasemateError, OSError, TimeoutError, EOFError) as error:
            log.debug("no answer of the name server at %s: %s", address, error)
        finally:
            self._room.release()


def _read(path: Path, most_bytes: int = MOST_FILE_BYTES) -> bytes:
    with open(path, "rb") as file:
        return file.read(most_bytes)


async def _by_datagram(address: str, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as asking:
        asking.connect((address, api.NAME_PORT))
        await loop.sock_sendall(asking, question)
        return await loop.sock_recv(asking, MOST_MESSAGE_BYTES)


async def _by_connection(address: str, question: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(address, api.NAME_PORT)
    try:
        writer.write(len(question).to_bytes(2, "big") + question)
        return await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    finally:
        writer.close()
