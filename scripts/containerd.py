"""The containerd that the demo talks to: what listens at the standard address, or else what is started there.

Knows how containerd says that it is ready; must not know what is run in it.
"""

import os
import select
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from scripts.host import executable, run, say
from scripts.manifest import Kind, Manifest, listens, running_daemon, start_time

ADDRESS = Path("/run/containerd/containerd.sock")
# Ours when it is us who start it: nothing of the distribution's /var/lib/containerd is touched.
ROOT = Path("/var/lib/casemate/containerd")
HOME = Path("/run/casemate-containerd")
PID_FILE = HOME / "pid"
LOG = HOME / "containerd.log"
START_S = 30.0
STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CONFIG = f"""\
# Written by `make demo`, which starts containerd where no service manager does. `make uninstall` removes it.
version = 2
root = "{ROOT}"
state = "{HOME}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{ADDRESS}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{HOME}/opt"
"""


@dataclass(frozen=True, slots=True)
class Containerd:
    """One that answers at ADDRESS. stop says how to stop it; empty when it is not ours."""

    version: str
    stop: str = ""


def answers() -> str | None:
    """The version of the containerd at ADDRESS, or None if nothing listens there."""
    if not listens(ADDRESS):
        return None
    ctr = executable("ctr")
    if ctr is None:
        raise FailedPrecondition(
            f"a containerd listens at {ADDRESS} and there is no ctr to speak to it",
            hint="apt-get install containerd",
        )
    words = run([ctr, "--address", ADDRESS, "version"], quiet=True).split()
    return words[len(words) - 1 - words[::-1].index("Version:") + 1]


def ensure(manifest: Manifest) -> Containerd:
    """Use the containerd that is there; where there is none, start the distribution's."""
    if version := answers():
        ours = running_daemon(PID_FILE) is not None
        return Containerd(version, how_to_stop() if ours else "")
    if Path("/run/systemd/system").is_dir():
        say(f"nothing listens at {ADDRESS}: starting the service containerd")
        run(["systemctl", "start", "containerd"], hint="journalctl -u containerd")
        stop = "systemctl stop containerd"
    else:
        say(f"nothing listens at {ADDRESS}: starting the distribution's containerd there")
        start(manifest)
        stop = how_to_stop()
    version = answers()
    if version is None:
        raise Unavailable(f"containerd is up and {ADDRESS} is not")
    return Containerd(version, stop)


def how_to_stop() -> str:
    return f"kill $(cut -d' ' -f1 {PID_FILE})"


def start(manifest: Manifest) -> None:
    """Start containerd as a daemon and wait until it says that it is ready, or why it is not."""
    daemon = executable("containerd")
    if daemon is None:
        raise FailedPrecondition("containerd is not installed", hint="make install")
    if not ADDRESS.parent.exists():
        manifest.record(Kind.SHARED_TREE, ADDRESS.parent)
    for directory in (ROOT, HOME):
        manifest.record(Kind.TREE, directory)
        directory.mkdir(parents=True, exist_ok=True)
    manifest.record(Kind.DAEMON, PID_FILE, "containerd")
    config = HOME / "config.toml"
    config.write_text(CONFIG)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready, LOG.open("ab") as log:
        notify = HOME / "notify"
        notify.unlink(missing_ok=True)
        ready.bind(str(notify))
        process = subprocess.Popen(
            [daemon, "--config", config],
            env={**os.environ, "NOTIFY_SOCKET": str(notify), "PATH": STANDARD_PATH},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
        PID_FILE.write_text(f"{process.pid} {start_time(process.pid)}\n")
        wait_ready(process, ready)
        notify.unlink()
    # It outlives us on purpose; without this the interpreter would warn that its child still runs.
    process.returncode = 0


def wait_ready(process: "subprocess.Popen[bytes]", ready: socket.socket) -> None:
    """containerd sends READY=1, as to a service manager, once its socket is served."""
    deadline = time.monotonic() + START_S
    end = os.pidfd_open(process.pid)
    try:
        while True:
            left = max(deadline - time.monotonic(), 0)
            readable, _, _ = select.select([ready.fileno(), end], [], [], left)
            if ready.fileno() not in readable:
                break
            if b"READY=1" in ready.recv(4096):
                return
    finally:
        os.close(end)
    process.kill()
    process.wait()
    last_words = "\n".join(LOG.read_text(errors="replace").splitlines()[-10:])
    if readable:
        raise FailedPrecondition(
            "containerd ended instead of starting", details=last_words, hint=f"see {LOG}"
        )
    raise DeadlineExceeded(f"containerd was not ready after {START_S:.0f} s", details=last_words)
