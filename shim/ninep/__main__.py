"""The file server of one pod, a process of its own: --socket-fd=N --most-files=N DIRECTORY.

Connections come by the socket N, as descriptors; each is a client's, and has a thread. Ends when nobody holds
the other end of the socket any more.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import logging
import resource
import socket
import threading
from typing import NoReturn

from shim.ninep import confine
from shim.ninep.server import Session
from shim.ninep.wire import Malformed
from shim.system import set_process_name

log = logging.getLogger("casemate")


def main() -> NoReturn:
    words = sys.argv[1:]
    options = dict(word.removeprefix("--").split("=", 1) for word in words[:-1])
    most_files = int(options["most-files"])
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    set_process_name("casemate-files")
    os.umask(0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    control = socket.socket(fileno=int(options["socket-fd"]))
    root = confine.enter(words[-1])
    confine.give_up_powers()
    while True:
        said, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not said:
            # At once: threads that Python ends need a library then that is not in this root.
            os._exit(0)
        for descriptor in descriptors:
            session = Session(socket.socket(fileno=descriptor), root, most_files)
            threading.Thread(target=serve, args=(session,), daemon=True).start()


def serve(session: Session) -> None:
    """A client's misbehaviour ends its own connection."""
    try:
        session.serve()
    except (Malformed, OSError) as error:
        log.warning("a connection ended: %s", error)


if __name__ == "__main__":
    main()
