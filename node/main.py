"""casemated: what is optional on a node and makes its pods start faster. Today that is the fork server.

It holds one process and puts another one in its place when it ends; pods neither need it nor notice its end.
It must not import what a shim imports: that is for the fork server, and one copy is enough.
"""

import fcntl
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

from config import places
from config.load import load
from node.loaded import STALE
from rpc.errors import AlreadyExists, CasemateError
from shim import forkserver, system

USAGE = """\
usage: casemated
Runs in the foreground. SIGTERM ends it, SIGHUP has it begin anew, with the configuration that is there then.
"""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 60.0
# A fork server that lived so long was none that cannot start.
LIVED_S = 30.0
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
        self._settings = load()
        os.makedirs(places.run_dir(), mode=0o711, exist_ok=True)
        self._lock = os.open(places.run_dir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyExists(f"{places.run_dir()}: another casemated runs") from error
        self._path = forkserver.server_path()
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
            say("node.fork_server is false: there is nothing to do")
            notify("READY=1")
        while True:
            left_s = None if self._again_s is None else max(self._again_s - time.monotonic(), 0.0)
            pipes = [self._waking] + ([self._ready] if self._ready >= 0 else [])
            woken, _, _ = select.select(pipes, [], [], left_s)
            if self._ready in woken:
                self._hear_ready()
            if self._waking in woken:
                got = set(os.read(self._waking, 4096))
                if got & {signal.SIGTERM, signal.SIGINT}:
                    break
                if signal.SIGHUP in got:
                    self._begin_anew()
            self._reap()
            if self._again_s is not None and time.monotonic() >= self._again_s:
                self._again_s = None
                self._fork_zygote()
        notify("STOPPING=1")
        self._end_zygote()

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
            os.closerange(3, writing)
            os.closerange(writing + 1, 1 << 16)
            os.environ.pop("NOTIFY_SOCKET", None)
            from node.zygote import serve

            serve(self._path, casemated, writing)
        os.close(writing)

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


def _noticed(*_: object) -> None:
    """What woke the loop is read from its pipe."""


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
