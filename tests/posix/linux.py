"""What Linux' own file systems do beyond POSIX, and what programs have come to use: each thing tried in a
directory of its own.

Runs in a container, and prints a line for each: python3 linux.py DIRECTORY. pjdfstest and fsx have the rest.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LIBC = ctypes.CDLL(None, use_errno=True)
BLOCK = 4096
MIB = 1 << 20
APPENDS = 50
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400
F_OFD_SETLK, F_SETLEASE = 37, 1024
IN_CREATE, IN_MODIFY = 0x100, 0x2
FS_IOC_GETFLAGS = 0x80086601
STATX_BTIME = 0x800


def called(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


@contextmanager
def opened(path: str, flags: int = os.O_RDWR | os.O_CREAT, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def refused(number: int, function: Callable[..., object], *arguments: object) -> None:
    found: OSError | None = None
    try:
        function(*arguments)
    except OSError as error:
        found = error
    wanted = errno.errorcode[number]
    assert found is not None, f"no error, expected {wanted}"
    assert found.errno == number, f"{found}, expected {wanted}"


def in_child(function: Callable[[], object]) -> None:
    """Another process does it. Its errors are ours."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            function()
        except (AssertionError, OSError) as error:
            os.write(writing, repr(error).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    said = os.read(reading, 4096).decode()
    os.close(reading)
    assert not said, said


def direct_io_is_the_file() -> None:
    """O_DIRECT, mixed with the page cache."""
    with mmap.mmap(-1, 4 * BLOCK) as buffer:
        buffer[:] = b"d" * len(buffer)
        with opened("file", os.O_RDWR | os.O_CREAT | os.O_DIRECT) as direct, opened("file") as cached:
            assert os.pwrite(direct, buffer, BLOCK) == len(buffer)
            assert os.pread(cached, BLOCK, 2 * BLOCK) == b"d" * BLOCK
            os.pwrite(cached, b"c" * BLOCK, BLOCK)
            assert os.preadv(direct, [buffer], BLOCK) == len(buffer)
            assert buffer[: 2 * BLOCK] == b"c" * BLOCK + b"d" * BLOCK
            os.ftruncate(direct, BLOCK + 100)
            assert os.preadv(direct, [buffer], BLOCK) == 100


def holes_are_found() -> None:
    with opened("file") as fd:
        os.pwrite(fd, b"x" * BLOCK, 2 * MIB)
        os.ftruncate(fd, 4 * MIB)
        os.fsync(fd)
        assert os.fstat(fd).st_blocks * 512 < MIB, os.fstat(fd).st_blocks
        assert os.lseek(fd, 0, os.SEEK_DATA) == 2 * MIB
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        assert 2 * MIB < os.lseek(fd, 2 * MIB, os.SEEK_HOLE) <= 2 * MIB + 16 * BLOCK


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    offset64, length64 = ctypes.c_long(offset), ctypes.c_long(length)
    called(LIBC.fallocate(fd, mode, offset64, length64), f"fallocate({mode})")


def space_is_allocated() -> None:
    with opened("file") as fd:
        fallocate(fd, 0, 0, MIB)
        assert os.fstat(fd).st_size == MIB
        assert os.fstat(fd).st_blocks * 512 >= MIB, os.fstat(fd).st_blocks
        fallocate(fd, FALLOC_FL_KEEP_SIZE, MIB, MIB)
        assert os.fstat(fd).st_size == MIB


def holes_are_punched() -> None:
    with opened("file") as fd:
        os.pwrite(fd, b"x" * MIB, 0)
        os.fsync(fd)
        before = os.fstat(fd).st_blocks
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 64 * BLOCK, 64 * BLOCK)
        assert os.pread(fd, BLOCK, 64 * BLOCK) == bytes(BLOCK)
        assert os.fstat(fd).st_blocks < before


def ranges_are_zeroed() -> None:
    with opened("file") as fd:
        os.pwrite(fd, b"x" * 4 * BLOCK, 0)
        fallocate(fd, FALLOC_FL_ZERO_RANGE, BLOCK, BLOCK)
        assert os.pread(fd, 4 * BLOCK, 0) == b"x" * BLOCK + bytes(BLOCK) + b"x" * 2 * BLOCK


def everything_is_synced() -> None:
    with opened("file") as fd, opened(".", os.O_RDONLY | os.O_DIRECTORY) as directory:
        os.write(fd, b"x")
        os.fsync(fd)
        os.fdatasync(fd)
        os.fsync(directory)
        called(LIBC.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(1), 7), "sync_file_range")
        called(LIBC.syncfs(fd), "syncfs")
    with opened("file", os.O_WRONLY | os.O_SYNC) as fd:
        os.write(fd, b"y")
    with opened("file", os.O_WRONLY | os.O_DSYNC) as fd:
        os.write(fd, b"z")


