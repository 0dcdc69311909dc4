"""What an ELF file says about itself: the machine it was built for, and the interpreter it needs.

Reads an open file; must not know why anybody asks. Anything odd is answered with "not known".
"""

from __future__ import annotations

import os
import struct

MAGIC = b"\x7fELF"
_PT_INTERP = 3
_MAX_HEADERS = 64
_MAX_PATH_BYTES = 4096

# e_machine -> the name `uname -m` gives it
_MACHINES = {
    3: "i386",
    8: "mips",
    20: "ppc",
    21: "ppc64le",
    22: "s390x",
    40: "arm",
    62: "x86_64",
    183: "aarch64",
    243: "riscv64",
    258: "loongarch64",
}


class Elf:
    """machine: as `uname -m` names it. interpreter: a path, empty for a static program."""

    __slots__ = ("interpreter", "machine")

    def __init__(self, machine: str, interpreter: str) -> None:
        self.machine = machine
        self.interpreter = interpreter


def read(fd: int) -> Elf | None:
    """None if the file is no ELF file, or a truncated one."""
    head = os.pread(fd, 64, 0)
    if not head.startswith(MAGIC) or len(head) < 52:
        return None
    wide = head[4] == 2
    order = ">" if head[5] == 2 else "<"
    (number,) = struct.unpack_from(order + "H", head, 18)
    machine = _MACHINES.get(number, f"ELF machine {number}")
    if number == 21 and order == ">":
        machine = "ppc64"
    try:
        return Elf(machine, _interpreter(fd, head, wide, order))
    except struct.error:  # cut short
        return Elf(machine, "")


def _interpreter(fd: int, head: bytes, wide: bool, order: str) -> str:
    if wide:
        (table,) = struct.unpack_from(order + "Q", head, 32)
        size, count = struct.unpack_from(order + "HH", head, 54)
    else:
        (table,) = struct.unpack_from(order + "I", head, 28)
        size, count = struct.unpack_from(order + "HH", head, 42)
    for index in range(min(count, _MAX_HEADERS)):
        entry = os.pread(fd, size, table + index * size)
        (kind,) = struct.unpack_from(order + "I", entry, 0)
        if kind != _PT_INTERP:
            continue
        if wide:
            (offset,) = struct.unpack_from(order + "Q", entry, 8)
            (length,) = struct.unpack_from(order + "Q", entry, 32)
        else:
            (offset,) = struct.unpack_from(order + "I", entry, 4)
            (length,) = struct.unpack_from(order + "I", entry, 16)
        return os.fsdecode(os.pread(fd, min(length, _MAX_PATH_BYTES), offset).split(b"\0", 1)[0])
    return ""
