"""A PCI function that calls itself a GPU: NVIDIA's ids and BARs, FLR, MSI, memory, DMA, and counters.

No driver of NVIDIA's would work with it: what it stands for is what the host does with a device before and
after a guest has it. Must not know how it is plugged in. inside/gpus.py reads its counters.

BAR 0, in words of 32 bits; a reset zeroes all but the first:

    0x00  what chip it is, as NVIDIA's has it there (NV_PMC_BOOT_0)
    0x04  whatever was written to it
    0x10  where in the memory of who owns it, 0x14: the upper half
    0x18  how many bytes, at most 64 KiB
    0x1c  1: from there to the start of the GPU's own memory; 2: the other way; an MSI follows
    0x20  what came of it: 1 done, 2 there was no such memory

BAR 2 (or 1) is that memory. No reset clears it, as nobody promises of a real one.
"""

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from tests.testbed.gauges import Fault, Gauges
from tests.testbed.vfiouser import CONFIG_REGION

_MIB, _GIB = 1 << 20, 1 << 30
_PAGE = 4096
_CONFIG_BYTES = 4096
_IO, _64_BIT, _PREFETCHABLE = 0x1, 0x4, 0x8
_LARGE = _64_BIT | _PREFETCHABLE

# Of configuration space (PCI Express Base Specification, 7.5).
_COMMAND, _BARS, _POINTER = 0x04, 0x10, 0x34
_MEMORY, _MASTER, _INTX_OFF = 0x2, 0x4, 0x400
_PM, _MSI, _EXPRESS = 0x40, 0x48, 0x60
_CONTROL, _LINK_STATUS = _EXPRESS + 0x08, _EXPRESS + 0x12
_FLR_CAPABLE, _FLR = 1 << 28, 1 << 15

_SCRATCH, _WHERE, _BYTES, _START, _RESULT = 0x04, 0x10, 0x18, 0x1C, 0x20
_MOST_BYTES = 64 << 10
_IN, _OUT = 1, 2
_DONE, _NO_MEMORY = 1, 2


@dataclass(frozen=True, slots=True)
class Model:
    """class_code: of 24 bits. bars: size and type bits, by index. link: generation and lanes."""

    device_id: int
    class_code: int
    subsystem: tuple[int, int]
    bars: Mapping[int, tuple[int, int]]
    memory_bar: int | None
    chip: int = 0
    link: tuple[int, int] = (5, 16)
    vendor_id: int = 0x10DE


H100 = Model(
    device_id=0x2330,
    class_code=0x030200,
    subsystem=(0x10DE, 0x16C1),
    bars={0: (16 * _MIB, _LARGE), 2: (128 * _GIB, _LARGE), 4: (32 * _MIB, _LARGE)},
    memory_bar=2,
    chip=0x180000A1,
)
A6000 = Model(
    device_id=0x2230,
    class_code=0x030000,
    subsystem=(0x10DE, 0x1459),
    bars={0: (16 * _MIB, 0), 1: (256 * _MIB, _LARGE), 3: (32 * _MIB, _LARGE)},
    memory_bar=1,
    chip=0x172000A1,
    link=(4, 16),
)
A6000_AUDIO = Model(
    device_id=0x1AEF,
    class_code=0x040300,
    subsystem=(0x10DE, 0x1459),
    bars={0: (16 << 10, 0)},
    memory_bar=None,
    link=(4, 16),
)


