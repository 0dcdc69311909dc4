"""Templates as a maker leaves them, small: real files in a real store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shim.vm.template import KEY_DIGITS, RAM, STATE, Template, TemplateStore, key_of
from tests.unit.ticks import next_tick

MIB = 1 << 20
RAM_BYTES = 64 * MIB


def key(number: int) -> str:
    return f"{number:0{KEY_DIGITS}x}"


def make(store: TemplateStore, of: str = "", **about: Any) -> Template:
    """A template of this key (or of what it is about), which has 64 MiB of RAM, nearly all of it a hole. What
    is done to it later has other times.
    """
    with store.making(of or key_of(about)) as staging:
        assert staging is not None
        write(staging)
        made = store.publish(staging, about)
    next_tick()
    return made


def write(staging: Path) -> None:
    with open(staging / RAM, "xb") as ram:
        ram.truncate(RAM_BYTES)
        for offset in (0, 5 * MIB, RAM_BYTES - 4096):
            ram.seek(offset)
            ram.write(b"ram " * 1024)
    (staging / STATE).write_bytes(b"state " * 10_000)


def flip_byte(file: Path, offset: int) -> None:
    with open(file, "r+b") as data:
        data.seek(offset)
        byte = data.read(1)[0]
        data.seek(offset)
        data.write(bytes([byte ^ 1]))
