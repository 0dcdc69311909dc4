"""What programs expect of a local file system, each thing tried in a directory of its own.

Runs in a container, and prints a line for each thing that is not so: python3 trials.py DIRECTORY
"""

import errno
import fcntl
import mmap
import os
import socket
import stat
import sys
import threading
from collections.abc import Callable


def raises(number: int, function: Callable[..., object], *arguments: object, **named: object) -> None:
    found: OSError | None = None
    try:
        function(*arguments, **named)
    except OSError as error:
        found = error
    assert found is not None, f"no error, expected {errno.errorcode[number]}"
    assert found.errno == number, f"{found}, expected {errno.errorcode[number]}"


def write(path: str, data: bytes, flags: int = os.O_WRONLY | os.O_CREAT | os.O_TRUNC) -> None:
    fd = os.open(path, flags, 0o644)
    os.write(fd, data)
    os.close(fd)


def read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def unlinked_files_go_on() -> None:
    fd = os.open("file", os.O_RDWR | os.O_CREAT)
    os.unlink("file")
    assert os.write(fd, b"hello") == 5
    assert os.fstat(fd).st_size == 5
    os.ftruncate(fd, 2)
    assert os.pread(fd, 10, 0) == b"he"
    os.close(fd)
    assert os.listdir(".") == []


def renames_replace() -> None:
    write("a", b"a")
    write("b", b"b")
    fd = os.open("b", os.O_RDONLY)
    os.rename("a", "b")
    assert read("b") == b"a"
    assert os.read(fd, 10) == b"b"
    os.close(fd)
    os.mkdir("d")
    os.rename("b", "d/c")
    assert os.listdir("d") == ["c"]
    raises(errno.ENOTEMPTY, os.rmdir, "d")
    raises(errno.EINVAL, os.rename, "d", "d/below")


def hard_links_are_one_file() -> None:
    write("a", b"one")
    os.link("a", "b")
    assert os.stat("a").st_nlink == os.stat("b").st_nlink == 2
    assert os.stat("a").st_ino == os.stat("b").st_ino
    write("b", b"two", os.O_WRONLY)
    assert read("a") == b"two"
    os.unlink("a")
    assert os.stat("b").st_nlink == 1


def links_are_links() -> None:
    os.symlink("nowhere", "link")
    assert os.readlink("link") == "nowhere"
    raises(errno.ENOENT, open, "link")
    raises(errno.EEXIST, os.symlink, "x", "link")
    os.symlink("loop", "loop")
    raises(errno.ELOOP, open, "loop")


def modes_and_owners_hold() -> None:
    write("file", b"x")
    for mode in (0o600, 0o4755, 0o2711, 0o000):
        os.chmod("file", mode)
        assert stat.S_IMODE(os.stat("file").st_mode) == mode
    os.chown("file", 1234, 567)
    assert (os.stat("file").st_uid, os.stat("file").st_gid) == (1234, 567)
    os.mkdir("d")
    os.chown("d", 0, 567)
    os.chmod("d", 0o2775)
    write("d/file", b"x")
    os.mkdir("d/below")
    assert os.stat("d/file").st_gid == 567
    assert os.stat("d/below").st_mode & stat.S_ISGID


