"""A kernel's package or tree -> an ELF vmlinux that QEMU starts by its PVH entry, and modules ready to load.

Decompressed here, once, so that no guest ever spends time on it. Must not know about root file systems.
"""

import lzma
import zlib
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from struct import Struct, unpack_from
from typing import Any

from images.run import run
from rpc.errors import FailedPrecondition

# Documentation/arch/x86/boot.rst: setup_sects, "HdrS", payload_offset, payload_length
_SETUP_SECTS_AT, _MAGIC_AT, _PAYLOAD_AT = 0x1F1, 0x202, 0x248
_SIZE_SUFFIX_BYTES = 4  # the kernel's build appends the uncompressed size to the payload
_ZSTD, _XZ, _GZIP, _ELF = b"\x28\xb5\x2f\xfd", b"\xfd7zXZ\0", b"\x1f\x8b", b"\x7fELF"
_GZIP_HEADER = 16  # zlib's word for "expect one"
# What every guest's kernel is told.
CMDLINE = (
    # an emulated guest on a busy host can miss the ticks that this test counts, and panics then
    "no_timer_check",
    # A guest of one CPU keeps its LOCK prefixes: taking off 9000 of them costs an emulated guest 0.1 s.
    "noreplace-smp",
)
_EHDR = Struct("<16sHHIQQQIHHHHHH")
_PHDR = Struct("<IIQQQQQQ")
_PT_LOAD, _PT_NOTE = 1, 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18


class KernelKind(StrEnum):
    """Whose kernel: Debian's own, with drivers of virtual machines or of all there are, or one that is built
    from Debian's source for nothing but this."""

    CLOUD = "cloud"
    GENERIC = "generic"
    TUNED = "tuned"


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package: where its files are, and its release (`uname -r`).

    image: a bzImage, or the ELF file itself. modules: a directory with modules.builtin at least.
    """

    release: str
    image: Path
    modules: Path


def find_kernel(tree: Path) -> Kernel:
    """The one kernel in an unpacked tree."""
    images = sorted((tree / "boot").glob("vmlinu[xz]-*"))
    if len(images) != 1:
        raise FailedPrecondition(f"expected one kernel in {tree}/boot, found {len(images)}")
    release = images[0].name.partition("-")[2]
    modules = tree / "usr/lib/modules" / release
    if not modules.is_dir():
        modules = tree / "lib/modules" / release
    return Kernel(release, images[0], modules)


def vmlinux(image: bytes) -> bytes:
    """The ELF file inside a bzImage, or one as it is, without padding, section headers and relocations."""
    return compact(image if image.startswith(_ELF) else _decompress(_payload(image)))


def _payload(bzimage: bytes) -> bytes:
    if bzimage[_MAGIC_AT : _MAGIC_AT + 4] != b"HdrS":
        raise FailedPrecondition("the kernel is not a bzImage")
    setup_sects = bzimage[_SETUP_SECTS_AT] or 4
    offset, length = unpack_from("<II", bzimage, _PAYLOAD_AT)
    start = (setup_sects + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if len(payload) != length or not length:
        raise FailedPrecondition("the kernel's bzImage is truncated")
    return payload


def _decompress(payload: bytes) -> bytes:
    if payload.startswith(_ELF):
        return payload
    if payload.startswith(_ZSTD):
        return run(["zstd", "-dcq"], stdin=payload[:-_SIZE_SUFFIX_BYTES], package="zstd")
    if payload.startswith(_XZ):
        return _stream(lzma.LZMADecompressor(), payload)
    if payload.startswith(_GZIP):
        return _stream(zlib.decompressobj(zlib.MAX_WBITS | _GZIP_HEADER), payload)
    raise FailedPrecondition(f"the kernel's compression is unknown (it starts with {payload[:4].hex()})")


def _stream(decompressor: Any, payload: bytes) -> bytes:
    """Decompresses one stream, whatever follows it."""
    try:
        content: bytes = decompressor.decompress(payload)
    except (lzma.LZMAError, zlib.error) as error:
        raise FailedPrecondition("the kernel's payload is damaged", str(error)) from error
    if not decompressor.eof:
        raise FailedPrecondition("the kernel's payload ends too early")
    return content


def compact(elf: bytes) -> bytes:
    """An ELF executable reduced to its program headers and their bytes, without trailing zeros.

    Raises FailedPrecondition if it has no PVH entry note: QEMU could not start it.
    """
    header = list(_EHDR.unpack_from(elf.ljust(_EHDR.size, b"\0")))
    phoff, phentsize, phnum = header[5], header[9], header[10]
    if not elf.startswith(_ELF) or phentsize != _PHDR.size or phoff + phnum * phentsize > len(elf):
        raise FailedPrecondition("the kernel's payload is not a 64-bit ELF file")
    programs = [list(_PHDR.unpack_from(elf, phoff + i * phentsize)) for i in range(phnum)]
    notes = [p for p in programs if p[0] == _PT_NOTE]
    if not any(_has_pvh_entry(elf[p[2] : p[2] + p[5]]) for p in notes):
        raise FailedPrecondition("the kernel has no PVH entry point (CONFIG_PVH)")
    body = bytearray()
    start = _EHDR.size + phnum * _PHDR.size
    placed: list[tuple[int, int, int]] = []  # old offset, size, new offset
    for program in (p for p in programs if p[0] == _PT_LOAD):
        old, size = program[2], program[5]
        content = elf[old : old + size].rstrip(b"\0")
        body += bytes(-(start + len(body)) % 4096)
        placed.append((old, size, start + len(body)))
        program[2], program[5] = start + len(body), len(content)
        body += content
    for note in notes:
        note[2] = next(new + note[2] - old for old, size, new in placed if old <= note[2] < old + size)
    header[5], header[6], header[11:14] = _EHDR.size, 0, [0, 0, 0]
    return _EHDR.pack(*header) + b"".join(_PHDR.pack(*p) for p in programs) + bytes(body)


def _has_pvh_entry(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, content_bytes, kind = unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_bytes]
        if kind == _XEN_ELFNOTE_PHYS32_ENTRY and name.rstrip(b"\0") == b"Xen":
            return True
        at += 12 + (name_bytes + 3 & ~3) + (content_bytes + 3 & ~3)
    return False
