"""The test bed's fake GPU, spoken to as QEMU does: at its socket, with files for memory and interrupts."""

import json
import mmap
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.testbed import gauges
from tests.testbed.devices import TOPOLOGIES, Wiring
from tests.testbed.fakegpu import A6000, H100, FakeGpu, Model
from tests.testbed.gauges import Fault, Gauges
from tests.testbed.vfiouser import CONFIG_REGION, MSI, Command, Server

COMMAND, POINTER = 0x04, 0x34
MASTER = 0x4
EXPRESS, FLR, LINK_STATUS = 0x10, 1 << 15, 0x12
SCRATCH, WHERE, BYTES, START, RESULT = 0x04, 0x10, 0x18, 0x1C, 0x20
GIB = 1 << 30


class Client:
    """What QEMU is to a server: `__call__` is one request and its answer's body."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        self._number = 0

    def __call__(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> bytes:
        self.send(command, body, fds)
        number, _, size, flags, error = struct.unpack("<HHIII", self._exactly(16))
        assert (number, flags & 0xF) == (self._number, 1)
        answer = self._exactly(size - 16)
        if flags & 0x20:
            raise OSError(error, os.strerror(error))
        return answer

    def send(self, command: int, body: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0) -> None:
        self._number += 1
        message = struct.pack("<HHIII", self._number, command, 16 + len(body), flags, 0) + body
        socket.send_fds(self.socket, [message], fds)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            assert part, "the server hung up"
            data += part
        return data

    def read(self, region: int, offset: int, size: int) -> bytes:
        return self(Command.REGION_READ, struct.pack("<QII", offset, region, size))[16:]

    def write(self, region: int, offset: int, data: bytes) -> None:
        self(Command.REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data)

    def word(self, offset: int, region: int = CONFIG_REGION) -> int:
        return int.from_bytes(self.read(region, offset, 2), "little")

    def set_word(self, offset: int, value: int) -> None:
        self.write(CONFIG_REGION, offset, struct.pack("<H", value))

    def capability(self, wanted: int) -> int:
        at = self.word(POINTER) & 0xFF
        while self.word(at) & 0xFF != wanted:
            at = self.word(at) >> 8
            assert at, f"no capability {wanted:#x}"
        return at

    def map(self, iova: int, size: int, fd: int, offset: int = 0, flags: int = 3) -> None:
        self(Command.DMA_MAP, struct.pack("<IIQQQ", 32, flags, offset, iova, size), (fd,))

    def copy(self, where: int, size: int, way: int) -> int:
        """What came of it."""
        self.write(0, WHERE, struct.pack("<QII", where, size, way))
        return self.word(RESULT, region=0)


class Machine:
    def __init__(self, client: Client, gauge: Path) -> None:
        self.client = client
        self._gauge = gauge

    def counted(self) -> dict[str, int]:
        return dict(gauges.read(self._gauge))

    def fail(self, fault: Fault) -> None:
        gauges.fail(self._gauge, fault)


def plugged(directory: Path, model: Model) -> Iterator[Machine]:
    path, gauge = directory / "gpu.sock", directory / "gauge"
    with Gauges(gauge) as counters, Server(path, FakeGpu(model, counters)):
        client = Client(path)
        client(Command.VERSION, struct.pack("<HH", 0, 0) + b"{}\0")
        client.set_word(COMMAND, MASTER)
        with client.socket:
            yield Machine(client, gauge)


@pytest.fixture
def gpu(tmp_path: Path) -> Iterator[Machine]:
    yield from plugged(tmp_path, H100)


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram")
    os.truncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def test_it_is_an_h100_of_128_gib(gpu: Machine) -> None:
    client = gpu.client
    assert (client.word(0), client.word(2)) == (0x10DE, 0x2330)
    assert client.read(CONFIG_REGION, 0x09, 3) == b"\x00\x02\x03"
    for index, size in {0: 1 << 24, 1: 0, 2: 128 * GIB, 4: 1 << 25}.items():
        about = client(Command.GET_REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0))
        assert struct.unpack_from("<Q", about, 16)[0] == size
    assert client.word(client.capability(EXPRESS) + LINK_STATUS) == 5 | 16 << 4


def test_what_is_read_only_stays(gpu: Machine) -> None:
    for offset in range(0, 0x100, 4):
        gpu.client.write(CONFIG_REGION, offset, b"\xff" * 4)
    assert gpu.client.read(CONFIG_REGION, 0, 4) == struct.pack("<HH", 0x10DE, 0x2330)
    bar = int.from_bytes(gpu.client.read(CONFIG_REGION, 0x18, 8), "little")
    assert bar == (1 << 64) - 128 * GIB + 0xC  # as a BAR of that size answers


@pytest.mark.parametrize("kind", ["flr", "bus"])
def test_a_reset_is_counted_and_clears_registers_but_no_memory(gpu: Machine, kind: str) -> None:
    client = gpu.client
    client.write(0, SCRATCH, b"left")
    client.write(2, 100 * GIB - 2, b"tenant")
    before = gpu.counted()
    if kind == "flr":
        control = client.capability(EXPRESS) + 8
        client.set_word(control, FLR)
        assert not client.word(control) & FLR
    else:
        client(Command.RESET)
    after = gpu.counted()
    assert [after[name] - before[name] for name in ("flrs", "bus_resets")] == (
        [1, 0] if kind == "flr" else [0, 1]
    )
    assert client.read(0, SCRATCH, 4) == bytes(4)
    assert client.word(COMMAND) == 0
    assert client.read(2, 100 * GIB - 2, 6) == b"tenant"


def test_dma_goes_through_what_is_mapped_and_no_further(gpu: Machine, ram: int) -> None:
    client = gpu.client
    client.map(0x10000, 0x1000, ram, offset=0x4000)
    client.map(0x11000, 0x1000, ram, offset=0x8000)
    os.pwrite(ram, b"first", 0x5000 - 5)
    os.pwrite(ram, b"second", 0x8000)
    assert client.copy(0x11000 - 5, 11, 1) == 1
    assert client.read(2, 0, 11) == b"firstsecond"
    client.write(2, 0, b"FIRSTSECOND")
    assert client.copy(0x11000 - 5, 11, 2) == 1
    assert os.pread(ram, 5, 0x5000 - 5) + os.pread(ram, 6, 0x8000) == b"FIRSTSECOND"
    assert client.copy(0x12000 - 4, 8, 2) == 2
    client(Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0x11000, 0x1000))
    assert client.copy(0x11000, 4, 1) == 2
    counted = gpu.counted()
    assert (counted["maps"], counted["unmaps"], counted["mapped_bytes"]) == (2, 1, 0x1000)
    assert (counted["dmas"], counted["dma_faults"]) == (2, 2)


def test_memory_that_it_may_only_read_is_not_written(gpu: Machine, ram: int) -> None:
    gpu.client.map(0, 0x1000, ram, flags=1)
    assert (gpu.client.copy(0, 4, 1), gpu.client.copy(0, 4, 2)) == (1, 2)


def test_without_bus_mastering_there_is_no_dma(gpu: Machine, ram: int) -> None:
    gpu.client.map(0, 0x1000, ram)
    gpu.client.set_word(COMMAND, 0)
    assert gpu.client.copy(0, 4, 1) == 2


def test_an_interrupt_follows(gpu: Machine, ram: int) -> None:
    gpu.client.map(0, 0x1000, ram)
    event = os.eventfd(0)
    gpu.client(Command.SET_IRQS, struct.pack("<IIIII", 20, 0x24, MSI, 0, 1), (event,))
    gpu.client.copy(0, 4, 1)
    assert os.eventfd_read(event) == 1
    os.close(event)
    assert gpu.counted()["interrupts"] == 1


def test_files_come_with_their_own_message_also_where_many_are_on_the_way(gpu: Machine) -> None:
    rams = [os.memfd_create(f"ram{number}") for number in range(40)]
    for number, fd in enumerate(rams):
        os.truncate(fd, mmap.PAGESIZE)
        os.pwrite(fd, bytes([number]), 0)
        body = struct.pack("<IIQQQ", 32, 3, 0, number * mmap.PAGESIZE, mmap.PAGESIZE)
        gpu.client.send(Command.DMA_MAP, body, (fd,), flags=0x10)  # without an answer
    for number, fd in enumerate(rams):
        assert gpu.client.copy(number * mmap.PAGESIZE, 1, 1) == 1
        assert gpu.client.read(2, 0, 1) == bytes([number])
        os.close(fd)


def test_one_that_is_gone_answers_with_ones(gpu: Machine) -> None:
    gpu.fail(Fault.GONE)
    assert gpu.client.word(0) == 0xFFFF
    gpu.client.set_word(COMMAND, 0)
    gpu.fail(Fault.NONE)
    assert (gpu.client.word(0), gpu.client.word(COMMAND)) == (0x10DE, MASTER)


def test_one_that_dies_by_its_reset(gpu: Machine) -> None:
    gpu.fail(Fault.DIES_BY_RESET)
    assert gpu.client.word(0) == 0x10DE
    gpu.client(Command.RESET)
    assert gpu.client.word(0) == 0xFFFF
    gpu.fail(Fault.NONE)
    assert gpu.client.word(0) == 0x10DE


def test_one_whose_link_is_narrow_after_its_reset(gpu: Machine) -> None:
    gpu.fail(Fault.NARROW_AFTER_RESET)
    gpu.client(Command.RESET)
    assert gpu.client.word(gpu.client.capability(EXPRESS) + LINK_STATUS) == 5 | 8 << 4


def test_what_it_does_not_know_is_an_error_and_not_the_end(gpu: Machine) -> None:
    with pytest.raises(OSError, match="not implemented"):
        gpu.client(99)
    assert gpu.client.word(0) == 0x10DE


def test_a_servers_own_mistake_is_told(tmp_path: Path) -> None:
    machines = plugged(tmp_path, A6000)
    client = next(machines).client
    client.send(Command.REGION_READ, b"short")
    with pytest.raises((AssertionError, OSError)):
        client.word(0)
    with pytest.raises(struct.error):
        next(machines)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_device_has_a_name_and_a_place_of_its_own(name: str, tmp_path: Path) -> None:
    wiring = Wiring(TOPOLOGIES[name], tmp_path)
    places = [tuple(way) for way in wiring.places.values()]
    assert len(set(places)) == len(places)
    ids = [json.loads(option)["id"] for option in wiring.options if option.startswith("{")]
    assert len(set(ids)) == len(ids)
    assert set(wiring.places) <= set(ids)
