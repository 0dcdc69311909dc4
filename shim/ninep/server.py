"""One client's connection: requests in, answers out, in the order they came.

A file server that is told what to do by a hostile kernel: every length is checked, every name is a single
one, and how much the client may hold is limited. It must not know how the process was confined, nor what tree
it serves.
"""

import errno
import mmap
import os
import stat
import struct
import time

from shim.ninep import wire
from shim.ninep.fid import PATH_ONLY, Fid
from shim.ninep.wire import Fields, Malformed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Callable

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_NUMBERS = {count: struct.Struct(f"<{count}I") for count in (1, 2, 3)}
_SETATTR = struct.Struct("<IIIIIQQQQQ")
_GETATTR = struct.Struct("<IIIQQQQQQQQQQQQQQQ")
_STATFS = struct.Struct("<IIQQQQQQI")
_LOCK = struct.Struct("<BIQQI")
_GETLOCK = struct.Struct("<BQQI")
_READ = struct.Struct("<IQI")
_ENTRY = struct.Struct("<BIQQB")

BASIC = 0x7FF  # the answer to GETATTR has all that stat(2) has
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, _, ATIME_GIVEN, MTIME_GIVEN = (
    1 << bit for bit in range(9)
)
UNCHANGED = 0xFFFFFFFF
MAGIC = 0x01021997  # V9FS_MAGIC: what statfs(2) says the type is
MOST_NAME_BYTES = 255
# An extended attribute that is written may be as long as the kernel takes (XATTR_SIZE_MAX).
MOST_VALUE_BYTES = 1 << 16
XATTR_REPLACE = 2
UNLOCKED, LOCKED_OK = 2, 0
REMOVE_DIRECTORY = 0x200
DEVICE_BITS = 48
# What mknod(2) may make: no device, which would be one of the host's.
MADE = (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK)


