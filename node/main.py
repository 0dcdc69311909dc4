"""casemated: what is optional on a node and makes its pods start faster: the fork server, and the pool.

It holds the fork server's process and puts another one in its place when it ends, and the connections of the
machines that wait in the pool (pool.py); pods neither need it nor notice its end. Beside that it says how
long devices are held (witness.py). It must not import what a
shim imports: that is for the fork server, and one copy is enough.
"""

import fcntl
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from config import places
from config.load import load
from node.loaded import STALE
from node.pool import Pool, memory, plain_orders
from node.witness import Witness
from rpc.errors import AlreadyExists, CasemateError
from shim import forkserver, system
from shim.paths import SPARES

USAGE = """\
usage: casemated
Runs in the foreground. SIGTERM ends it, SIGHUP has it begin anew, with the configuration that is there then.
"""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
# A fork server that lived so long was none that cannot start.
LIVED_S = 30.0
# For a fork server that is busy with pods.
SPARE_S = 1.0
MOST_REPORT_BYTES = 1 << 20
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


def main() -> NoReturn:
    if len(sys.argv) > 1:
        known = sys.argv[1:] in (["-h"], ["--help"])
        (sys.stdout if known else sys.stderr).write(USAGE)
        raise SystemExit(0 if known else 2)
    try:
        Casemated().run()
    except (CasemateError, OSError) as error:
        say(str(error))
        raise SystemExit(1) from error
    raise SystemExit(0)


