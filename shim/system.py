"""The kernel calls that Python 3.11 does not have: namespaces, mounts; and who a process is (procfs.py).

It does without Python's signal, whose enums would cost each file server (ninep/) 0.7 MiB. Knows nothing of
pods. Every function raises OSError with the path or the name in it.
"""

import ctypes
import errno
import os
import struct
import time

from shim import procfs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

host_pid = procfs.host_pid
host_pid_of = procfs.host_pid_of
open_process = procfs.open_process
start_time = procfs.start_time

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_FS = 0x00000200
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_SYNCHRONOUS = 0x10
MS_REMOUNT = 0x20
MS_DIRSYNC = 0x80
MS_NOATIME = 0x400
MS_NODIRATIME = 0x800
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MS_RELATIME = 0x200000
MS_STRICTATIME = 0x1000000

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_IDMAP = 0x100000

RENAME_EXCHANGE = 0x2

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

SIGKILL = 9  # signal(7)

TFD_TIMER_ABSTIME, TFD_TIMER_CANCEL_ON_SET = 0x1, 0x2  # linux/timerfd.h

# malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
PR_THP_DISABLE_EXCEPT_ADVISED = 2


def check(result: int, what: str) -> int:
    """What a function of the C library's answered. Raises OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def unshare(flags: int) -> None:
    check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    check(_libc.setns(fd, kind), "setns")


def mount(source: str, target: str, fstype: str | None, flags: int = 0, data: str = "") -> None:
    check(
        _libc.mount(
            source.encode(),
            target.encode(),
            fstype.encode() if fstype else None,
            ctypes.c_ulong(flags),
            data.encode() if data else None,
        ),
        target,
    )


def bind_sealed(source: str, target: str, *, recursive: bool, read_only: bool) -> None:
    """Binds source to target without setuid, without devices, and cut off from what is mounted there later.

    `recursive`: also what is mounted below.
    """
    attach_sealed(clone_tree(source, recursive=recursive), target, recursive=recursive, read_only=read_only)


def clone_tree(source: str, *, recursive: bool) -> int:
    """A descriptor of a mount of what is at source, attached nowhere: open_tree(2), Linux 5.2."""
    clone = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    tree = int(_libc.syscall(428, AT_FDCWD, source.encode(), ctypes.c_uint(clone)))
    check(tree, source)
    return tree


def attach_sealed(tree: int, target: str, *, recursive: bool, read_only: bool) -> None:
    """Attaches what clone_tree() gave as bind_sealed() has it, and closes it.

    The attributes are set before the mount is attached: one that is attached first and changed then has been
    copied to the target's peers already, unchanged. mount_setattr(2), move_mount(2): Linux 5.12. Numbers are
    those of every architecture.
    """
    try:
        wanted = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if read_only else 0)
        _set_attributes(tree, (wanted, 0, MS_PRIVATE, 0), target, recursive=recursive)
        empty = ctypes.c_uint(MOVE_MOUNT_F_EMPTY_PATH)
        check(_libc.syscall(429, tree, b"", AT_FDCWD, target.encode(), empty), target)
    finally:
        os.close(tree)


def map_ids(tree: int, users: int, *, recursive: bool) -> None:
    """IDs on what clone_tree() gave are mapped from here on as they are in a user namespace's descriptor."""
    _set_attributes(tree, (MOUNT_ATTR_IDMAP, 0, 0, users), "mount_setattr", recursive=recursive)


def _set_attributes(tree: int, attributes: tuple[int, int, int, int], what: str, *, recursive: bool) -> None:
    """attributes: of struct mount_attr, those to set, to clear, propagation, a user namespace."""
    packed = struct.pack("=QQQQ", *attributes)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    size = ctypes.c_size_t(len(packed))
    check(_libc.syscall(442, tree, b"", ctypes.c_uint(flags), packed, size), what)