def two_processes_share_a_mapping() -> None:
    """Also with who writes: MAP_SHARED is the page cache."""
    with opened("file") as fd:
        os.ftruncate(fd, BLOCK)
        with mmap.mmap(fd, BLOCK) as mine:

            def change() -> None:
                with opened("file") as again, mmap.mmap(again, BLOCK) as theirs:
                    theirs[0:5] = b"child"
                    os.pwrite(again, b"file", 100)

            in_child(change)
            assert (mine[0:5], mine[100:104]) == (b"child", b"file")
            mine[200:204] = b"mine"
            assert os.pread(fd, 4, 200) == b"mine"


def what_is_mapped_beyond_the_end_is_a_signal() -> None:
    with opened("file") as fd:
        os.ftruncate(fd, 2 * BLOCK)
        mapped = mmap.mmap(fd, 2 * BLOCK)
        os.ftruncate(fd, BLOCK)
        if (pid := os.fork()) == 0:
            mapped[BLOCK]
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -7  # SIGBUS


def _other_locks(kind: int, start: int, length: int) -> None:
    with opened("file") as fd:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB, length, start)


def records_are_locked() -> None:
    """fcntl(2), F_SETLK: ranges, shared and exclusive, gone with any close."""
    with opened("file") as fd:
        os.write(fd, bytes(100))
        fcntl.lockf(fd, fcntl.LOCK_EX, 10, 0)
        fcntl.lockf(fd, fcntl.LOCK_SH, 10, 20)
        in_child(lambda: _other_locks(fcntl.LOCK_EX, 10, 10))
        in_child(lambda: _other_locks(fcntl.LOCK_SH, 20, 10))
        in_child(lambda: refused(errno.EAGAIN, _other_locks, fcntl.LOCK_SH, 5, 1))
        in_child(lambda: refused(errno.EAGAIN, _other_locks, fcntl.LOCK_EX, 25, 1))
        with opened("file"):
            pass
        in_child(lambda: _other_locks(fcntl.LOCK_EX, 0, 100))


def a_lock_is_waited_for() -> None:
    with opened("file") as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            with opened("file") as again:
                os.write(writing, b"1")
                fcntl.lockf(again, fcntl.LOCK_EX)
                os.write(writing, b"2")
            os._exit(0)
        assert os.read(reading, 1) == b"1"
        assert not select.select([reading], [], [], 0.2)[0], "the lock was not waited for"
        fcntl.lockf(fd, fcntl.LOCK_UN)
        assert select.select([reading], [], [], 20)[0], "the lock did not come"
        os.waitpid(pid, 0)


def open_files_are_locked() -> None:
    """F_OFD_SETLK: of the open file, not of the process."""
    whole = struct.pack("hhqqixxxx", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with opened("file") as first, opened("file") as second:
        fcntl.fcntl(first, F_OFD_SETLK, whole)
        refused(errno.EAGAIN, fcntl.fcntl, second, F_OFD_SETLK, whole)


def both_kinds_of_locks_are_apart() -> None:
    """flock(2) and fcntl(2) know nothing of each other on Linux."""
    with opened("file") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)
        in_child(lambda: _other_locks(fcntl.LOCK_EX, 0, 0))


