"""What a fake GPU counts, and how it is told to fail: words in a file that both sides of a bed have.

The server changes them in memory, for a guest's RAM is mapped in tens of thousands of steps; a test in the
bed reads and writes the file, which 9p does not cache. Must not know what a GPU is.
"""

import mmap
import struct
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Self

NAMES = (
    "connections",  # of QEMUs that play the host
    "bus_resets",  # also those of QEMU when it starts
    "flrs",
    "memory_on",  # how often a driver began to use its BARs,
    "master_on",  # and its DMA
    "maps",  # of a piece of memory that DMA reaches
    "unmaps",
    "mapped_bytes",  # now
    "dmas",
    "dma_faults",
    "interrupts",
)
_WORD = struct.Struct("<q")
_WORDS = struct.Struct(f"<{1 + len(NAMES)}q")  # the first is the fault


class Fault(IntEnum):
    NONE = 0
    GONE = 1  # it reads as ones, as one that has fallen off the bus
    DIES_BY_RESET = 2  # so it does after the next reset, until this is NONE again
    NARROW_AFTER_RESET = 3  # its link comes back with half of its lanes


class Gauges:
    """The server's side of a file that it makes."""

    def __init__(self, path: Path) -> None:
        with path.open("x+b") as file:
            file.truncate(_WORDS.size)
            self._words = mmap.mmap(file.fileno(), _WORDS.size)
        self._at = {name: _WORD.size * (1 + number) for number, name in enumerate(NAMES)}

    @property
    def fault(self) -> Fault:
        return Fault(_WORD.unpack_from(self._words)[0])

    def add(self, name: str, count: int = 1) -> None:
        at = self._at[name]
        _WORD.pack_into(self._words, at, _WORD.unpack_from(self._words, at)[0] + count)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._words.close()


def read(path: Path) -> Mapping[str, int]:
    return dict(zip(NAMES, _WORDS.unpack(path.read_bytes())[1:], strict=True))


def fail(path: Path, fault: Fault) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(_WORD.pack(fault))
