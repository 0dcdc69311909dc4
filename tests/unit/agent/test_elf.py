"""ELF headers: real programs, foreign ones, and rubbish."""

import os
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import elf


def read(content: bytes) -> elf.Elf | None:
    fd = os.memfd_create("elf")
    try:
        os.write(fd, content)
        return elf.read(fd)
    finally:
        os.close(fd)


def test_a_real_program_knows_its_machine_and_linker() -> None:
    found = read(Path("/proc/self/exe").resolve().read_bytes())
    assert found is not None
    assert found.machine == os.uname().machine
    assert found.interpreter == "" or Path(found.interpreter).exists()


def header(bits: int, order: str, machine: int) -> bytes:
    byteorder: Literal["big", "little"] = "big" if order == ">" else "little"
    kind = bytes([2 if bits == 64 else 1, 2 if order == ">" else 1])
    return b"\x7fELF" + kind + bytes(12) + machine.to_bytes(2, byteorder) + bytes(60)


@pytest.mark.parametrize(
    ("bits", "order", "number", "name"),
    [
        (64, "<", 62, "x86_64"),
        (64, "<", 183, "aarch64"),
        (64, "<", 243, "riscv64"),
        (32, "<", 3, "i386"),
        (32, "<", 40, "arm"),
        (64, "<", 21, "ppc64le"),
        (64, ">", 21, "ppc64"),
        (64, ">", 22, "s390x"),
        (64, "<", 999, "ELF machine 999"),
    ],
)
def test_machines_have_the_names_of_uname(bits: int, order: str, number: int, name: str) -> None:
    found = read(header(bits, order, number))
    assert found is not None
    assert found.machine == name


def test_32_bit_interpreter_is_found() -> None:
    path = b"/lib/ld-linux.so.2\0"
    head = bytearray(header(32, "<", 3)[:52])
    head[28:32] = (52).to_bytes(4, "little")
    head[42:46] = (32).to_bytes(2, "little") + (1).to_bytes(2, "little")
    entry = (3).to_bytes(4, "little") + (84).to_bytes(4, "little") + bytes(8)
    entry += len(path).to_bytes(4, "little") + bytes(12)
    found = read(bytes(head) + entry + path)
    assert found is not None
    assert found.interpreter == "/lib/ld-linux.so.2"


@given(st.binary(max_size=300))
def test_rubbish_is_survived(rubbish: bytes) -> None:
    read(rubbish)
    read(elf.MAGIC + rubbish)