def leases_are_given() -> None:
    with opened("file") as fd:
        pass
    with opened("file", os.O_RDONLY) as fd:
        fcntl.fcntl(fd, F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(fd, F_SETLEASE, fcntl.F_UNLCK)


def attributes_of_every_size() -> None:
    with opened("file"):
        pass
    os.setxattr("file", "user.empty", b"")
    os.setxattr("file", "user.large", b"v" * 2000)
    refused(errno.EEXIST, os.setxattr, "file", "user.empty", b"", os.XATTR_CREATE)
    refused(errno.ENODATA, os.setxattr, "file", "user.other", b"", os.XATTR_REPLACE)
    assert (os.getxattr("file", "user.empty"), len(os.getxattr("file", "user.large"))) == (b"", 2000)
    assert {"user.empty", "user.large"} <= set(os.listxattr("file"))
    os.mkdir("directory")
    os.setxattr("directory", "user.name", b"d")
    assert os.getxattr("directory", "user.name") == b"d"
    os.symlink("file", "link")
    refused(errno.EPERM, lambda: os.setxattr("link", "user.name", b"", follow_symlinks=False))


CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""vfs_cap_data, version 2: CAP_NET_BIND_SERVICE, permitted and effective."""


def programs_have_capabilities() -> None:
    """security.capability is kept, and gone when the file is written to."""
    with opened("file", mode=0o755) as fd:
        os.write(fd, b"program")
        os.setxattr("file", "security.capability", CAPABILITY)
        assert os.getxattr("file", "security.capability") == CAPABILITY
        os.write(fd, b"changed")
    refused(errno.ENODATA, os.getxattr, "file", "security.capability")


def set_id_bits_go_when_others_write() -> None:
    with opened("file") as fd:
        os.fchmod(fd, 0o6777)

    def write() -> None:
        os.setgroups([])
        os.setresgid(99, 99, 99)
        os.setresuid(99, 99, 99)
        with opened("file", os.O_WRONLY) as fd:
            os.write(fd, b"x")

    in_child(write)
    assert os.stat("file").st_mode & 0o7777 == 0o777, oct(os.stat("file").st_mode)


def access_lists_decide() -> None:
    """POSIX.1e: a user that mode bits would not let in."""
    with opened("file", mode=0o600):
        pass
    os.chmod(".", 0o755)
    entries = ((0x01, 6, -1), (0x02, 4, 99), (0x04, 0, -1), (0x10, 4, -1), (0x20, 0, -1))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr("file", "system.posix_acl_access", value)

    def read() -> None:
        os.setgroups([])
        os.setresgid(99, 99, 99)
        os.setresuid(99, 99, 99)
        with opened("file", os.O_RDONLY):
            pass
        refused(errno.EACCES, os.open, "file", os.O_WRONLY)

    in_child(read)


def files_without_a_name_get_one() -> None:
    with opened(".", os.O_RDWR | os.O_TMPFILE) as fd:
        os.write(fd, b"unnamed")
        assert os.listdir(".") == []
        source = f"/proc/self/fd/{fd}".encode()
        called(LIBC.linkat(AT_FDCWD, source, AT_FDCWD, b"named", AT_SYMLINK_FOLLOW), "linkat")
        assert os.stat("named").st_size == 7


def renameat2(old: str, new: str, flags: int) -> None:
    result = LIBC.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)
    called(result, f"renameat2({flags})")


def renames_exchange_and_do_not_replace() -> None:
    for name in ("a", "b"):
        with opened(name) as fd:
            os.write(fd, name.encode())
    refused(errno.EEXIST, renameat2, "a", "b", RENAME_NOREPLACE)
    renameat2("a", "c", RENAME_NOREPLACE)
    renameat2("b", "c", RENAME_EXCHANGE)
    with open("b") as b, open("c") as c:
        assert (b.read(), c.read()) == ("a", "b")


def many_links_and_one_inode() -> None:
    with opened("file"):
        pass
    for number in range(100):
        os.link("file", f"link{number}")
    inodes = {os.stat(name).st_ino for name in os.listdir(".")}
    assert len(inodes) == 1
    assert os.stat("file").st_nlink == 101
    with os.scandir(".") as entries:
        assert {entry.inode() for entry in entries} == inodes


def an_inode_keeps_its_number() -> None:
    with opened("file") as fd:
        number = os.fstat(fd).st_ino
        os.rename("file", "renamed")
        os.chmod("renamed", 0o600)
        assert os.stat("renamed").st_ino == number
        os.unlink("renamed")
        assert os.fstat(fd).st_ino == number


def changes_are_told() -> None:
    """inotify(7), of what this system itself changes."""
    fd = called(LIBC.inotify_init1(os.O_NONBLOCK), "inotify_init1")
    called(LIBC.inotify_add_watch(fd, b".", IN_CREATE | IN_MODIFY), "inotify_add_watch")
    with opened("file") as file:
        os.write(file, b"x")
    events, masks = os.read(fd, 4096), []
    while events:
        _, mask, _, length = struct.unpack_from("iIII", events)
        masks.append(mask)
        events = events[16 + length :]
    os.close(fd)
    assert masks == [IN_CREATE, IN_MODIFY], masks


def handles_stand_for_files() -> None:
    """name_to_handle_at(2), of which file servers and fanotify live."""
    with opened("file"):
        pass
    handle, mount = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136), ctypes.c_int()
    called(LIBC.name_to_handle_at(AT_FDCWD, b"file", handle, ctypes.byref(mount), 0), "name_to_handle_at")


def times_of_birth_are_told() -> None:
    with opened("file"):
        pass
    answer = ctypes.create_string_buffer(256)
    called(LIBC.statx(AT_FDCWD, b"file", 0, STATX_BTIME, answer), "statx")
    assert struct.unpack_from("I", answer)[0] & STATX_BTIME, "no time of birth"


def times_have_fractions_of_seconds() -> None:
    stamps = set()
    for number in range(20):
        with opened(f"{number}"):
            pass
        stamps.add(os.stat(f"{number}").st_mtime_ns % 10**9)
    assert stamps != {0}


def reading_leaves_a_time() -> None:
    """relatime: once after each change."""
    with opened("file") as fd:
        os.write(fd, b"x")
    os.utime("file", (1000, 2000))
    with open("file") as file:
        file.read()
    assert os.stat("file").st_atime > 2000, os.stat("file").st_atime


def flags_of_an_inode_are_told() -> None:
    """FS_IOC_GETFLAGS, as lsattr(1) reads them."""
    with opened("file") as fd:
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, bytes(8))


def ranges_are_copied() -> None:
    with opened("from") as source, opened("to") as target:
        os.write(source, b"x" * MIB)
        assert os.copy_file_range(source, target, MIB, 0, 0) == MIB
        os.lseek(target, 0, os.SEEK_SET)
        assert os.read(target, MIB) == b"x" * MIB


def what_is_sent_is_the_file() -> None:
    with opened("from") as source, opened("to") as target:
        os.write(source, b"y" * 100000)
        sent = 0
        while sent < 100000:
            sent += os.sendfile(target, source, sent, 100000 - sent)
        reading, writing = os.pipe()
        assert os.splice(source, writing, 1000, offset_src=5) == 1000
        assert os.read(reading, 1000) == b"y" * 1000


def appends_do_not_overwrite_each_other() -> None:
    def append(letter: bytes) -> None:
        with opened("file", os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
            for _ in range(APPENDS):
                os.write(fd, letter * 50)

    threads = [threading.Thread(target=append, args=(letter,)) for letter in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open("file", "rb") as file:
        content = file.read()
    assert len(content) == 4 * APPENDS * 50
    assert all(len(set(content[at : at + 50])) == 1 for at in range(0, len(content), 50))


def statvfs_tells_space() -> None:
    found = os.statvfs(".")
    assert found.f_blocks > 0
    assert found.f_bavail > 0
    assert found.f_files > 0
    assert found.f_namemax == 255


def large_files_have_far_ends() -> None:
    far = 1 << 40
    with opened("file") as fd:
        os.pwrite(fd, b"end", far)
        assert os.fstat(fd).st_size == far + 3
        assert os.pread(fd, 10, far) == b"end"


def one_that_is_being_run_is_not_written() -> None:
    with open("/bin/sleep", "rb") as source, opened("program", mode=0o755) as fd:
        os.write(fd, source.read())
    reading, writing = os.pipe()
    os.set_inheritable(writing, False)
    if (pid := os.fork()) == 0:
        os.execv("./program", ["./program", "100"])
    os.close(writing)
    os.read(reading, 1)  # its end: the program was executed
    os.close(reading)
    try:
        refused(errno.ETXTBSY, os.open, "program", os.O_WRONLY)
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


TRIALS = (
    direct_io_is_the_file,
    holes_are_found,
    space_is_allocated,
    holes_are_punched,
    ranges_are_zeroed,
    everything_is_synced,
    two_processes_share_a_mapping,
    what_is_mapped_beyond_the_end_is_a_signal,
    records_are_locked,
    a_lock_is_waited_for,
    open_files_are_locked,
    both_kinds_of_locks_are_apart,
    leases_are_given,
    attributes_of_every_size,
    programs_have_capabilities,
    set_id_bits_go_when_others_write,
    access_lists_decide,
    files_without_a_name_get_one,
    renames_exchange_and_do_not_replace,
    many_links_and_one_inode,
    an_inode_keeps_its_number,
    changes_are_told,
    handles_stand_for_files,
    times_of_birth_are_told,
    times_have_fractions_of_seconds,
    reading_leaves_a_time,
    flags_of_an_inode_are_told,
    ranges_are_copied,
    what_is_sent_is_the_file,
    appends_do_not_overwrite_each_other,
    statvfs_tells_space,
    large_files_have_far_ends,
    one_that_is_being_run_is_not_written,
)


def main() -> None:
    os.umask(0o022)
    os.mkdir(sys.argv[1])
    for trial in TRIALS:
        os.chdir(sys.argv[1])
        os.mkdir(trial.__name__)
        os.chdir(trial.__name__)
        try:
            trial()
        except (AssertionError, OSError) as error:
            print(f"{trial.__name__}: {error!r}", flush=True)
        else:
            print(f"{trial.__name__}: ok", flush=True)
    print(f"{len(TRIALS)} tried")


if __name__ == "__main__":
    main()
