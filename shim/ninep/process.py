"""The file server's process: it takes connections, as descriptors by a socket, and serves each in a thread.

Every pod has one for all its life, so it imports little: of socket, threading and logging it takes what they
are made of, and of typing nothing, which saves 4 MiB. It is executed, and not forked from a process that has
more imported: it would have that one's memory and address layout, and it is what a hostile guest talks to.
"""

import _socket
import _thread
import os
import resource
import sys

from shim import system
from shim.ninep import confine
from shim.ninep.server import Session
from shim.ninep.wire import Malformed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn

FD_BYTES = 4


def run(words: "Sequence[str]") -> "NoReturn":
    """words: of the command line (__main__.py)."""
    options = dict(word.removeprefix("--").split("=", 1) for word in words[:-1])
    most_files = int(options["most-files"])
    system.set_process_name("casemate-files")
    system.keep_little_memory()
    os.umask(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    control = _socket.socket(fileno=int(options["socket-fd"]))
    root = confine.enter(words[-1])
    confine.give_up_powers()
    while (connection := receive(control)) is not None:
        _thread.start_new_thread(serve, (Session(connection, root, most_files),))
    # At once: threads that Python ends need a library then that is not in this root.
    os._exit(0)


def receive(control: _socket.socket) -> "_socket.socket | None":
    """The next connection; None where there will be no more."""
    while True:
        said, ancillary, _, _ = control.recvmsg(1, _socket.CMSG_SPACE(FD_BYTES))
        if not said:
            return None
        for level, kind, data in ancillary:
            if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS) and len(data) == FD_BYTES:
                descriptor = int.from_bytes(data, sys.byteorder)
                os.set_inheritable(descriptor, False)
                return _socket.socket(fileno=descriptor)


def serve(session: Session) -> None:
    """A client's misbehaviour ends its own connection."""
    try:
        session.serve()
    except (Malformed, OSError) as error:
        os.write(2, f"a connection ended: {error}\n".encode(errors="replace"))
