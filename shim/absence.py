"""What `delete` answers, and at once for a pod of which nothing is left.

That is the usual case: a shim that is told to end takes everything away itself, its directory with the
journal last. Apart from contract.py, whose imports take twice as long as all of such a `delete`.
"""

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.paths import PodPaths

KILLED = 137  # shim/process.py, without its imports


def is_gone(paths: "PodPaths") -> bool:
    """Whether there is nothing to undo: the directory goes when all that its journal names is gone."""
    return not os.path.lexists(paths.in_words())


def answer(pid: int = 0, now_ns: int | None = None) -> bytes:
    """An encoded containerd.task.v2.DeleteResponse (protobuf's encoding, rpc/api/task.py has the fields):
    the pid that containerd was told, killed, and now."""
    seconds, nanos = divmod(time.time_ns() if now_ns is None else now_ns, 1_000_000_000)
    moment = b"\x08" + _varint(seconds) + (b"\x10" + _varint(nanos) if nanos else b"")
    told = b"\x08" + _varint(pid) if pid else b""
    return told + b"\x10" + _varint(KILLED) + b"\x1a" + _varint(len(moment)) + moment


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
