"""A child of the fork server, from its first moment until it is a pod's daemon.

It holds the connection to `start` alone, so that no client can keep the server waiting. Until it has said
`mine` it may end at any moment and nothing has happened (shim/forkserver.py). It must not know what a daemon
does.
"""

import gc
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from config import load
from config.settings import Settings, from_mapping
from node.likeness import Likeness
from node.loaded import Loaded
from rpc.errors import CasemateError, FailedPrecondition, PermissionDenied
from shim import daemon, forkserver, system
from shim.bootstrap import Start

TYPE_CHECKING = False
if TYPE_CHECKING:
    from node.claim import Claimed

SPARE = "spare"
MOST_FDS = 1 << 20
HELLO_S = 5.0
# Read when a program or a library begins: what was read here cannot be made what `start` has.
READ_ONCE = ("LD_", "GLIBC_", "MALLOC_", "PYTHON", "LIBVIRT_")
# containerd sets it for what it was told to install (its plugin `opt`), which is nothing that a shim loads.
NOT_COMPARED = "LD_LIBRARY_PATH"


@dataclass(frozen=True, slots=True)
class Links:
    """To casemated, of which this is the pid. stale: a pipe that tells it to begin anew. reports: a socket
    that takes what was asked of the pool."""

    casemated: int
    stale: int
    reports: int


def succeed(connection: socket.socket, loaded: Loaded, own: dict[str, str], links: Links) -> NoReturn:
    """In the forked child. own: the server's environment."""
    status = 1
    try:
        _be_nobodys({connection.fileno(), links.stale, links.reports})
        _converse(connection, loaded, own, links)
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


def _converse(connection: socket.socket, loaded: Loaded, own: dict[str, str], links: Links) -> None:
    hello, fds = forkserver.receive(connection, time.monotonic() + HELLO_S)
    close_all(fds)
    if SPARE in hello:
        _be_spare(connection, hello[SPARE], links)
    try:
        pid = _check(connection, hello, own)
        if path := loaded.changed():
            with suppress(BlockingIOError):  # it was said often enough
                os.write(links.stale, b"\n")
            raise FailedPrecondition(f"casemated runs the code before an update ({path})")
        alike = Likeness(pid, int(hello["started"]))
        request, settings = Start.from_words(hello["request"]), from_mapping(hello["settings"])
        claimed = _claim(hello, request, settings, alike, links)
        if claimed is None:
            alike.take_over()
        alike.check_alive()
        alike.close()
    except CasemateError as error:
        forkserver.send(connection, {"declined": str(error)}, time.monotonic() + HELLO_S)
        return
    forkserver.send(connection, {"ready": os.getpid()}, time.monotonic() + HELLO_S)
    words, fds = forkserver.receive(connection, None)
    listener, log = fds
    bound_s = float(words["bound_s"])
    if claimed is not None:
        if claimed.hand_over(connection, listener, bound_s):
            return
        raise ConnectionError("the machine of the pool has ended")  # `start` sees the end, and forks
    for fd in (links.stale, links.reports):
        os.close(fd)
    _wear(hello)
    gc.enable()
    load.unreported[:] = hello["unreported"]
    forkserver.send(connection, {"mine": os.getpid()}, time.monotonic() + HELLO_S)
    connection.close()
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    listening = socket.socket(fileno=listener)
    daemon.run(request, settings, listening, int(hello["started"]), bound_s, "casemated")


def _claim(
    hello: dict[str, Any], request: Start, settings: Settings, alike: Likeness, links: Links
) -> "Claimed | None":
    """A machine of the pool, if the operator keeps any of the kind. casemated is told in any case."""
    if not any(settings.node.pool.values()):
        return None
    from node.claim import claim, order_of

    order = order_of(request, settings, alike)
    if order is None:
        return None
    claimed, why = claim(order, request, hello, alike)
    report = {"order": order.words(), "digest": order.digest, "why": why}
    with socket.socket(fileno=os.dup(links.reports)) as reports, suppress(BlockingIOError, ConnectionError):
        reports.send(json.dumps(report).encode(), socket.MSG_DONTWAIT)  # casemated may have enough to do
    if why:
        request.remarks.append(f"not from the pool: {why}")
    return claimed


def _be_spare(connection: socket.socket, words: dict[str, Any], links: Links) -> None:
    """Not for a `start`, but for casemated itself, whose end of the connection is the spare's life."""
    pid, uid = forkserver.peer(connection)
    if (pid, uid) != (links.casemated, os.geteuid()):
        raise PermissionDenied(f"process {pid} of user {uid} is not casemated")
    for fd in (links.stale, links.reports):
        os.close(fd)
    from node.spare import live

    live(connection, words)


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
