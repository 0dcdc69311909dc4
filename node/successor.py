"""A child of the fork server, from its first moment until it is a pod's daemon.

It holds the connection to `start` alone, so that no client can keep the server waiting. Until it has said
`mine` it may end at any moment and nothing has happened (shim/forkserver.py). It must not know what a daemon
does.
"""

import gc
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from config import load
from config.settings import from_mapping
from node.likeness import take_over
from node.loaded import Loaded
from rpc.errors import CasemateError, FailedPrecondition, PermissionDenied
from shim import daemon, forkserver, system
from shim.bootstrap import Start

MOST_FDS = 1 << 20
HELLO_S = 5.0
# Read when a program or a library begins: what was read here cannot be made what `start` has.
READ_ONCE = ("LD_", "GLIBC_", "MALLOC_", "PYTHON", "LIBVIRT_")
# containerd sets it for what it was told to install (its plugin `opt`), which is nothing that a shim loads.
NOT_COMPARED = "LD_LIBRARY_PATH"


def succeed(connection: socket.socket, loaded: Loaded, own: dict[str, str], stale: int) -> NoReturn:
    """In the forked child. own: the server's environment. stale: a pipe that tells it to begin anew."""
    status = 1
    try:
        _be_nobodys({connection.fileno(), stale})
        _converse(connection, loaded, own, stale)
        status = 0
    except ConnectionResetError:
        status = 0  # `start` has left, and says itself why, or somebody looked whether we are here
    except (OSError, ValueError, KeyError, TypeError) as error:
        # It has shut its side after it had waited for long, or is none of ours. It forks by itself.
        sys.stderr.write(f"casemated: nobody was served: {type(error).__name__}: {error}\n")
    except BaseException:  # noqa: BLE001 - casemated's log is the only place to say it
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _be_nobodys(keep: set[int]) -> None:
    """Nothing of the server's stays but its code."""
    first = 3
    for fd in sorted(keep):
        os.closerange(first, fd)
        first = fd + 1
    os.closerange(first, MOST_FDS)
    system.set_process_name("casemate-start")


def _converse(connection: socket.socket, loaded: Loaded, own: dict[str, str], stale: int) -> None:
    hello, fds = forkserver.receive(connection, time.monotonic() + HELLO_S)
    close_all(fds)
    try:
        pid = _check(connection, hello, own)
        if path := loaded.changed():
            with suppress(BlockingIOError):  # it was said often enough
                os.write(stale, b"\n")
            raise FailedPrecondition(f"casemated runs the code before an update ({path})")
        take_over(pid, int(hello["started"]))
    except CasemateError as error:
        forkserver.send(connection, {"declined": str(error)}, time.monotonic() + HELLO_S)
        return
    os.close(stale)
    forkserver.send(connection, {"ready": os.getpid()}, time.monotonic() + HELLO_S)
    _wear(hello)
    gc.enable()
    words, fds = forkserver.receive(connection, None)
    listener, log = fds
    request = Start.from_words(words["request"])
    settings = from_mapping(words["settings"])
    load.unreported[:] = words["unreported"]
    started_ticks, bound_s = int(words["started_ticks"]), float(words["bound_s"])
    forkserver.send(connection, {"mine": os.getpid()}, time.monotonic() + HELLO_S)
    connection.close()
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    daemon.run(request, settings, socket.socket(fileno=listener), started_ticks, bound_s, "casemated")


def _check(connection: socket.socket, hello: dict[str, Any], own: dict[str, str]) -> int:
    """The pid of a `start` that may ask, and would run the same code. Raises CasemateError."""
    pid, uid = forkserver.peer(connection)
    if uid != os.geteuid():
        raise PermissionDenied(f"user {uid} may not ask")
    if pid != hello["pid"]:
        raise FailedPrecondition("casemated counts processes differently: another PID namespace")
    for name, value in forkserver.code().items():
        if hello.get(name) != value:
            raise FailedPrecondition(f"casemated is another installation: {name} is {value}")
    asked = _read_once(hello["environment"])
    if asked != _read_once(own):
        names = sorted(name for name, _ in asked.items() ^ _read_once(own).items())
        raise FailedPrecondition(f"casemated was started with another {', '.join(dict.fromkeys(names))}")
    return pid


def _read_once(environment: dict[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_ONCE) and name != NOT_COMPARED
    }


def _wear(hello: dict[str, Any]) -> None:
    """containerd's environment of that `start`, and its command line, by which a shim is found."""
    os.environ.clear()
    os.environ.update(hello["environment"])
    time.tzset()
    system.set_command_line([bytes.fromhex(word) for word in hello["argv"]])


def close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
