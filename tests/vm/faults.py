"""Real faults to inject: programs that exit with words, other shims, small file systems, killed processes.

What should come of them is the tests' business.
"""

import contextlib
import os
import select
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.ctr import Result
from bench.instance import CHECKOUT, SYSTEM_PYTHON_PACKAGES, Instance

QEMU = "/usr/bin/qemu-system-x86_64"
AT_ONCE_S = 20.0
"""An answer that waits for nothing: half a second of client, containerd and shim, on a machine that has no
time for them. Far below any time limit of ours for a guest that does not answer (config/default.toml)."""


def refused(result: Result, *words: str, within_s: float) -> None:
    """One clear error in time: it holds these words, whatever their case, and no traceback."""
    assert result.code != 0, result
    for word in words:
        assert word.lower() in result.err.lower(), f"no {word!r} in: {result}"
    assert "Traceback" not in result.err, result
    assert len(result.err) < 6000, result
    assert result.seconds < within_s, result


def script(instance: Instance, name: str, text: str) -> str:
    """An executable in the instance's working directory; its path."""
    path = instance.work / name
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def exits_at_once(instance: Instance) -> str:
    """A QEMU that is not even able to say what it can do."""
    return script(
        instance, "qemu-dead", "#!/bin/sh\necho 'qemu: the flux capacitor is missing' >&2\nexit 1\n"
    )


def exits_as_machine(instance: Instance) -> str:
    """A QEMU that answers libvirt's questions, and exits when it shall run a guest."""
    return as_machine(instance, "qemu-exits", "echo 'qemu: the flux capacitor is missing' >&2; exit 1")


def hangs_as_machine(instance: Instance) -> str:
    """A QEMU that answers libvirt's questions, and does nothing at all when it shall run a guest."""
    return as_machine(instance, "qemu-hangs", "exec sleep 1000")


def as_machine(instance: Instance, name: str, instead: str) -> str:
    """A QEMU that answers libvirt's questions, and does this when it shall run a guest."""
    text = f"""#!/bin/sh
case " $* " in
*" -machine none,"*|*" -version "*|*" --version "*) exec {QEMU} "$@" ;;
esac
{instead}
"""
    return script(instance, name, text)


def old_qemu(instance: Instance) -> str:
    """Says of itself, on QMP and on the command line, that it is QEMU 2.0."""
    text = f"""#!{os.path.realpath(sys.executable)} -IS
import json, os, socket, sys
words = sys.argv[1:]
if any(word.lstrip("-") == "version" for word in words):
    print("QEMU emulator version 2.0.0"); sys.exit(0)
path = next(word for word in words if "unix:" in word).split("unix:")[1].split(",")[0]
if os.path.exists(path):
    os.unlink(path)
server = socket.socket(socket.AF_UNIX); server.bind(path); server.listen()
child = os.fork() if "-daemonize" in words else 0
if child == 0:
    os.setsid()
    for fd in 0, 1, 2:
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
elif "-pidfile" in words:
    with open(words[words.index("-pidfile") + 1], "w") as file:
        file.write(str(child))
if child:
    os._exit(0)
peer = server.accept()[0].makefile("rw", newline="\\r\\n")
version = {{"qemu": {{"major": 2, "minor": 0, "micro": 0}}, "package": ""}}
peer.write(json.dumps({{"QMP": {{"version": version, "capabilities": []}}}}) + "\\n"); peer.flush()
for line in peer:
    asked = json.loads(line)
    answer = version if asked["execute"] == "query-version" else {{}}
    peer.write(json.dumps({{"return": answer, "id": asked.get("id")}}) + "\\n"); peer.flush()
"""
    return script(instance, "qemu-old", text)


def virtiofsd_exits(instance: Instance) -> str:
    text = "#!/bin/sh\n[ \"$1\" = --version ] && { echo 'virtiofsd 1.13.0'; exit 0; }\n"
    return script(instance, "virtiofsd-exits", text + "echo 'virtiofsd: no more files today' >&2\nexit 1\n")


def shim_with_path(instance: Instance, name: str, path: list[str]) -> str:
    """Another runtime, io.containerd.NAME.v2: our shim with another sys.path."""
    program = instance.base / "bin" / f"containerd-shim-{name}-v2"
    program.write_text(
        f"#!{os.path.realpath(sys.executable)} -IS\nimport sys\nsys.path[1:1] = {path!r}\n"
        "from shim.bootstrap import main\nmain()\n"
    )
    program.chmod(0o755)
    return f"io.containerd.{name}.v2"


def shim_without_libvirt(instance: Instance) -> str:
    return shim_with_path(instance, "nolibvirt", [str(CHECKOUT), sysconfig.get_path("purelib")])