class Session:
    """Serves one connection until it ends. root: a descriptor of the served directory.

    most_fids: how many the client may have, which bounds memory as descriptors do not.
    """

    def __init__(self, connection: "socket", root: int, most_fids: int) -> None:
        self._connection = connection
        self._root = root
        self._most_fids = most_fids
        self._fids: dict[int, Fid] = {}
        self._devices: dict[int, int] = {}
        self._most_bytes = wire.MOST_MESSAGE_BYTES
        self._in, self._out = _room(), _room()
        self._methods: dict[int, Callable[[Fields], bytes]] = {
            wire.VERSION_REQUEST: self._version,
            wire.ATTACH: self._attach,
            wire.FLUSH: self._flush,
            wire.WALK: self._walk,
            wire.CLUNK: self._clunk,
            wire.REMOVE: self._remove,
            wire.WRITE: self._write,
            wire.STATFS: self._statfs,
            wire.LOPEN: self._lopen,
            wire.LCREATE: self._lcreate,
            wire.SYMLINK: self._symlink,
            wire.MKNOD: self._mknod,
            wire.MKDIR: self._mkdir,
            wire.READLINK: self._readlink,
            wire.GETATTR: self._getattr,
            wire.SETATTR: self._setattr,
            wire.XATTRWALK: self._xattrwalk,
            wire.XATTRCREATE: self._xattrcreate,
            wire.READDIR: self._readdir,
            wire.FSYNC: self._fsync,
            wire.LOCK: self._lock,
            wire.GETLOCK: self._getlock,
            wire.LINK: self._link,
            wire.RENAMEAT: self._renameat,
            wire.UNLINKAT: self._unlinkat,
        }

    def serve(self) -> None:
        """Returns when the client hangs up. Raises Malformed for what no client of ours says, OSError for a
        connection that broke."""
        try:
            while self._serve_one():
                pass
        finally:
            self._connection.close()
            self._forget_all()

    def _serve_one(self) -> bool:
        received = memoryview(self._in)
        if not self._receive(received[: wire.HEAD.size]):
            return False
        size, kind, tag = wire.HEAD.unpack_from(received)
        if not wire.HEAD.size <= size <= self._most_bytes:
            raise Malformed(f"a message of {size} bytes")
        if not self._receive(received[wire.HEAD.size : size]):
            raise Malformed("a message that is cut short")
        fields = Fields(received[wire.HEAD.size : size])
        try:
            if kind == wire.READ:
                self._answer_read(tag, fields)
                return True
            method = self._methods.get(kind)
            if method is None:
                raise OSError(errno.EOPNOTSUPP, "not a request of 9P2000.L")
            body = method(fields)
        except OSError as error:
            kind, body = wire.RLERROR - 1, _U32.pack(error.errno or errno.EIO)
        except Malformed:
            raise
        except (OverflowError, ValueError):  # a number that no file has, or a name with a zero in it
            kind, body = wire.RLERROR - 1, _U32.pack(errno.EINVAL)
        head = wire.HEAD.pack(wire.HEAD.size + len(body), kind + 1, tag)
        self._connection.sendall(head + body)
        return True

    def _receive(self, into: memoryview) -> bool:
        """Fills it. False at the end of the connection."""
        while into:
            count = self._connection.recv_into(into)
            if count == 0:
                return False
            into = into[count:]
        return True

    # fids

    def _fid(self, number: int) -> Fid:
        try:
            return self._fids[number]
        except KeyError:
            raise OSError(errno.EBADF, "no such fid") from None

    def _numbers(self, fields: Fields, count: int) -> "tuple[int, ...]":
        return fields.take(_NUMBERS[count])

    def _one(self, fields: Fields) -> Fid:
        (number,) = fields.take(_U32)
        return self._fid(number)

    def _keep(self, number: int, fid: Fid) -> None:
        if number in self._fids:
            fid.close()
            raise OSError(errno.EBADF, "the fid is in use")
        if len(self._fids) >= self._most_fids:
            fid.close()
            raise OSError(errno.EMFILE, "too many fids")
        self._fids[number] = fid

    def _forget_all(self) -> None:
        for fid in self._fids.values():
            fid.close()
        self._fids.clear()

    def _qid(self, status: os.stat_result) -> bytes:
        """Of no version: clients take another one for another file. Files of several file systems below one
        tree must not have one number."""
        kind = wire.QID_FILE
        if stat.S_ISDIR(status.st_mode):
            kind = wire.QID_DIRECTORY
        elif stat.S_ISLNK(status.st_mode):
            kind = wire.QID_SYMLINK
        return wire.QID.pack(kind, 0, self._number(status.st_dev, status.st_ino))

    def _number(self, device: int, inode: int) -> int:
        index = self._devices.setdefault(device, len(self._devices))
        return (inode ^ (index << DEVICE_BITS)) & 0xFFFFFFFFFFFFFFFF

    def _qid_of(self, path: int) -> bytes:
        """And closes it."""
        try:
            return self._qid(os.fstat(path))
        finally:
            os.close(path)

    # the session

    def _version(self, fields: Fields) -> bytes:
        (wanted,) = fields.take(_U32)
        if wanted < wire.LEAST_MESSAGE_BYTES:
            raise Malformed(f"messages of at most {wanted} bytes")
        version = fields.text()
        self._forget_all()
        self._most_bytes = min(wanted, wire.MOST_MESSAGE_BYTES)
        spoken = wire.VERSION if version == wire.VERSION else b"unknown"
        return _U32.pack(self._most_bytes) + wire.text(spoken)

    def _attach(self, fields: Fields) -> bytes:
        number, authorized = self._numbers(fields, 2)
        fields.text()
        fields.text()
        (user,) = fields.take(_U32)
        if authorized != wire.NO_FID:
            raise OSError(errno.EINVAL, "no authentication was asked for")
        fid = Fid(os.open(".", PATH_ONLY | os.O_DIRECTORY, dir_fd=self._root), user)
        self._keep(number, fid)
        return self._qid(fid.status())

    def _flush(self, fields: Fields) -> bytes:
        return b""  # what came before has been answered

    def _walk(self, fields: Fields) -> bytes:
        number, new_number = self._numbers(fields, 2)
        start = self._fid(number)
        (count,) = fields.take(wire.U16)
        if count > wire.MOST_NAMES:
            raise Malformed(f"a walk of {count} names")
        names = [fields.name() for _ in range(count)]
        at = Fid(os.dup(start.path), start.user)
        qids: list[bytes] = []
        for name in names:
            try:
                step = at.walk(name)
            except OSError:
                at.close()
                if not qids:
                    raise
                return wire.U16.pack(len(qids)) + b"".join(qids)
            os.close(at.path)
            at.path = step
            qids.append(self._qid(at.status()))
        if number == new_number:
            start.close()
            self._fids[number] = at
        else:
            self._keep(new_number, at)
        return wire.U16.pack(len(qids)) + b"".join(qids)

    def _clunk(self, fields: Fields) -> bytes:
        (number,) = fields.take(_U32)
        fid = self._fid(number)
        del self._fids[number]
        try:
            if fid.value is not None and fid.value_name:
                self._set_value(fid)
        finally:
            fid.close()
        return b""

    def _remove(self, fields: Fields) -> bytes:
        """By fid alone: a descriptor has no name. Linux asks UNLINKAT first."""
        self._clunk(fields)
        raise OSError(errno.EOPNOTSUPP, "use Tunlinkat")

    # files

    def _lopen(self, fields: Fields) -> bytes:
        fid = self._one(fields)
        (flags,) = fields.take(_U32)
        fid.open(flags)
        return self._qid(fid.status()) + _U32.pack(0)

    def _lcreate(self, fields: Fields) -> bytes:
        fid, name = self._one(fields), fields.name()
        flags, mode, group = self._numbers(fields, 3)
        fid.create(name, flags, mode, group)
        return self._qid(fid.status()) + _U32.pack(0)

    def _answer_read(self, tag: int, fields: Fields) -> None:
        """Straight into the answer: this is what moves the bytes."""
        number, offset, count = fields.take(_READ)
        fid = self._fid(number)
        out = memoryview(self._out)
        count = min(count, self._most_bytes - wire.READ_HEAD_BYTES)
        room = out[wire.READ_HEAD_BYTES : wire.READ_HEAD_BYTES + count]
        if fid.value is not None:
            found = fid.value[offset : offset + count]
            room[: len(found)] = found
            got = len(found)
        else:
            got = os.preadv(fid.io, [room], offset) if fid.io >= 0 else _not_open()
        wire.HEAD.pack_into(self._out, 0, wire.READ_HEAD_BYTES + got, wire.READ + 1, tag)
        _U32.pack_into(self._out, wire.HEAD.size, got)
        self._connection.sendall(out[: wire.READ_HEAD_BYTES + got])

    def _write(self, fields: Fields) -> bytes:
        number, offset, count = fields.take(_READ)
        fid, data = self._fid(number), fields.bytes(count)
        if fid.value is not None:
            if not fid.value_name or offset != len(fid.value) or len(data) > fid.value_left:
                raise OSError(errno.EINVAL, "not as the attribute was announced")
            fid.value += data
            fid.value_left -= len(data)
            return _U32.pack(len(data))
        return _U32.pack(os.pwrite(fid.io, data, offset) if fid.io >= 0 else _not_open())

    def _fsync(self, fields: Fields) -> bytes:
        fid = self._one(fields)
        (data_only,) = fields.take(_U32)
        if fid.io < 0:
            _not_open()
        fid.sync(data_only=bool(data_only))
        return b""

    def _lock(self, fields: Fields) -> bytes:
        """The guest's kernel keeps its own locks; between guests there are none, as with virtio-fs."""
        self._one(fields)
        fields.take(_LOCK)
        return bytes((LOCKED_OK,))

    def _getlock(self, fields: Fields) -> bytes:
        self._one(fields)
        _, start, length, owner = fields.take(_GETLOCK)
        return _GETLOCK.pack(UNLOCKED, start, length, owner) + wire.text(fields.text())

    # names

    def _symlink(self, fields: Fields) -> bytes:
        fid, name, target = self._one(fields), fields.name(), fields.text()
        (group,) = fields.take(_U32)
        return self._qid_of(fid.make_link(name, target, group))

    def _mknod(self, fields: Fields) -> bytes:
        fid, name = self._one(fields), fields.name()
        (mode,) = fields.take(_U32)
        _, _, group = self._numbers(fields, 3)
        if stat.S_IFMT(mode) not in MADE:
            raise OSError(errno.EPERM, "a device of the host's")
        return self._qid_of(fid.make(name, mode, group))

    def _mkdir(self, fields: Fields) -> bytes:
        fid, name = self._one(fields), fields.name()
        mode, group = self._numbers(fields, 2)
        return self._qid_of(fid.make(name, stat.S_IFDIR | (mode & 0o7777), group))

    def _readlink(self, fields: Fields) -> bytes:
        return wire.text(self._one(fields).target())

    def _link(self, fields: Fields) -> bytes:
        directory, fid = self._one(fields), self._one(fields)
        directory.link(fields.name(), fid)
        return b""

    def _renameat(self, fields: Fields) -> bytes:
        directory, name = self._one(fields), fields.name()
        directory.rename(name, self._one(fields), fields.name())
        return b""

    def _unlinkat(self, fields: Fields) -> bytes:
        fid, name = self._one(fields), fields.name()
        (flags,) = fields.take(_U32)
        fid.unlink(name, directory=bool(flags & REMOVE_DIRECTORY))
        return b""

    def _readdir(self, fields: Fields) -> bytes:
        number, offset, count = fields.take(_READ)
        fid = self._fid(number)
        if fid.io < 0:
            _not_open()
        if offset == 0 or fid.entries is None:
            fid.entries = fid.list()
        device = fid.status().st_dev
        left = min(count, self._most_bytes - wire.READ_HEAD_BYTES)
        found = []
        for position, (name, inode, is_directory) in enumerate(fid.entries[offset:], offset + 1):
            left -= _ENTRY.size + 2 + len(name)
            if left < 0:
                break
            kind = wire.QID_DIRECTORY if is_directory else wire.QID_FILE
            number = self._number(device, inode)
            found.append(_ENTRY.pack(kind, 0, number, position, 4 if is_directory else 0) + wire.text(name))
        if not found and offset < len(fid.entries):
            raise OSError(errno.EINVAL, "no room for a name")
        data = b"".join(found)
        return _U32.pack(len(data)) + data

    # attributes

    def _statfs(self, fields: Fields) -> bytes:
        found = self._one(fields).file_system()
        return _STATFS.pack(
            MAGIC,
            found.f_bsize,
            found.f_blocks * found.f_frsize // found.f_bsize,
            found.f_bfree * found.f_frsize // found.f_bsize,
            found.f_bavail * found.f_frsize // found.f_bsize,
            found.f_files,
            found.f_ffree,
            found.f_fsid,
            min(found.f_namemax, MOST_NAME_BYTES),
        )

    def _getattr(self, fields: Fields) -> bytes:
        found = self._one(fields).status()
        return (
            _U64.pack(BASIC)
            + self._qid(found)
            + _GETATTR.pack(
                found.st_mode,
                found.st_uid,
                found.st_gid,
                found.st_nlink,
                found.st_rdev,
                found.st_size,
                found.st_blksize,
                found.st_blocks,
                *divmod(found.st_atime_ns, 10**9),
                *divmod(found.st_mtime_ns, 10**9),
                *divmod(found.st_ctime_ns, 10**9),
                *(0, 0, 0, 0),
            )
        )

    def _setattr(self, fields: Fields) -> bytes:
        number, valid, mode, user, group, size, *times = fields.take(_SETATTR)
        fid = self._fid(number)
        if valid & (SET_UID | SET_GID):
            fid.chown(user if valid & SET_UID else -1, group if valid & SET_GID else -1)
        if valid & SET_MODE:
            fid.chmod(mode)
        if valid & SET_SIZE:
            fid.truncate(size)
        if valid & (SET_ATIME | SET_MTIME):
            now = time.time_ns()
            accessed = times[0] * 10**9 + times[1] if valid & ATIME_GIVEN else now
            modified = times[2] * 10**9 + times[3] if valid & MTIME_GIVEN else now
            fid.set_times(accessed if valid & SET_ATIME else None, modified if valid & SET_MTIME else None)
        return b""

    def _xattrwalk(self, fields: Fields) -> bytes:
        number, new_number = self._numbers(fields, 2)
        fid, name = self._fid(number), fields.text()
        value = fid.attribute(name) if name else fid.attribute_names()
        reading = Fid(-1, fid.user)
        reading.value = bytearray(value)
        self._keep(new_number, reading)
        return _U64.pack(len(value))

    def _xattrcreate(self, fields: Fields) -> bytes:
        fid, name = self._one(fields), fields.text()
        (size,) = fields.take(_U64)
        (flags,) = fields.take(_U32)
        if not name:
            raise OSError(errno.EINVAL, "an attribute without a name")
        if size > MOST_VALUE_BYTES:
            raise OSError(errno.E2BIG, f"an attribute of {size} bytes")
        fid.value, fid.value_name, fid.value_left, fid.value_flags = bytearray(), name, size, flags
        return b""

    def _set_value(self, fid: Fid) -> None:
        assert fid.value is not None
        if fid.value_left:
            raise OSError(errno.EINVAL, "not as long as the attribute was announced")
        if not fid.value and fid.value_flags == XATTR_REPLACE:
            fid.remove_attribute(fid.value_name)  # how Linux' client removes one
        else:
            fid.set_attribute(fid.value_name, bytes(fid.value), fid.value_flags)


def _room() -> mmap.mmap:
    """For the largest message. Only what messages have needed of it takes memory."""
    return mmap.mmap(-1, wire.MOST_MESSAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _not_open() -> int:
    raise OSError(errno.EBADF, "the file is not open")
