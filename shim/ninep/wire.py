"""9P2000.L on the wire: numbers of messages, reading a request's fields, writing an answer's.

Little-endian throughout; a text is two bytes of length and UTF-8, which file names need not be: they are
bytes here. Layouts: the protocol's own description (diod's protocol.md) and Linux' net/9p/client.c. It must
not know what the messages do.
"""

import struct

VERSION = b"9P2000.L"
# Linux' limit for a connection by descriptor is 1 MiB (net/9p/trans_fd.c, MAX_SOCK_BUF).
MOST_MESSAGE_BYTES = 1 << 20
LEAST_MESSAGE_BYTES = 4096
HEAD = struct.Struct("<IBH")  # size of all of it, type, tag
QID = struct.Struct("<BIQ")  # type, version, path
READ_HEAD_BYTES = HEAD.size + 4
NO_FID = 0xFFFFFFFF
MOST_NAMES = 16

# A request's number; its answer's is one more.
RLERROR = 7
STATFS, LOPEN, LCREATE, SYMLINK, MKNOD, RENAME, READLINK = 8, 12, 14, 16, 18, 20, 22
GETATTR, SETATTR, XATTRWALK, XATTRCREATE, READDIR = 24, 26, 30, 32, 40
FSYNC, LOCK, GETLOCK, LINK, MKDIR, RENAMEAT, UNLINKAT = 50, 52, 54, 70, 72, 74, 76
VERSION_REQUEST, AUTH, ATTACH, FLUSH, WALK = 100, 102, 104, 108, 110
READ, WRITE, CLUNK, REMOVE = 116, 118, 120, 122

QID_DIRECTORY, QID_SYMLINK, QID_FILE = 0x80, 0x02, 0x00


class Malformed(ValueError):
    """A message that is not what its length or its type says: the connection ends."""


class Fields:
    """Takes the fields of one request, in order."""

    __slots__ = ("_data", "_position")

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._position = 0

    def take(self, layout: struct.Struct) -> "tuple[int, ...]":
        try:
            values = layout.unpack_from(self._data, self._position)
        except struct.error:
            raise Malformed("a message ends within a number") from None
        self._position += layout.size
        return values

    def text(self) -> bytes:
        (length,) = self.take(U16)
        return bytes(self.bytes(length))

    def name(self) -> bytes:
        """A name in a directory: nothing that would lead out of it."""
        name = self.text()
        if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise Malformed("a name that no directory can have")
        return name

    def bytes(self, length: int) -> memoryview:
        """A view: good until the next message is read."""
        end = self._position + length
        if end > len(self._data):
            raise Malformed("a message ends within a text")
        found = self._data[self._position : end]
        self._position = end
        return found


U16 = struct.Struct("<H")


def text(value: bytes) -> bytes:
    return U16.pack(len(value)) + value