class FakeGpu:
    """A vfiouser.Device."""

    def __init__(self, model: Model, gauges: Gauges) -> None:
        self._model = model
        self._gauges = gauges
        self._memory = Memory()
        self._vram: dict[int, bytearray] = {}
        self._eventfd: int | None = None
        self._config, self._writable = _configuration(model)
        self._registers = bytearray(_PAGE)
        self._died = False
        self.regions = {index: size for index, (size, _) in model.bars.items()} | {
            CONFIG_REGION: _CONFIG_BYTES
        }
        self._forget()

    def connected(self) -> None:
        self._gauges.add("connections")

    def read(self, region: int, offset: int, size: int) -> bytes:
        if self._gone():
            return b"\xff" * size
        if region == CONFIG_REGION:
            return bytes(self._config[offset : offset + size])
        if region == self._model.memory_bar:
            return b"".join(self._page(at)[low:high] for at, low, high in _pages(offset, size))
        if region == 0 and offset + size <= _PAGE:
            return bytes(self._registers[offset : offset + size])
        return bytes(size)

    def write(self, region: int, offset: int, data: bytes) -> None:
        if self._gone():
            return
        if region == CONFIG_REGION:
            self._configure(offset, data)
        elif region == self._model.memory_bar:
            self._store(offset, data)
        elif region == 0 and offset >= _SCRATCH and offset + len(data) <= _RESULT:
            self._registers[offset : offset + len(data)] = data
            if offset <= _START < offset + len(data):
                self._copy()

    def reset(self) -> None:
        self._gauges.add("bus_resets")
        self._forget()

    def interrupt_by(self, eventfd: int | None) -> None:
        if self._eventfd is not None:
            os.close(self._eventfd)
        self._eventfd = eventfd

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        self._gauges.add("maps")
        self._gauges.add("mapped_bytes", size)
        self._memory.map(iova, size, fd, offset, writable)

    def unmap(self, iova: int, size: int) -> None:
        self._gauges.add("unmaps")
        self._gauges.add("mapped_bytes", -self._memory.unmap(iova, size))

    def unmap_all(self) -> None:
        self.unmap(0, 1 << 64)

    def _gone(self) -> bool:
        fault = self._gauges.fault
        if fault is Fault.NONE:
            self._died = False
        return fault is Fault.GONE or self._died

    def _forget(self) -> None:
        """What every reset does."""
        self._registers[:] = bytes(_PAGE)
        struct.pack_into("<I", self._registers, 0, self._model.chip)
        struct.pack_into("<H", self._config, _COMMAND, 0)
        struct.pack_into("<H", self._config, _CONTROL, 0)
        generation, lanes = self._model.link
        if self._gauges.fault is Fault.NARROW_AFTER_RESET:
            lanes //= 2
        struct.pack_into("<H", self._config, _LINK_STATUS, generation | lanes << 4)
        self._died = self._gauges.fault is Fault.DIES_BY_RESET

    def _configure(self, offset: int, data: bytes) -> None:
        before = self._word(_COMMAND)
        for at, value in enumerate(data, offset):
            mask = self._writable[at]
            self._config[at] = self._config[at] & ~mask | value & mask
        after = self._word(_COMMAND)
        for bit, name in ((_MEMORY, "memory_on"), (_MASTER, "master_on")):
            if after & bit and not before & bit:
                self._gauges.add(name)
        if self._word(_CONTROL) & _FLR:
            self._gauges.add("flrs")
            self._forget()

    def _word(self, at: int) -> int:
        (value,) = struct.unpack_from("<H", self._config, at)
        return int(value)

    def _page(self, at: int) -> bytes | bytearray:
        return self._vram.get(at, bytes(_PAGE))

    def _store(self, offset: int, data: bytes) -> None:
        done = 0
        for at, low, high in _pages(offset, len(data)):
            self._vram.setdefault(at, bytearray(_PAGE))[low:high] = data[done : done + high - low]
            done += high - low

    def _copy(self) -> None:
        where, size, way = struct.unpack_from("<QII", self._registers, _WHERE)
        if way not in (_IN, _OUT):
            return
        size = min(size, _MOST_BYTES)
        allowed = self._word(_COMMAND) & _MASTER
        memory_bar = self._model.memory_bar
        try:
            if not allowed or memory_bar is None:
                raise LookupError("it may not")
            if way == _IN:
                self._store(0, self._memory.read(where, size))
            else:
                self._memory.write(where, self.read(memory_bar, 0, size))
        except LookupError:
            self._gauges.add("dma_faults")
            result = _NO_MEMORY
        else:
            self._gauges.add("dmas")
            result = _DONE
        struct.pack_into("<I", self._registers, _RESULT, result)
        if self._eventfd is not None:
            os.write(self._eventfd, struct.pack("<Q", 1))
            self._gauges.add("interrupts")