class Casemated:
    """One for each run directory."""

    def __init__(self) -> None:
        """Raises AlreadyExists, OSError, or InvalidArgument for a wrong configuration."""
        os.umask(0o022)  # as `start` has it; what is secret says so itself
        self._settings = load()
        os.makedirs(places.run_dir(), mode=0o711, exist_ok=True)
        self._lock = os.open(places.run_dir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyExists(f"{places.run_dir()}: another casemated runs") from error
        os.makedirs(os.path.join(places.run_dir(), SPARES), mode=0o711, exist_ok=True)
        self._path = forkserver.server_path()
        self._reports, self._reporters = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._reports.setblocking(False)
        self._pool = Pool(self._make_spare, say, memory)
        for order in plain_orders(self._settings, recalled()):
            self._pool.expect(order)
        self._witness = Witness(self._settings.ledger_dir, say)
        self._waking, waker = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, _noticed)
        self._zygote = 0
        self._ready = -1
        self._pause_s = FIRST_PAUSE_S
        self._begun_s = 0.0
        self._again_s: float | None = None

    def run(self) -> None:
        """Until SIGTERM or SIGINT."""
        if self._settings.node.fork_server:
            self._fork_zygote()
        else:
            say("node.fork_server is false: pods start without")
            notify("READY=1")
        while True:
            self._witness.tend()
            awaited = (self._pool.tend() if self._serves else None, self._again_s, self._witness.due_s)
            again_s = min(each for each in awaited if each is not None)
            left_s = max(again_s - time.monotonic(), 0.0)
            pipes: list[Any] = [self._waking, self._reports, *self._pool.lifelines()]
            if self._ready >= 0:
                pipes.append(self._ready)
            woken, _, _ = select.select(pipes, [], [], left_s)
            if self._ready in woken:
                self._hear_ready()
            if self._waking in woken:
                got = set(os.read(self._waking, 4096))
                if got & {signal.SIGTERM, signal.SIGINT}:
                    break
                if signal.SIGHUP in got:
                    self._begin_anew()
            for lifeline in self._pool.lifelines():
                if lifeline in woken:
                    self._pool.hear(lifeline)
            if self._reports in woken:
                report = json.loads(self._reports.recv(MOST_REPORT_BYTES))
                self._pool.note(report)
                remember(report["order"]["nature"])
            self._reap()
            if self._again_s is not None and time.monotonic() >= self._again_s:
                self._again_s = None
                self._fork_zygote()
        notify("STOPPING=1")
        self._end_zygote()
        self._witness.look()  # the host may be about to end, too

    def _fork_zygote(self) -> None:
        if self._ready >= 0:
            os.close(self._ready)
        self._ready, writing = os.pipe2(os.O_CLOEXEC)
        self._begun_s = time.monotonic()
        casemated = os.getpid()
        self._zygote = os.fork()
        if self._zygote == 0:
            # The lock and the pipes are casemated's: a fork server that outlives it must not hold them.
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            writing, reporters = _keep_open(writing, self._reporters.detach())
            os.environ.pop("NOTIFY_SOCKET", None)
            from node.zygote import serve

            serve(self._path, casemated, writing, reporters)
        os.close(writing)

    @property
    def _serves(self) -> bool:
        """Whether there is a fork server that listens."""
        return bool(self._zygote) and self._ready < 0

    def _make_spare(self, order: dict[str, Any]) -> socket.socket | None:
        """Has the fork server make a machine; None if it is just ending."""
        lifeline = socket.socket(socket.AF_UNIX)
        try:
            lifeline.settimeout(SPARE_S)
            lifeline.connect(self._path)
            forkserver.send(lifeline, {"spare": order}, time.monotonic() + SPARE_S)
        except OSError as error:
            lifeline.close()
            say(f"the fork server makes no machine for the pool: {error}")
            return None
        return lifeline

    def _hear_ready(self) -> None:
        ready = os.read(self._ready, 1)
        os.close(self._ready)
        self._ready = -1
        if ready:
            say(f"the fork server listens at {self._path} (process {self._zygote})")
            notify("READY=1")

    def _reap(self) -> None:
        if not self._zygote:
            return
        pid, status = os.waitpid(self._zygote, os.WNOHANG)
        if not pid:
            return
        self._zygote = 0
        self._pool.drain()  # the next one may have other code
        system.unlink_if_there(self._path)
        code = os.waitstatus_to_exitcode(status)
        if code == STALE:
            self._begin_anew()
        if time.monotonic() - self._begun_s > LIVED_S:
            self._pause_s = FIRST_PAUSE_S
        say(
            f"the fork server has ended ({code}); another one in {self._pause_s:.1f} s, "
            "until then pods do without"
        )
        self._again_s = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _end_zygote(self) -> None:
        self._pool.drain()
        if self._zygote:
            os.kill(self._zygote, signal.SIGKILL)  # it holds nothing; who was served goes on
            os.waitpid(self._zygote, 0)
            self._zygote = 0
        system.unlink_if_there(self._path)

    def _begin_anew(self) -> NoReturn:
        """With the code and the configuration that are there now, as the same process."""
        say("beginning anew")
        notify("RELOADING=1\nMONOTONIC_USEC=" + str(time.monotonic_ns() // 1000))
        self._end_zygote()
        sys.stderr.flush()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a second one must not end what the first one begins
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _keep_open(*kept: int) -> list[int]:
    """Closes every other descriptor but the standard ones. The numbers that the kept ones have then."""
    for number, fd in enumerate(sorted(kept)):
        os.dup2(fd, 3 + number)  # never onto one that is still to be moved, as they are in order
    os.closerange(3 + len(kept), 1 << 16)
    return [3 + sorted(kept).index(fd) for fd in kept]


def _noticed(*_: object) -> None:
    """What woke the loop is read from its pipe."""


def recalled() -> dict[str, Any] | None:
    """The nature of the last `start` that was told of; None if there is none that can be read."""
    try:
        with open(_memory()) as file:
            nature: dict[str, Any] = json.load(file)
            return nature
    except (OSError, ValueError):
        return None


def remember(nature: dict[str, Any]) -> None:
    """For the next casemated of this boot. It saves the first pod a miss: a full disk is no matter."""
    if recalled() == nature:
        return
    partial = _memory() + ".new"
    try:
        os.makedirs(places.cache_dir(), mode=0o700, exist_ok=True)
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(nature, file)
        os.rename(partial, _memory())
    except OSError as error:
        say(f"{partial}: {error.strerror}")


def _memory() -> str:
    return os.path.join(places.cache_dir(), "start.json")


def notify(state: str) -> None:
    """To systemd, where it started us (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def say(line: str) -> None:
    """Journald adds the time."""
    sys.stderr.write(f"casemated: {line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
