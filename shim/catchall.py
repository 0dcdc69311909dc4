"""All ports of a network namespace at one listening socket, by a small program in the kernel (sk_lookup).

Asked who listens at a port that somebody connects to, it answers: this socket. Linux 5.9; see the kernel's
Documentation/bpf/prog_sk_lookup.rst, and include/uapi/linux/bpf.h for the numbers. It knows nothing of pods.
"""

import ctypes
import os
from struct import pack

_BPF = {"x86_64": 321, "aarch64": 280}  # bpf(2)
_MAP_CREATE, _MAP_UPDATE, _PROG_LOAD, _LINK_CREATE = 0, 2, 5, 28
_MAP_SOCKMAP, _PROG_SK_LOOKUP, _AT_SK_LOOKUP = 15, 30, 36
_LOOKUP_ELEMENT, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124  # helper functions
_PASS = 1
_ATTRIBUTES_BYTES = 128
_LICENSE = b"GPL"

_libc = ctypes.CDLL(None, use_errno=True)


def catch_all(listener: int, namespace: int) -> int:
    """What connects to any port within the namespace comes to the socket `listener`; both are descriptors.

    Returns another one: once it is closed, it is so no more. Raises OSError where the kernel cannot.
    """
    table = _bpf("make a table", _MAP_CREATE, pack("5I", _MAP_SOCKMAP, 4, 8, 1, 0))
    program = -1
    try:
        key, value = _memory(pack("I", 0)), _memory(pack("Q", listener))
        _bpf("keep a socket", _MAP_UPDATE, pack("I4xQQQ", table, _at(key), _at(value), 0))
        instructions = _program(table)
        code, terms = _memory(instructions), _memory(_LICENSE)
        attributes = pack("IIQQ", _PROG_SK_LOOKUP, len(instructions) // 8, _at(code), _at(terms))
        # No log (level, size, place), no version of the kernel, no flags; its name; no interface; its place.
        attributes += pack("IIQII16sII", 0, 0, 0, 0, 0, b"casemate", 0, _AT_SK_LOOKUP)
        program = _bpf("load a program", _PROG_LOAD, attributes)
        return _bpf("attach a program", _LINK_CREATE, pack("IIII", program, namespace, _AT_SK_LOOKUP, 0))
    finally:
        for fd in (table, program):
            if fd >= 0:
                os.close(fd)  # the link holds what it needs


def _program(table: int) -> bytes:
    """r6 is the question, r7 the socket; without one, or if it does not fit (UDP), the kernel goes on."""
    return b"".join(
        (
            _instruction(0xBF, 6, 1),
            _instruction(0x62, 10, 0, -4, 0),  # the key on the stack: 0
            _instruction(0x18, 1, 1, 0, table) + _instruction(0),  # r1 = the table, by its descriptor
            _instruction(0xBF, 2, 10) + _instruction(0x07, 2, 0, 0, -4),
            _instruction(0x85, 0, 0, 0, _LOOKUP_ELEMENT),
            _instruction(0x15, 0, 0, 7, 0),  # none: to the end
            _instruction(0xBF, 7, 0),
            _instruction(0xBF, 1, 6) + _instruction(0xBF, 2, 7) + _instruction(0xB7, 3, 0, 0, 0),
            _instruction(0x85, 0, 0, 0, _SK_ASSIGN),
            _instruction(0xBF, 1, 7),
            _instruction(0x85, 0, 0, 0, _SK_RELEASE),
            _instruction(0xB7, 0, 0, 0, _PASS) + _instruction(0x95),
        )
    )


def _instruction(code: int, to: int = 0, of: int = 0, offset: int = 0, number: int = 0) -> bytes:
    """struct bpf_insn."""
    return pack("<BBhi", code, of << 4 | to, offset, number)


def _memory(content: bytes) -> "ctypes.Array[ctypes.c_char]":
    return ctypes.create_string_buffer(content, len(content) + 1)


def _at(memory: "ctypes.Array[ctypes.c_char]") -> int:
    return ctypes.addressof(memory)


def _bpf(what: str, command: int, attributes: bytes) -> int:
    memory = ctypes.create_string_buffer(attributes, _ATTRIBUTES_BYTES)
    result = int(_libc.syscall(_BPF[os.uname().machine], command, memory, _ATTRIBUTES_BYTES))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"bpf: {what}")
    return result
