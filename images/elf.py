"""Which shared libraries an ELF file asks for, so that an image holds those and no others.

Reads the dynamic section only; must not know about images.
"""

from collections.abc import Iterable
from pathlib import Path
from struct import Struct, error, unpack_from

from rpc.errors import FailedPrecondition

_EHDR = Struct("<16sHHIQQQIHHHHHH")
_PHDR = Struct("<IIQQQQQQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5


def is_elf(content: bytes) -> bool:
    return content.startswith(b"\x7fELF\x02\x01")


def needed(content: bytes) -> list[str]:
    """The DT_NEEDED names of a 64-bit little-endian ELF file. None if it is static."""
    try:
        return _needed(content)
    except (error, ValueError, OverflowError) as problem:
        raise FailedPrecondition("damaged ELF file", str(problem)) from problem


def _needed(content: bytes) -> list[str]:
    header = _EHDR.unpack_from(content)
    phoff, phentsize, phnum = header[5], header[9], header[10]
    programs = [_PHDR.unpack_from(content, phoff + i * phentsize) for i in range(phnum)]
    names: list[int] = []
    strings = 0
    for _, _, offset, _, _, size, _, _ in (p for p in programs if p[0] == _PT_DYNAMIC):
        for at in range(offset, offset + size, 16):
            tag, value = unpack_from("<qQ", content, at)
            if tag == _DT_NULL:
                break
            if tag == _DT_NEEDED:
                names.append(value)
            elif tag == _DT_STRTAB:
                strings = value
    if not names:
        return []
    loads = [p for p in programs if p[0] == _PT_LOAD and p[3] <= strings < p[3] + p[5]]
    if not loads:
        raise ValueError("no segment holds the names of its libraries")
    base = loads[0][2] + strings - loads[0][3]
    return [content[base + at : content.index(b"\0", base + at)].decode() for at in names]


def libraries(programs: Iterable[Path], directories: Iterable[Path]) -> dict[str, Path]:
    """The libraries that the programs need, directly or not: name -> where it was found."""
    found: dict[str, Path] = {}
    searched = list(directories)
    waiting = list(programs)
    while waiting:
        program = waiting.pop()
        for name in needed(program.read_bytes()):
            if name in found:
                continue
            path = next((d / name for d in searched if (d / name).exists()), None)
            if path is None:
                raise FailedPrecondition(f"{program} needs {name}, which is not in {searched[0]}")
            found[name] = path
            waiting.append(path)
    return found