class Memory:
    """What a device reaches by DMA. A guest's RAM comes in pages, tens of thousands, of few files."""

    def __init__(self) -> None:
        self._maps: dict[int, tuple[int, mmap.mmap | None, int, bool]] = {}
        self._files: dict[tuple[int, int], mmap.mmap] = {}

    def map(self, iova: int, size: int, fd: int | None, offset: int, writable: bool) -> None:
        file = None
        if fd is not None:
            found = os.fstat(fd)
            key = found.st_dev, found.st_ino
            file = self._files.get(key)
            if file is None and found.st_size:
                file = self._files[key] = mmap.mmap(fd, found.st_size)
        self._maps[iova] = (size, file, offset, writable)

    def unmap(self, iova: int, size: int) -> int:
        """How many bytes less it is."""
        exact = self._maps.get(iova)
        if exact is not None and exact[0] == size:
            del self._maps[iova]
            return size
        inside = [at for at in self._maps if iova <= at < iova + size]
        return sum(self._maps.pop(at)[0] for at in inside)

    def read(self, iova: int, size: int) -> bytes:
        """Raises LookupError where there is nothing."""
        return b"".join(file[at : at + count] for file, at, count in self._parts(iova, size, write=False))

    def write(self, iova: int, data: bytes) -> None:
        """All or nothing. Raises LookupError where there is nothing, or it may only be read."""
        done = 0
        for file, at, count in self._parts(iova, len(data), write=True):
            file[at : at + count] = data[done : done + count]
            done += count

    def _parts(self, iova: int, size: int, *, write: bool) -> list[tuple[mmap.mmap, int, int]]:
        parts = []
        while size:
            start, length, file, offset = self._around(iova, write)
            count = min(size, start + length - iova)
            parts.append((file, offset + iova - start, count))
            iova, size = iova + count, size - count
        return parts

    def _around(self, iova: int, write: bool) -> tuple[int, int, mmap.mmap, int]:
        for start, (length, file, offset, writable) in self._maps.items():
            if start <= iova < start + length and file is not None and (writable or not write):
                return start, length, file, offset
        raise LookupError(f"no memory at {iova:#x}")


def _pages(offset: int, size: int) -> list[tuple[int, int, int]]:
    """Each page's number, and from where to where in it."""
    end = offset + size
    return [
        (at, max(offset - at * _PAGE, 0), min(end - at * _PAGE, _PAGE))
        for at in range(offset // _PAGE, -(-end // _PAGE))
    ]


def _configuration(model: Model) -> tuple[bytearray, bytearray]:
    """Configuration space as at power-on, and which of its bits can be written."""
    space, mask = bytearray(_CONFIG_BYTES), bytearray(_CONFIG_BYTES)
    struct.pack_into("<HH", space, 0, model.vendor_id, model.device_id)
    struct.pack_into("<H", space, 0x06, 0x10)  # it has a list of capabilities
    struct.pack_into("<I", space, 0x08, model.class_code << 8 | 0xA1)
    struct.pack_into("<HH", space, 0x2C, *model.subsystem)
    struct.pack_into("<H", mask, _COMMAND, _MEMORY | _MASTER | _INTX_OFF)
    mask[0x0C] = mask[0x3C] = 0xFF
    for index, (size, kind) in model.bars.items():
        struct.pack_into("<I", space, _BARS + 4 * index, kind)
        address = ~(size - 1) & 0xFFFF_FFFF_FFFF_FFFF
        struct.pack_into("<I", mask, _BARS + 4 * index, address & 0xFFFF_FFF0)
        if kind & _64_BIT:
            struct.pack_into("<I", mask, _BARS + 4 * index + 4, address >> 32)
    space[_POINTER] = _PM
    # Power management, version 3: it keeps its state in D3hot, so that this is no way to reset it.
    struct.pack_into("<BBHH", space, _PM, 0x01, _MSI, 0x0003, 0x0008)
    struct.pack_into("<H", mask, _PM + 4, 0x0003)
    # MSI: one vector, 64 bits of address.
    struct.pack_into("<BBH", space, _MSI, 0x05, _EXPRESS, 0x0080)
    struct.pack_into("<HIIH", mask, _MSI + 2, 0x0001, 0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF)
    # PCI Express, version 2, an endpoint. Its capabilities, control, status; the same of its link.
    generation, lanes = model.link
    struct.pack_into("<BBH", space, _EXPRESS, 0x10, 0x00, 0x0002)
    struct.pack_into("<I", space, _EXPRESS + 0x04, _FLR_CAPABLE | 0x8002)
    struct.pack_into("<I", space, _EXPRESS + 0x0C, generation | lanes << 4)
    struct.pack_into("<I", space, _EXPRESS + 0x2C, ((1 << generation) - 1) << 1)
    struct.pack_into("<H", space, _EXPRESS + 0x30, generation)
    struct.pack_into("<H", mask, _CONTROL, 0xF8EF | _FLR)
    return space, mask
