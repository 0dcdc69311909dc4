"""A private containerd with this checkout's shim on its PATH, for tests and benchmarks.

Every path inside is the one a user has (/run/containerd, /run/casemate): the supervisor mounts a /run
of its own. It must not know which test or benchmark uses it, nor how containerd was built.
"""

import contextlib
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench import supervisor
from config.places import CONFIG_DIR_VARIABLE
from rpc.errors import Unavailable

CHECKOUT = Path(__file__).resolve().parent.parent
RUNTIME = "io.containerd.casemate.v2"
SYSTEM_PYTHON_PACKAGES = "/usr/lib/python3/dist-packages"
"""Where Debian keeps python3-libvirt, which PyPI does not have as a binary."""

CONFIG = """\
version = 2
root = "{root}"
state = "/run/containerd"
disabled_plugins = [
  {without_cri}"io.containerd.tracing.processor.v1.otlp",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.blockfile",
]
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{opt}"
"""
WITHOUT_CRI = '"io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri", '

LAUNCHER = """\
#!{python} -IS
import sys
sys.path[1:1] = {path!r}
from {module} import main
main()
"""
EXECUTABLES = {"containerd-shim-casemate-v2": "shim.bootstrap", "casemated": "node.main"}


CONTAINERD_S = 60.0
SUPERVISOR_S = 60.0
"""What takes it some hundredths of a second, on a machine that has no time for it."""


class InstanceError(Unavailable):
    """The private containerd did not do what it should; the text carries its own last words."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """One containerd: what the tests call it, its version, and the directory of its executables."""

    name: str
    version: str
    directory: Path

    def __getitem__(self, program: str) -> str:
        return str(self.directory / program)


def system_binaries() -> Binaries | None:
    """The distribution's containerd, or None where it is not installed."""
    path = shutil.which("containerd")
    return None if path is None else containerd_in(Path(path).parent)


def containerd_in(directory: Path) -> Binaries | None:
    """The containerd of a directory of executables, or None where there is none."""
    path = shutil.which("containerd", path=str(directory))
    if path is None:
        return None
    words = subprocess.run([path, "--version"], check=True, capture_output=True, text=True).stdout.split()
    return Binaries("system", words[2].lstrip("v").partition("~")[0], directory)


def launcher(checkout: Path, module: str) -> str:
    """What stands for an installed executable: the base interpreter of whoever runs us, a checkout, our
    packages.
    """
    path = [str(checkout), sysconfig.get_path("purelib"), SYSTEM_PYTHON_PACKAGES]
    return LAUNCHER.format(python=os.path.realpath(sys.executable), path=path, module=module)


