"""The fork server: a process with one thread and everything imported, which forks and does nothing else.

Whoever connects gets a child of its own to talk to (node/successor.py). The kernel reaps the children, and
the server dies with casemated, its children do not. It must not know what they become.
"""

import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

from node import loaded as loading
from node.loaded import STALE, Loaded, StaleError
from node.successor import Links, succeed
from rpc import lean
from shim import system

# What a shim imports in its life, at the latest when it is needed first; the rest comes with these.
NEEDED = (
    "shim.main",
    "shim.cleanup",
    "shim.contract",
    "shim.vm.maker",
    "shim.vm.domain",
    "libvirt",
    "node.claim",
    "node.spare",
)
BACKLOG = 128


def serve(path: str, parent: int, ready: int, reports: int) -> NoReturn:
    """In a child of casemated's, which is the process `parent`. Until it listens at path nobody waits for it.

    ready: a pipe that is written to then, and closed. reports: a socket for what is asked of the pool.
    """
    status = 1
    try:
        system.end_with_parent(parent)
        system.set_process_name("casemate-zygote")
        begun_s = time.time()
        system.keep_little_memory()
        lean.for_shim()
        for name in NEEDED:
            importlib.import_module(name)
        try:
            loaded = Loaded(begun_s)
        except StaleError as error:
            sys.stderr.write(f"casemated: {error} was changed while it was loaded\n")
            time.sleep(loading.wait_s(begun_s))  # until the clock that files are dated by has moved on
            status = STALE
        else:
            with listen(path) as listener:
                os.write(ready, b"\n")
                os.close(ready)
                status = _fork_for_each(listener, loaded, parent, reports)
    except BaseException:  # noqa: BLE001 - casemated's log is the only place to say it
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def listen(path: str) -> socket.socket:
    """For root alone. What was there before is replaced in one step."""
    listener = socket.socket(socket.AF_UNIX)
    partial = f"{path}.{os.getpid()}"
    try:
        os.fchmod(listener.fileno(), 0o600)  # as in shim/bootstrap.py
        listener.bind(partial)
        listener.listen(BACKLOG)
        os.rename(partial, path)
    except BaseException:
        listener.close()
        system.unlink_if_there(partial)
        raise
    return listener


def _fork_for_each(listener: socket.socket, loaded: Loaded, casemated: int, reports: int) -> int:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: casemated ends us
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    own = dict(os.environ)
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    links = Links(casemated, writing, reports)
    gc.disable()
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page of ours
    while True:
        ready, _, _ = select.select([listener.fileno(), reading], [], [])
        if reading in ready:
            return STALE
        try:
            connection, _ = listener.accept()
        except OSError as error:  # it has left already, or there are no descriptors
            sys.stderr.write(f"casemated: {error}\n")
            continue
        with connection:
            try:
                child = os.fork()
            except OSError as error:
                sys.stderr.write(f"casemated: no process can be forked: {error}\n")
                continue
            if child == 0:
                succeed(connection, loaded, own, links)