def umount_if_mounted(target: str) -> bool:
    """False if nothing is mounted there (any more)."""
    try:
        umount(target, MNT_DETACH | UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
            return False
        raise
    return True


def umount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    check(_libc.umount2(target.encode(), flags), target)


def exchange(one: str, other: str) -> None:
    """Each of two files or directories has the other's name afterwards, in one step (renameat2(2))."""
    flags = ctypes.c_uint(RENAME_EXCHANGE)
    check(_libc.renameat2(AT_FDCWD, one.encode(), AT_FDCWD, other.encode(), flags), one)


def clock_watch() -> int:
    """A descriptor for watch_clock() (timerfd_create(2))."""
    return check(_libc.timerfd_create(time.CLOCK_REALTIME, os.O_CLOEXEC | os.O_NONBLOCK), "timerfd_create")


def watch_clock(fd: int, for_s: float) -> None:
    """What clock_watch() gave is readable once CLOCK_REALTIME is set or the time is up, until this is called
    again."""
    until = int(time.time() + for_s)
    setting = struct.pack("=qqqq", 0, 0, until, 0)
    flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET
    check(_libc.timerfd_settime(fd, flags, setting, None), "timerfd_settime")


def set_process_name(name: str) -> None:
    """Shows as `comm` in ps; the kernel keeps 15 bytes."""
    check(_libc.prctl(PR_SET_NAME, name.encode()[:15], 0, 0, 0), name)


def set_command_line(argv: "Sequence[bytes]") -> None:
    """What ps and pgrep show of this process. Of an environment that was replaced nothing is left to see.

    Written over the command line and the environment that it was executed with (proc(5), /proc/PID/stat:
    arg_start to env_end), so nothing may point into the old environment any more; cut off where that ends.
    """
    with open("/proc/self/stat", "rb") as file:
        stat = file.read()
    start, middle, _, end = map(int, stat[stat.rindex(b")") + 2 :].split()[45:49])
    shown = b"".join(word + b"\0" for word in argv)
    if len(shown) > middle - start:
        # The kernel takes what has no end where the command line ended for one string (fs/proc/base.c).
        shown = b" ".join(argv)[: end - start - 1]
    ctypes.memmove(start, shown.ljust(end - start, b"\0"), end - start)


def keep_little_memory() -> None:
    """malloc returns to the kernel what is free, also in a process of many threads (mallopt(3)); the kernel
    makes no huge pages of what is in use, here and in all that is executed from here on, unless it asks.

    By itself malloc gives each thread a heap, and, once something large was freed, keeps as much for ever
    after. The kernel (khugepaged) fills what is free between small pages up to huge ones, where `always` is
    in /sys/kernel/mm/transparent_hugepage/enabled: QEMU's heap of 7 MiB is one of 18 after some seconds.
    Before Linux 6.18 programs cannot ask either (PR_SET_THP_DISABLE(2const)).
    """
    for parameter, value in ((M_MMAP_THRESHOLD, 128 << 10), (M_TRIM_THRESHOLD, 128 << 10), (M_ARENA_MAX, 1)):
        _libc.mallopt(parameter, value)
    if _libc.prctl(PR_SET_THP_DISABLE, 1, PR_THP_DISABLE_EXCEPT_ADVISED, 0, 0) < 0:
        check(_libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0), "PR_SET_THP_DISABLE")


def return_memory() -> None:
    """What malloc holds and nobody uses goes back to the kernel (malloc_trim(3)): a millisecond or two."""
    _libc.malloc_trim(ctypes.c_size_t(0))


def end_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that forked it ends. Raises ProcessLookupError if it has."""
    check(_libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    if os.getppid() != parent:
        raise ProcessLookupError(f"process {parent} has ended")


def adopt_orphans() -> None:
    """Descendants whose parents end become this process's children, whatever session they are in."""
    check(_libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "PR_SET_CHILD_SUBREAPER")


def no_new_privileges() -> None:
    """No program executed from here on gains anything from setuid bits or file capabilities."""
    check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def kill_process(pidfd: int, number: int = SIGKILL) -> None:
    """A process that is gone already is what was wanted."""
    import signal

    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def kill_processes_of(uid: int) -> None:
    """SIGKILL to every process of our PID namespace that this user runs, but us."""
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            if os.stat(f"/proc/{name}").st_uid == uid:
                os.kill(int(name), SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


def unlink_if_there(path: str | os.PathLike[str]) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


def is_no_space(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