def others_may_not() -> None:
    write("file", b"x")
    os.chmod("file", 0o600)
    os.chmod(".", 0o755)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(99, 99, 99)
        os.setresuid(99, 99, 99)
        try:
            raises(errno.EACCES, open, "file")
            raises(errno.EACCES, open, "new", "w")
            raises(errno.EPERM, os.chmod, "file", 0o777)
        except AssertionError as error:
            print("others_may_not", error, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def an_ordinary_user_owns_what_it_makes() -> None:
    os.chmod(".", 0o777)
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(98, 98, 98)
        os.setresuid(99, 99, 99)
        write("mine", b"x")
        os.mkdir("directory")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    for name in ("mine", "directory"):
        assert (os.stat(name).st_uid, os.stat(name).st_gid) == (99, 98)


def creating_is_exclusive() -> None:
    os.close(os.open("file", os.O_CREAT | os.O_EXCL))
    raises(errno.EEXIST, os.open, "file", os.O_CREAT | os.O_EXCL)
    raises(errno.ENOENT, os.open, "other", os.O_RDONLY)
    raises(errno.ENAMETOOLONG, os.mkdir, "x" * 256)
    raises(errno.ENOTDIR, os.mkdir, "file/below")
    raises(errno.EISDIR, os.open, ".", os.O_WRONLY)


def memory_maps_are_the_file() -> None:
    write("file", b"a" * 10000)
    with open("file", "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        assert mapped[9999] == ord("a")
        mapped[5000:5005] = b"hello"
        mapped.flush()
        assert os.pread(file.fileno(), 5, 5000) == b"hello"
    assert read("file")[5000:5005] == b"hello"


def appending_and_holes() -> None:
    write("file", b"one")
    write("file", b"two", os.O_WRONLY | os.O_APPEND)
    assert read("file") == b"onetwo"
    fd = os.open("file", os.O_RDWR)
    os.pwrite(fd, b"end", 1 << 20)
    assert os.fstat(fd).st_size == (1 << 20) + 3
    assert os.pread(fd, 4, 1000) == bytes(4)
    os.fsync(fd)
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)


def large_files_are_whole() -> None:
    block = os.urandom(1 << 16)
    with open("file", "wb") as file:
        for number in range(100):
            file.write(number.to_bytes(4, "little") + block)
    with open("file", "rb") as file:
        for number in range(100):
            assert file.read((1 << 16) + 4) == number.to_bytes(4, "little") + block


def directories_list_all() -> None:
    names = [f"{number:04}" for number in range(1000)]
    for name in names:
        write(name, b"")
    assert sorted(os.listdir(".")) == names
    with os.scandir(".") as entries:
        for number, entry in enumerate(entries):
            assert entry.is_file()
            if number % 2:
                os.unlink(entry.name)
    assert len(os.listdir(".")) == 500


def times_hold() -> None:
    write("file", b"x")
    os.utime("file", ns=(10**18 + 1, 10**18 + 2))
    found = os.stat("file")
    times = (found.st_atime_ns, found.st_mtime_ns)
    assert times == (10**18 + 1, 10**18 + 2), times
    write("file", b"y")
    assert os.stat("file").st_mtime_ns > 10**18 + 2, os.stat("file").st_mtime_ns


def attributes_hold() -> None:
    write("file", b"x")
    os.setxattr("file", "user.name", b"value")
    assert os.getxattr("file", "user.name") == b"value"
    assert "user.name" in os.listxattr("file")
    os.removexattr("file", "user.name")
    raises(errno.ENODATA, os.getxattr, "file", "user.name")


def is_locked(path: str) -> bool:
    """For another process."""
    pid = os.fork()
    if pid == 0:
        with open(path, "r+b") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def locks_hold() -> None:
    write("file", b"")
    first, second = (os.open("file", os.O_RDWR) for _ in range(2))
    fcntl.flock(first, fcntl.LOCK_EX)
    raises(errno.EAGAIN, fcntl.flock, second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(first, fcntl.LOCK_UN)
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(first)
    os.close(second)
    # Another file: over 9p, as over NFS, both kinds of locks are one kind, and exclude each other.
    with open("other", "wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert is_locked("other")
        fcntl.lockf(file, fcntl.LOCK_UN)
        assert not is_locked("other")


def special_files_work() -> None:
    os.mkfifo("fifo")
    reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open("fifo", os.O_WRONLY)
    os.write(writer, b"through")
    assert os.read(reader, 10) == b"through"
    os.close(reader)
    os.close(writer)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.connect("socket")


def programs_run_from_it() -> None:
    write("program", b"#!/bin/sh\nexit 7\n")
    os.chmod("program", 0o755)
    assert os.waitstatus_to_exitcode(os.system("./program")) == 7


def many_at_once() -> None:
    def work(number: int) -> None:
        for turn in range(20):
            write(f"{number}", str(turn).encode())
            os.rename(f"{number}", f"{number}-done")
            assert read(f"{number}-done") == str(turn).encode()

    failed: list[Exception] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except (AssertionError, OSError) as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


TRIALS = (
    unlinked_files_go_on,
    renames_replace,
    hard_links_are_one_file,
    links_are_links,
    modes_and_owners_hold,
    others_may_not,
    an_ordinary_user_owns_what_it_makes,
    creating_is_exclusive,
    memory_maps_are_the_file,
    appending_and_holes,
    large_files_are_whole,
    directories_list_all,
    times_hold,
    attributes_hold,
    locks_hold,
    special_files_work,
    programs_run_from_it,
    many_at_once,
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
            print(f"{trial.__name__}: {error!r}")
    print(f"{len(TRIALS)} tried")


if __name__ == "__main__":
    main()