def shim_with_old_libvirt(instance: Instance) -> str:
    directory = instance.work / "old-libvirt"
    directory.mkdir(exist_ok=True)
    (directory / "libvirt.py").write_text(
        "class libvirtError(Exception): pass\ndef getVersion(*_): return 4_000_000\n"
    )
    path = [str(CHECKOUT), str(directory), sysconfig.get_path("purelib"), SYSTEM_PYTHON_PACKAGES]
    return shim_with_path(instance, "oldlibvirt", path)


@contextlib.contextmanager
def small_run_dir(instance: Instance, limit: str) -> Iterator[Path]:
    """A tmpfs of little room on /run/casemate (`limit`: of tmpfs(5)); its path for us."""
    os.makedirs(instance.path("/run/casemate"), exist_ok=True)
    inside(instance, "mount", "-t", "tmpfs", "-o", f"{limit},mode=711", "small", "/run/casemate")
    try:
        yield instance.path("/run/casemate")
    finally:
        unmount(instance, "/run/casemate")


def unmount(instance: Instance, place: str, timeout_s: float = 30.0) -> None:
    """What a shim that is just ending may have open for a moment longer: hence a bounded poll."""
    deadline = time.monotonic() + timeout_s
    argv = instance.inside("umount", place)
    while (done := subprocess.run(argv, capture_output=True, check=False)).returncode != 0:
        assert time.monotonic() < deadline, done.stderr
        time.sleep(0.05)


def inside(instance: Instance, *argv: str) -> None:
    subprocess.run(instance.inside(*argv), check=True)


def output(instance: Instance, *argv: str) -> str:
    """What a program says that is run as inside()."""
    return subprocess.run(instance.inside(*argv), check=True, capture_output=True, text=True).stdout


IN_A_POD = {"qemu-system": b"\0guest=", "virtiofsd": b"\0--fd="}
"""What is among the words of such a program of a pod, and not of one that libvirt asks what it can do."""


def is_of_a_pod(pid: int, name: str) -> bool:
    """Whether it is a pod's process of this name, and has not ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        return comm(pid).startswith(name) and runs(pid) and IN_A_POD[name] in words
    return False


def find_process(instance: Instance, name: str) -> int:
    """The pid of the one process of this name (IN_A_POD) that all pods have together."""
    found = [pid for pid in instance.descendants() if is_of_a_pod(pid, name)]
    if len(found) != 1:
        raise AssertionError(f"{len(found)} processes called {name}: {found}")
    return found[0]


def runs(pid: int) -> bool:
    """Whether it is more than an exit status that nobody has asked for."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


def wait_ended(pid: int, timeout_s: float = 60.0) -> None:
    """Until a process has, which somebody else ends. Nobody tells of another's: hence a bounded poll."""
    deadline = time.monotonic() + timeout_s
    while runs(pid):
        assert time.monotonic() < deadline, f"process {pid} ({comm(pid)}) runs after {timeout_s} s"
        time.sleep(0.02)


def comm(pid: int) -> str:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def wait_process(instance: Instance, name: str, timeout_s: float = 30.0) -> int:
    """The pid of a pod's process of this name (IN_A_POD) as soon as there is one. Nobody announces another's
    child: hence a short poll."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for pid in sorted(instance.descendants()):
            if is_of_a_pod(pid, name):
                return pid
        time.sleep(0.01)
    raise AssertionError(f"no process {name} within {timeout_s} s")


def wait_path(path: Path, timeout_s: float = 30.0) -> None:
    """Until another process has made it, who tells nobody: hence a short poll."""
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} is not there after {timeout_s} s"
        time.sleep(0.01)


def kill_and_wait(pid: int, timeout_s: float = 30.0) -> None:
    """SIGKILL, and its end, by pidfd: that of a shim takes its QEMU along first."""
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        if not select.select([fd], [], [], timeout_s)[0]:
            pytest.fail(f"process {pid} survived SIGKILL for {timeout_s} s")
    finally:
        os.close(fd)


def shim_pid(instance: Instance) -> int:
    """The process that listens on the only shim socket there is."""
    sockets = [
        entry
        for entry in os.scandir(instance.path("/run/containerd/s"))
        if stat.S_ISSOCK(entry.stat().st_mode)
    ]
    assert len(sockets) == 1, [entry.name for entry in sockets]
    name = f"/run/containerd/s/{sockets[0].name}"
    table = Path(f"/proc/{instance.supervisor_pid}/net/unix").read_text().splitlines()
    inodes = {f"socket:[{line.split()[6]}]" for line in table if line.endswith(name)}
    for pid in sorted(instance.descendants() - {instance.containerd_pid}):
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if os.readlink(f"/proc/{pid}/fd/{fd}") in inodes:
                    return pid
    raise AssertionError(f"nobody listens on {name}")
