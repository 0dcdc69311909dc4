"""The program of an anchor (shim/anchor.py): machine code, as it is too small for any other language.

A process of an interpreter, also one that was forked, keeps megabytes for as long as it waits, and whatever
its parent's memory held; this one has a page of code and one of stack. It reads what it is to be, makes the
system calls of STEPS one after another, says how they went, closes what it holds, and waits for ever.

The instructions: Intel's manual, volume 2. The numbers of system calls: asm/unistd_64.h. The file: elf(5).
It must not know what it stands for.
"""

import struct

SOCKET_FD = 3
UID = struct.Struct("<Q")
"""What it reads first, before the path of its root, which ends with a zero."""
ANSWER = struct.Struct("<qq")
"""(which of STEPS failed, counted from one, and its errno, negative); (0, 0) if none did."""
MOST_BYTES = 8192
NAME = b"casemate-anchor\0"

_ADDRESS = 0x400000  # beyond vm.mmap_min_addr
_HEADER = struct.Struct("<4sBBBB8xHHIQQQIHHHHHH")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_LOAD, _STACK = 1, 0x6474E551  # PT_LOAD, PT_GNU_STACK: without it, the stack could be executed
_READ_WRITE, _READ_EXECUTE = 6, 5

_PR_SET_NAME = 15
_ALL = 0xFFFFFFFF
_READ_CALL, _WRITE, _PAUSE, _EXIT, _CLOSE = 0, 1, 34, 60, 3
_CHDIR, _SETGROUPS, _SETRESUID, _SETRESGID, _PRCTL, _CHROOT, _CLOSE_RANGE = 80, 116, 117, 119, 157, 161, 436


class Said(int):
    """An argument that is a number of what was read: where in it."""


class At(int):
    """An argument that is the address of a part of what was read: where in it."""


Argument = int | bytes
"""bytes: the address of these."""

STEPS: tuple[tuple[str, int, tuple[Argument, ...]], ...] = (
    ("read", _READ_CALL, (SOCKET_FD, At(0), MOST_BYTES)),
    ("chroot", _CHROOT, (At(UID.size),)),
    ("chdir", _CHDIR, (b"/\0",)),
    ("setgroups", _SETGROUPS, (0, 0)),
    ("setresgid", _SETRESGID, (Said(0), Said(0), Said(0))),
    ("setresuid", _SETRESUID, (Said(0), Said(0), Said(0))),
    ("prctl", _PRCTL, (_PR_SET_NAME, NAME)),
    ("close_range", _CLOSE_RANGE, (0, SOCKET_FD - 1, 0)),
    ("close_range", _CLOSE_RANGE, (SOCKET_FD + 1, _ALL, 0)),
)

# What puts a number, what was read, and its address into the registers of a system call's arguments.
_NUMBER = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba")  # mov rdi, imm64; rsi; rdx
_VALUE = (b"\x48\x8b\xbc\x24", b"\x48\x8b\xb4\x24", b"\x48\x8b\x94\x24")  # mov rdi, [rsp+disp32]; ...
_PLACE = (b"\x48\x8d\xbc\x24", b"\x48\x8d\xb4\x24", b"\x48\x8d\x94\x24")  # lea rdi, [rsp+disp32]; ...
_SYSCALL = b"\x0f\x05"


def program() -> bytes:
    """The file to execute."""
    data: dict[bytes, int] = {}
    at = _ADDRESS + _HEADER.size + 2 * _SEGMENT.size
    for _, _, arguments in STEPS:
        for argument in arguments:
            if isinstance(argument, bytes) and argument not in data:
                data[argument] = at
                at += len(argument)
    code = _code(data)
    size = at - _ADDRESS + len(code)
    header = _HEADER.pack(
        *(b"\x7fELF", 2, 1, 1, 0),  # 64 bits, little-endian, version 1
        *(2, 62, 1),  # ET_EXEC, EM_X86_64, version 1
        *(at, _HEADER.size, 0, 0),  # where it begins; segments; no sections; no flags
        *(_HEADER.size, _SEGMENT.size, 2, 0, 0, 0),
    )
    loaded = _SEGMENT.pack(_LOAD, _READ_EXECUTE, 0, _ADDRESS, _ADDRESS, size, size, 4096)
    stack = _SEGMENT.pack(_STACK, _READ_WRITE, 0, 0, 0, 0, 0, 16)
    return header + loaded + stack + b"".join(data) + code


def _code(data: dict[bytes, int]) -> bytes:
    tell = b"\x50\x53" + _number(0, SOCKET_FD) + b"\x48\x89\xe6" + _number(2, ANSWER.size) + _call(_WRITE)
    failed = tell + _number(0, 1) + _call(_EXIT)  # push rax; push rbx; ... mov rsi, rsp
    wait = _call(_PAUSE)
    wait += b"\xeb" + struct.pack("<b", -len(wait) - 2)  # jmp: a signal that is not the end of it is nothing
    # xor ebx, ebx; xor eax, eax
    done = b"\x31\xdb\x31\xc0" + tell + _number(0, SOCKET_FD) + _call(_CLOSE) + wait
    code = done + failed
    for index, (_, number, arguments) in reversed(list(enumerate(STEPS, 1))):
        step = b"\xbb" + struct.pack("<I", index)  # mov ebx, imm32
        step += b"".join(_argument(which, value, data) for which, value in enumerate(arguments))
        step += _call(number) + b"\x48\x85\xc0"  # test rax, rax
        # js: a negative number is an errno
        code = step + b"\x0f\x88" + struct.pack("<i", len(code) - len(failed)) + code
    return b"\x48\x81\xec" + struct.pack("<I", MOST_BYTES) + code  # sub rsp, imm32


def _argument(which: int, value: Argument, data: dict[bytes, int]) -> bytes:
    if isinstance(value, bytes):
        return _number(which, data[value])
    if isinstance(value, Said | At):
        return (_VALUE if isinstance(value, Said) else _PLACE)[which] + struct.pack("<i", value)
    return _number(which, value)


def _number(which: int, value: int) -> bytes:
    return _NUMBER[which] + struct.pack("<Q", value)


def _call(number: int) -> bytes:
    return b"\xb8" + struct.pack("<I", number) + _SYSCALL  # mov eax, imm32
