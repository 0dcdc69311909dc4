"""What a connection's fids stand for: files of the served tree, held by descriptors.

No path is ever looked up but a single name in a directory that is held, and no link is followed, so nothing
that the guest or the host does to names meanwhile leads anywhere else; and a file that is unlinked while it
is open goes on as on any local file system. The working directory is /proc/self/fd: the kernel lets "12"
there stand for descriptor 12 wherever only a path will do.

It must not know messages. Everything raises OSError.
"""

import os
import stat

PATH_ONLY = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
# What a client may say of how it opens. Appending is its own business: it sends offsets.
OPEN_FLAGS = os.O_ACCMODE | os.O_TRUNC | os.O_NOATIME | os.O_DIRECTORY | os.O_SYNC | os.O_DSYNC
# A FIFO would wait for its other end, a terminal become the server's.
ALWAYS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class Fid:
    """path: a descriptor that only names the file. io: one to read and write by; -1 before it is opened.

    user: who asked, as new files' owner. entries: of a directory that is being read.
    """

    __slots__ = ("entries", "io", "path", "user", "value", "value_flags", "value_left", "value_name")

    def __init__(self, path: int, user: int) -> None:
        self.path = path
        self.io = -1
        self.user = user
        self.entries: list[tuple[bytes, int, bool]] | None = None
        self.value: bytearray | None = None  # of an extended attribute, being read or written
        self.value_name = b""
        self.value_left = self.value_flags = 0

    def close(self) -> None:
        for fd in (self.path, self.io):
            if fd >= 0:
                os.close(fd)
        self.path = self.io = -1

    def walk(self, name: bytes) -> int:
        """A descriptor of what has this name in this directory."""
        return os.open(name, PATH_ONLY, dir_fd=self.path)

    def open(self, flags: int) -> None:
        opened = os.open(_by_number(self.path), (flags & OPEN_FLAGS) | (ALWAYS & ~os.O_NOFOLLOW))
        if self.io >= 0:
            os.close(self.io)
        self.io = opened

    def status(self) -> os.stat_result:
        return os.fstat(self.path)

    # new files: the client has taken its umask off and decided the group (inode_init_owner of its kernel)

    def create(self, name: bytes, flags: int, mode: int, group: int) -> None:
        """Makes the file, opens it, and stands for it from now on. One that somebody else has made since the
        client looked is opened as it is, unless the client wants it new."""
        wanted, is_new = (flags & OPEN_FLAGS) | ALWAYS, True
        try:
            io = os.open(name, wanted | os.O_CREAT | os.O_EXCL, mode & 0o7777, dir_fd=self.path)
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            io, is_new = os.open(name, wanted, dir_fd=self.path), False
        try:
            path = os.open(_by_number(io), os.O_PATH | os.O_CLOEXEC)
            try:
                if is_new:
                    self._give(path, mode, group)
            except BaseException:
                os.close(path)
                raise
        except BaseException:
            os.close(io)
            raise
        os.close(self.path)
        self.path, self.io = path, io

    def make(self, name: bytes, mode: int, group: int) -> int:
        """A directory, a FIFO, a socket or an empty file. Returns a descriptor that only names it."""
        if stat.S_ISDIR(mode):
            os.mkdir(name, mode & 0o7777, dir_fd=self.path)
        else:
            os.mknod(name, mode, 0, dir_fd=self.path)
        return self._made(name, mode, group)

    def make_link(self, name: bytes, target: bytes, group: int) -> int:
        os.symlink(target, name, dir_fd=self.path)
        return self._made(name, stat.S_IFLNK, group)

    def _made(self, name: bytes, mode: int, group: int) -> int:
        path = self.walk(name)
        try:
            self._give(path, mode, group)
        except BaseException:
            os.close(path)
            raise
        return path

    def _give(self, path: int, mode: int, group: int) -> None:
        if (self.user, group) != (0, 0):
            os.chown(_by_number(path), self.user, group)
        if mode & 0o7000 and not stat.S_ISLNK(mode):
            os.chmod(_by_number(path), mode & 0o7777)  # a change of owner takes these bits off

    # what is there

    def chmod(self, mode: int) -> None:
        os.chmod(_by_number(self.path), mode & 0o7777)

    def chown(self, user: int, group: int) -> None:
        os.chown(_by_number(self.path), user, group)

    def truncate(self, size: int) -> None:
        os.truncate(_by_number(self.path), size)

    def set_times(self, accessed_ns: int | None, modified_ns: int | None) -> None:
        """None leaves a time as it is."""
        now = self.status()
        times = (
            now.st_atime_ns if accessed_ns is None else accessed_ns,
            now.st_mtime_ns if modified_ns is None else modified_ns,
        )
        os.utime(_by_number(self.path), ns=times)

    def target(self) -> bytes:
        return os.readlink(b"", dir_fd=self.path)

    def link(self, name: bytes, to: "Fid") -> None:
        os.link(_by_number(to.path), name, dst_dir_fd=self.path, follow_symlinks=True)

    def rename(self, name: bytes, directory: "Fid", new_name: bytes) -> None:
        os.rename(name, new_name, src_dir_fd=self.path, dst_dir_fd=directory.path)

    def unlink(self, name: bytes, *, directory: bool) -> None:
        (os.rmdir if directory else os.unlink)(name, dir_fd=self.path)

    def file_system(self) -> os.statvfs_result:
        return os.statvfs(self.path)

    def sync(self, *, data_only: bool) -> None:
        (os.fdatasync if data_only else os.fsync)(self.io)

    def list(self) -> "list[tuple[bytes, int, bool]]":
        """(name, inode, whether it is a directory) of every entry, as they are now."""
        own = self.status().st_ino
        found = [(b".", own, True), (b"..", own, True)]
        with os.scandir(self.io) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                found.append((name, entry.inode(), entry.is_dir(follow_symlinks=False)))
        return found

    # extended attributes

    def attribute(self, name: bytes) -> bytes:
        return os.getxattr(_by_number(self.path), name)

    def attribute_names(self) -> bytes:
        names = os.listxattr(_by_number(self.path))
        return b"".join(os.fsencode(name) + b"\0" for name in names)

    def set_attribute(self, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(_by_number(self.path), name, value, flags)

    def remove_attribute(self, name: bytes) -> None:
        os.removexattr(_by_number(self.path), name)


def _by_number(fd: int) -> str:
    return str(fd)
