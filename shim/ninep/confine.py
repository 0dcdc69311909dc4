"""Puts the file server where a guest that took it over would find nothing: no other file, process, network or
program, and of root's powers those over files alone.

It must not know what is served.
"""

import ctypes
import os
import struct

from shim import system

CLONE_NEWUTS, CLONE_NEWIPC = 0x04000000, 0x08000000
# The powers of capabilities(7) that serving files as root takes; no device can be made.
CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETFCAP = 0, 1, 2, 3, 4, 31
KEPT = (CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETFCAP)
LAST_CAPABILITY = 63
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_PIVOT_ROOT, _SYS_CAPSET = 155, 126
_PR_CAPBSET_DROP, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 24, 22, 2
_EINVAL = 22

# System calls that no file server makes (numbers of x86_64, asm/unistd_64.h), and whose making ends it.
FORBIDDEN = (
    *(41, 42, 49, 50),  # socket, connect, bind, listen
    *(57, 58, 59, 322),  # fork, vfork, execve, execveat
    *(62, 200, 101, 310, 311, 312, 438),  # kill, tkill, ptrace, process_vm_*, kcmp, pidfd_getfd
    *(155, 161, 165, 166, 272, 308),  # pivot_root, chroot, mount, umount2, unshare, setns
    *(428, 429, 430, 431, 432, 433, 442),  # open_tree, move_mount, fsopen and its kin, mount_setattr
    *(303, 304),  # name_to_handle_at, open_by_handle_at: files beyond the tree
    *(298, 321, 323, 425, 426, 427),  # perf_event_open, bpf, userfaultfd, io_uring_*
    *(248, 249, 250),  # add_key, request_key, keyctl
    *(135, 159, 163, 164, 167, 168, 169, 172, 173, 227),  # personality, clocks, accounting, swap, ports
    *(175, 176, 246, 313, 320),  # modules, kexec
)
_CLONE, _CLONE3, _CLONE_THREAD = 56, 435, 0x00010000
_ARCH_X86_64, _X32_BIT = 0xC000003E, 0x40000000
_LOAD, _EQUAL, _ALL_BITS, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER, _ARCH, _FIRST_ARGUMENT = 0, 4, 16  # struct seccomp_data
_KILL, _ALLOW, _NO_SUCH_CALL = 0x80000000, 0x7FFF0000, 0x00050000 | 38

_libc = ctypes.CDLL(None, use_errno=True)


def enter(directory: str) -> int:
    """Makes it the root of all there is, /proc/self/fd the working directory. What is mounted in it later, by
    whoever shares its mounts, appears. Returns a descriptor of the directory. Raises OSError.

    /proc/self/fd is a mount of its own, above which there is nothing: from the working directory, ../.. would
    be /proc otherwise, and what root may write there (sys/kernel/core_pattern) is the host's.
    """
    system.unshare(system.CLONE_NEWNS | system.CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    system.mount("none", "/", None, system.MS_REC | system.MS_SLAVE)
    system.mount("/proc/self/fd", "/proc", None, system.MS_BIND)
    numbers = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.chdir(directory)
    system.check(_libc.syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")
    system.umount(".", system.MNT_DETACH)
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    os.fchdir(numbers)
    os.close(numbers)
    return root


def give_up_powers() -> None:
    """For good, of every thread from here on. Raises OSError."""
    for capability in range(LAST_CAPABILITY + 1):
        if capability in KEPT:
            continue
        if _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            if ctypes.get_errno() == _EINVAL:
                break  # beyond the last that this kernel knows
            system.check(-1, "drop a capability")
    low = sum(1 << capability for capability in KEPT)
    head = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    system.check(_libc.syscall(_SYS_CAPSET, head, struct.pack("=6I", low, low, 0, 0, 0, 0)), "capset")
    system.no_new_privileges()
    _forbid()


def program() -> bytes:
    """The filter: struct sock_filter after struct sock_filter. Threads may be started, processes not."""
    steps = [
        _step(_LOAD, _ARCH),
        _step(_EQUAL, _ARCH_X86_64, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
        _step(_ALL_BITS, _X32_BIT, 0, 1),
        _step(_RETURN, _KILL),
        _step(_EQUAL, _CLONE3, 0, 1),
        _step(_RETURN, _NO_SUCH_CALL),  # the C library asks clone then, whose flags can be seen
        _step(_EQUAL, _CLONE, 0, 4),
        _step(_LOAD, _FIRST_ARGUMENT),
        _step(_ALL_BITS, _CLONE_THREAD, 1, 0),
        _step(_RETURN, _KILL),
        _step(_RETURN, _ALLOW),
    ]
    for number in FORBIDDEN:
        steps += [_step(_EQUAL, number, 0, 1), _step(_RETURN, _KILL)]
    return b"".join([*steps, _step(_RETURN, _ALLOW)])


def _step(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, operand)


def _forbid() -> None:
    code = program()
    held = ctypes.create_string_buffer(code, len(code))
    filter_ = struct.pack("@HP", len(code) // 8, ctypes.addressof(held))
    system.check(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, filter_, 0, 0), "seccomp")
