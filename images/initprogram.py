"""Writes a guest's first program: a static ELF file of about 100 bytes that performs a list of system calls.

A shell would do the same in a tenth of a second of an emulated guest; this takes well under a
millisecond besides the calls themselves, and needs no compiler where images are built. It must
not know which calls an image needs (images/handover.py does).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import pack

BASE = 0x400000
_RECORD_BYTES = 64
_NO_CALL = -1


class Call(IntEnum):
    """System call numbers of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl)."""

    WRITE = 1
    OPEN = 2
    CLOSE = 3
    EXECVE = 59
    CHDIR = 80
    MKDIR = 83
    UNLINK = 87
    CHROOT = 161
    MOUNT = 165
    READAHEAD = 187
    CLOCK_GETTIME = 228
    FINIT_MODULE = 313
    MEMFD_CREATE = 319


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Zeroed memory that the kernel writes to. Steps given the same object share it."""

    size: int


@dataclass(frozen=True, slots=True)
class Strings:
    """A NULL-terminated array of strings, as execve takes it."""

    values: tuple[str, ...]


Argument = int | str | Buffer | Strings


@dataclass(frozen=True, slots=True)
class Step:
    """One system call with at most five arguments.

    If it fails and complaint is not empty, the program writes the complaint to its standard error
    and exits with the errno: as PID 1 that is a kernel panic whose exitcode=0x0000NN00 shows it.
    """

    call: Call
    arguments: tuple[Argument, ...]
    complaint: str = ""


# The interpreter. rbx walks over the records: number, five arguments, address and length of the complaint.
# A word is machine code; "name:" is a label; "js name" and its like are jumps to one (8-bit displacement).
_JUMPS = {"js": 0x78, "jns": 0x79, "jz": 0x74, "jmp": 0xEB}
_TABLE_OPERAND = 2  # offset of the address in the first instruction
_CODE = (
    ("48bb0000000000000000", "mov rbx, TABLE"),
    ("next:", ""),
    ("488b03", "mov rax, [rbx]"),
    ("4885c0", "test rax, rax"),
    ("js exit", "the list is over and nothing took over"),
    ("488b7b08", "mov rdi, [rbx+8]"),
    ("488b7310", "mov rsi, [rbx+16]"),
    ("488b5318", "mov rdx, [rbx+24]"),
    ("4c8b5320", "mov r10, [rbx+32]"),
    ("4c8b4328", "mov r8, [rbx+40]"),
    ("0f05", "syscall"),
    ("4885c0", "test rax, rax"),
    ("jns advance", ""),
    ("488b7330", "mov rsi, [rbx+48]"),
    ("4885f6", "test rsi, rsi"),
    ("jz advance", "a step that may fail"),
    ("4989c4", "mov r12, rax"),
    ("b801000000", "mov eax, 1: write"),
    ("bf02000000", "mov edi, 2"),
    ("488b5338", "mov rdx, [rbx+56]"),
    ("0f05", "syscall"),
    ("4c89e0", "mov rax, r12"),
    ("jmp exit", ""),
    ("advance:", ""),
    ("4883c340", "add rbx, 64"),
    ("jmp next", ""),
    ("exit:", ""),
    ("48f7d8", "neg rax: the errno"),
    ("4889c7", "mov rdi, rax"),
    ("b8e7000000", "mov eax, 231: exit_group"),
    ("0f05", "syscall"),
)


def build(steps: Sequence[Step]) -> bytes:
    """The ELF file that performs the steps in order. The last one should be an execve."""
    code = _assemble()
    table_at = _HEADERS_BYTES + len(code)
    data = _Data(BASE + table_at + _RECORD_BYTES * (len(steps) + 1))
    records = b"".join(_record(step, data) for step in steps) + pack("<q56x", _NO_CALL)
    code[_TABLE_OPERAND : _TABLE_OPERAND + 8] = pack("<Q", BASE + table_at)
    content = bytes(code) + records + data.content
    return _headers(len(content)) + content


def _assemble() -> bytearray:
    code = bytearray()
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for word, _ in _CODE:
        if word.endswith(":"):
            labels[word[:-1]] = len(code)
        elif " " in word:
            kind, label = word.split()
            code += bytes((_JUMPS[kind], 0))
            jumps.append((len(code), label))
        else:
            code += bytes.fromhex(word)
    for after, label in jumps:
        code[after - 1 : after] = pack("<b", labels[label] - after)
    return code


class _Data:
    """What the records point to, laid out behind them."""

    def __init__(self, address: int) -> None:
        self.content = bytearray()
        self._address = address
        self._known: dict[bytes, int] = {}
        self._buffers: dict[Buffer, int] = {}

    def add(self, content: bytes) -> int:
        self.content += bytes(-len(self.content) % 8)
        address = self._address + len(self.content)
        self.content += content
        return address

    def string(self, value: str) -> int:
        content = value.encode() + b"\0"
        if content not in self._known:
            self._known[content] = self.add(content)
        return self._known[content]

    def argument(self, value: Argument) -> int:
        if isinstance(value, int):
            return value
        if isinstance(value, str):
            return self.string(value)
        if isinstance(value, Buffer):
            if value not in self._buffers:
                self._buffers[value] = self.add(bytes(value.size))
            return self._buffers[value]
        return self.add(pack(f"<{len(value.values)}Qq", *map(self.string, value.values), 0))


def _record(step: Step, data: _Data) -> bytes:
    if len(step.arguments) > 5:
        raise ValueError(f"{step.call.name} has {len(step.arguments)} arguments, at most 5 can be given")
    arguments = [data.argument(value) for value in step.arguments]
    arguments += [0] * (5 - len(arguments))
    complaint = step.complaint + "\n" if step.complaint else ""
    address = data.string(complaint) if complaint else 0
    return pack("<q5q2q", step.call, *arguments, address, len(complaint.encode()))


_HEADERS_BYTES = 64 + 56
_LOAD_RWX = (1, 7)  # one segment for code, records and buffers: it lives for some milliseconds


def _headers(content_bytes: int) -> bytes:
    size = _HEADERS_BYTES + content_bytes
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = pack("<HHIQQQIHHHHHH", 2, 62, 1, BASE + _HEADERS_BYTES, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return identity + elf + pack("<IIQQQQQQ", *_LOAD_RWX, 0, BASE, BASE, size, size, 4096)
