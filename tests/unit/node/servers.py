"""A real fork server whose children write down what they have become, and clients that are processes."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[3]
WAIT_S = 60.0

# Stands for shim.daemon.run, which needs a containerd: says what the process that would run it has.
SERVER = """\
import json, os, resource, signal, sys
from shim import daemon, system

def text(path):
    with open(path) as file:
        return file.read()

def opened():
    for fd in os.listdir("/proc/self/fd"):
        try:
            yield os.readlink(f"/proc/self/fd/{fd}").partition("[")[0]
        except FileNotFoundError:
            continue  # the listing's own

def run(request, settings, listener, started_ticks, bound_s, forked_by):
    mask = os.umask(0)
    facts = {
        "environment": dict(os.environ), "umask": mask, "started": started_ticks, "forked_by": forked_by,
        "limits": [resource.getrlimit(limit) for limit in range(16)],
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "oom": text("/proc/self/oom_score_adj").strip(),
        "cgroup": text("/proc/self/cgroup"), "affinity": sorted(os.sched_getaffinity(0)),
        "cmdline": text("/proc/self/cmdline").rstrip("\\0"),
        "environ": text("/proc/self/environ").strip("\\0"),
        "signals": [line for line in text("/proc/self/status").splitlines() if line.startswith("Sig")],
        "fds": sorted(opened()),
        "request": request.words(), "profile": settings.default_profile, "pid": os.getpid(),
        "session": os.getsid(0),
    }
    connection, _ = listener.accept()
    with connection:
        connection.sendall(json.dumps(facts).encode())

import importlib.util
from node import zygote
from node.main import main

daemon.run = run
if importlib.util.find_spec("libvirt") is None:  # it is Debian's, and not needed here
    zygote.NEEDED = tuple(name for name in zygote.NEEDED if name != "libvirt")
main()
"""

CLIENT = """\
import json, os, resource, sys
from shim import bootstrap, forkserver, system
from config.load import load

path = sys.argv[1]
os.umask(int(sys.argv[2], 8))
if sys.argv[3]:
    forkserver.READY_S = forkserver.MINE_S = float(sys.argv[3])
arguments = bootstrap.Arguments(["-namespace", "ns", "-address", "/a", "-id", "web", "start"])
request = bootstrap.Start(arguments, "/bundle", "web", {"hostname": "web"})
ticks = system.start_time("self")
offer = forkserver.ask(ticks, bootstrap.hand_over_words(request, load()))
listener, log = bootstrap.listen(path), os.open(os.devnull, os.O_WRONLY)
taken = offer.take({"bound_s": 1.0}, (listener.fileno(), log))
print(json.dumps({"taken": taken, "remark": offer.remark, "pid": os.getpid(), "ticks": ticks,
    "limits": [resource.getrlimit(limit) for limit in range(16)],
    "cgroup": open("/proc/self/cgroup").read(), "environment": dict(os.environ)}))
"""


def environment(run: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    places = {"CASEMATE_RUN_DIR": str(run), "CASEMATE_LEDGER_DIR": str(run.parent / "ledger")}
    return {**kept, "PYTHONPATH": str(CHECKOUT), **places, **(more or {})}


class Server:
    """casemated as a process. log: what it wrote to standard error."""

    def __init__(self, run: Path, wrapper: Sequence[str] = (), more: Mapping[str, str] | None = None) -> None:
        self.run = run
        self.log = run.parent / f"casemated-{os.urandom(4).hex()}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*wrapper, sys.executable, "-c", SERVER],
                env=environment(run, more),
                cwd="/",
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        try:
            self.zygote = self.wait_serving()
        except BaseException:
            self.close()
            raise

    def wait_serving(self, count: int = 1) -> int:
        """The fork server's pid, once it says for the count-th time that it listens."""
        import time

        deadline = time.monotonic() + WAIT_S
        while (text := self.log.read_text()).count("the fork server listens at") < count:
            assert time.monotonic() < deadline, text
            assert self.process.poll() is None, text
            time.sleep(0.01)
        return int(text.rstrip().rpartition("(process ")[2].partition(")")[0])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(WAIT_S)


@contextlib.contextmanager
def serving(
    run: Path, wrapper: Sequence[str] = (), more: Mapping[str, str] | None = None
) -> Iterator[Server]:
    server = Server(run, wrapper, more)
    try:
        yield server
    finally:
        server.close()


def start(
    run: Path,
    *,
    wrapper: Sequence[str] = (),
    more: Mapping[str, str] | None = None,
    umask: int = 0o22,
    patience_s: float | None = WAIT_S / 2,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What a client says, and what the daemon that it got, if it got one, has become. patience_s: how long it
    waits for an answer, on a machine that may be slow; None: as long as a `start` does.
    """
    import socket

    path = run.parent / f"s{os.urandom(4).hex()}"
    done = subprocess.run(
        [*wrapper, sys.executable, "-c", CLIENT, str(path), oct(umask), str(patience_s or "")],
        env=environment(run, more),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    if not said["taken"]:
        path.unlink()
        return said, None
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(str(path))
        data = b""
        while more_data := connection.recv(1 << 16):
            data += more_data
    path.unlink()
    facts: dict[str, Any] = json.loads(data)
    wait_gone(facts["pid"])
    return said, facts


def wait_gone(pid: int) -> None:
    """No zombie either: whoever is to reap it has done so."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([pidfd], [], [], WAIT_S)[0]
    finally:
        os.close(pidfd)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
        assert select.select([pidfd], [], [], WAIT_S)[0]
    finally:
        os.close(pidfd)