class Instance:
    """One containerd, its supervisor, and a working directory that both sides see under the same path.

    checkout: whose shim it finds. without_mounts: what of the host's mounts it shall not see. more_path:
    where it looks for executables when it does not find them elsewhere. cri: configuration of its CRI plugin,
    which it does without if there is none; {base} in it stands for the directory. prepared: is called with
    this before containerd starts.
    """

    def __init__(
        self,
        binaries: Binaries,
        environment: Mapping[str, str] | None = None,
        *,
        checkout: Path = CHECKOUT,
        without_mounts: Sequence[str] = (),
        more_path: Sequence[str] = (),
        cri: str = "",
        prepared: Callable[[Path], None] | None = None,
    ) -> None:
        self.binaries = binaries
        self.checkout = checkout
        self.without_mounts = tuple(without_mounts)
        self.more_path = tuple(more_path)
        self.cri = cri
        self.prepared = prepared
        self.environment = dict(environment or {})
        self.base = Path(tempfile.mkdtemp(prefix="casemate-", dir="/var/tmp"))
        self.log = self.base / "containerd.log"
        self.config_dir = self.base / "etc"
        self.work = self.base / "work"
        self.containerd_pid = 0
        self.supervisor_pid = 0
        self._lines = b""
        self._exits: dict[int, int] = {}

    # -- life -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            for name in ("bin", "etc/config.d", "work", "tmp", "root", "opt"):
                (self.base / name).mkdir(parents=True)
            self.base.chmod(0o711)  # a container's user may have to traverse it to a bind mount
            for name, module in EXECUTABLES.items():
                executable = self.base / "bin" / name
                executable.write_text(launcher(self.checkout, module))
                executable.chmod(0o755)
            config = CONFIG.format(
                root=self.base / "root",
                opt=self.base / "opt",
                without_cri="" if self.cri else WITHOUT_CRI,
            )
            config += self.cri.replace("{base}", str(self.base))
            (self.base / "containerd.toml").write_text(config)
            if self.prepared is not None:
                self.prepared(self.base)
            self._process = subprocess.Popen(
                [sys.executable, "-I", supervisor.__file__, *self.without_mounts],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            self.supervisor_pid = self._await("ready", SUPERVISOR_S)["pid"]
            self.start()
            undo.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything below the supervisor and forget the directory. The mounts end with its namespace."""
        process = getattr(self, "_process", None)
        if process is not None:
            if self.containerd_pid:
                self.stop()
            process.stdin.close()
            process.wait(30)
            process.stdout.close()
        shutil.rmtree(self.base)

    def start(self) -> None:
        """Start containerd and wait until it is ready."""
        argv = [self.binaries["containerd"], "--config", str(self.base / "containerd.toml")]
        self.containerd_pid = self.spawn_ready(argv, CONTAINERD_S)

    def spawn_ready(self, argv: list[str], timeout_s: float, log: Path | None = None) -> int:
        """Start a daemon as spawn() does and wait until it says that it is ready (sd_notify(3)). Its pid.

        Raises InstanceError with its last words.
        """
        address = str(self.base / "notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(address)
            try:
                pid = self.spawn(argv, {"NOTIFY_SOCKET": address}, log)
                deadline = time.monotonic() + timeout_s
                while b"READY=1" not in (words := self._notified(notify, pid, deadline)):
                    if not words:
                        raise InstanceError(f"{argv[0]} did not start:\n{self.log_tail(log=log)}")
            finally:
                os.unlink(address)
        return pid

    def _notified(self, notify: socket.socket, pid: int, deadline: float) -> bytes:
        """The next datagram; empty when the process ended or the deadline passed."""
        output = self._process.stdout
        assert output is not None
        while pid not in self._exits:
            left = deadline - time.monotonic()
            readable, _, _ = select.select([notify.fileno(), output.fileno()], [], [], max(left, 0))
            if notify.fileno() in readable:
                return notify.recv(4096)
            if not readable:
                return b""
            self._read_messages()
        return b""

    def stop(self, timeout_s: float = CONTAINERD_S) -> None:
        """SIGTERM containerd, and wait for its end. Containers and their shims go on."""
        self.signal(15)
        self.wait_exit(self.containerd_pid, timeout_s)
        self.containerd_pid = 0

    def restart(self) -> None:
        self.stop()
        self.start()

    def signal(self, number: int) -> None:
        if not self.containerd_pid:  # 0 would be our own process group
            raise InstanceError(f"containerd does not run:\n{self.log_tail()}")
        # a containerd that has ended already is reported by wait_exit, with its log
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.containerd_pid, number)

    def configure(self, toml: str) -> None:
        """What an operator would write to a file of /etc/casemate/config.d, instead of what was there."""
        (self.config_dir / "config.d" / "test.toml").write_text(toml)

    def clear_config(self) -> None:
        (self.config_dir / "config.d" / "test.toml").unlink(missing_ok=True)

    # -- processes in its namespaces ---------------------------------------------------------------------

    def env(self) -> dict[str, str]:
        """The environment of containerd, of what it starts, and of ctr."""
        standard = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin")
        path = (str(self.base / "bin"), str(self.binaries.directory), *standard, *self.more_path)
        return {
            "PATH": ":".join(path),
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TMPDIR": str(self.base / "tmp"),
            CONFIG_DIR_VARIABLE: str(self.config_dir),
            **self.environment,
        }

    def spawn(
        self, argv: list[str], environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> int:
        """Start a process below the supervisor; its output goes to `log`, else to containerd's. Its pid."""
        request = {
            "argv": argv,
            "env": {**self.env(), **(environment or {})},
            "log": str(log or self.log),
            "cwd": "/",
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return int(self._await("started", SUPERVISOR_S)["pid"])

    def inside(self, *argv: str) -> list[str]:
        """The command that runs `argv` in the namespaces of this containerd."""
        return ["nsenter", f"--target={self.supervisor_pid}", "--mount", "--net", "--wdns=/", *argv]

    def path(self, absolute: str | Path) -> Path:
        """How we reach a path of this containerd's mount namespace."""
        return Path(f"/proc/{self.supervisor_pid}/root{absolute}")

    def wait_exit(self, pid: int, timeout_s: float) -> int:
        deadline = time.monotonic() + timeout_s
        while pid not in self._exits:
            if not self._poll_messages(deadline):
                raise InstanceError(f"process {pid} did not end within {timeout_s} s:\n{self.log_tail()}")
        return self._exits[pid]

    def descendants(self) -> set[int]:
        return supervisor.descendants(self.supervisor_pid)

    def log_tail(self, lines: int = 40, log: Path | None = None) -> str:
        path = log or self.log
        if not path.exists():
            return "(no log)"
        text = path.read_text(errors="replace").splitlines()
        return "\n".join([line for line in text if " plugin" not in line][-lines:])

    # -- the supervisor's messages ------------------------------------------------------------------------

    def _messages(self) -> Iterator[dict[str, int | str]]:
        while b"\n" in self._lines:
            line, self._lines = self._lines.split(b"\n", 1)
            yield json.loads(line)

    def _read_messages(self) -> list[dict[str, int | str]]:
        assert self._process.stdout is not None
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            raise InstanceError(f"the supervisor ended (exit code {self._process.wait()})")
        self._lines += data
        others = []
        for message in self._messages():
            if message["event"] == "exit":
                self._exits[int(message["pid"])] = int(message["status"])
                continue
            if message["event"] == "started":  # whoever had this pid before, it is another one's now
                self._exits.pop(int(message["pid"]), None)
            others.append(message)
        return others

    def _poll_messages(self, deadline: float) -> bool:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], max(deadline - time.monotonic(), 0))
        if readable:
            self._read_messages()
        return bool(readable)

    def _await(self, event: str, timeout_s: float) -> dict[str, int]:
        deadline = time.monotonic() + timeout_s
        assert self._process.stdout is not None
        while True:
            readable, _, _ = select.select(
                [self._process.stdout], [], [], max(deadline - time.monotonic(), 0)
            )
            if not readable:
                raise InstanceError(f"the supervisor did not say {event!r} within {timeout_s} s")
            for message in self._read_messages():
                if message["event"] == event:
                    return message  # type: ignore[return-value]
