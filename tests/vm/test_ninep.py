"""casemate's file server as its process is: confined to one directory, with few powers, ended by what no file
server does. What it serves, and how, tests/unit/shim/ninep has; through a guest's kernel, tests/testbed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.vm.files import NINEP
from tests.unit.shim.ninep.client import Client, Refused

# As the shim does it: a directory that is a mount, in a mount namespace of its own.
STARTER = """
import os, subprocess, sys
from shim import system
system.unshare(system.CLONE_NEWNS)
system.mount("none", "/", None, system.MS_REC | system.MS_PRIVATE)
system.mount(sys.argv[1], sys.argv[1], None, system.MS_BIND)
system.mount("none", sys.argv[1], None, system.MS_SHARED)
if len(sys.argv) > 4:
    exec(sys.argv[4])
options = [f"--socket-fd={sys.argv[3]}", "--most-files=256"]
os.execv(sys.executable, [sys.executable, "-IBSs", sys.argv[2], *options, sys.argv[1]])
"""
CHECKOUT = NINEP.parents[2]


class Confined:
    def __init__(
        self, process: subprocess.Popen[bytes], control: socket.socket, undo: contextlib.ExitStack
    ) -> None:
        self.process = process
        self.control = control
        self._undo = undo

    def client(self) -> Client:
        ours, theirs = socket.socketpair()
        self._undo.enter_context(ours)
        ours.settimeout(20)
        with theirs:
            socket.send_fds(self.control, [b"c"], [theirs.fileno()])
        client = Client(ours, self.process)
        client.begin()
        return client


@contextlib.contextmanager
def served(directory: Path) -> Iterator[Confined]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    argv = [sys.executable, "-c", STARTER, str(directory), str(NINEP), str(theirs.fileno())]
    with contextlib.ExitStack() as undo:
        undo.enter_context(ours)
        process = subprocess.Popen(argv, cwd=CHECKOUT, pass_fds=[theirs.fileno()])
        undo.enter_context(process)
        undo.callback(process.kill)
        theirs.close()
        yield Confined(process, ours, undo)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "served").mkdir()
    (tmp_path / "served/file").write_text("hello")
    return tmp_path / "served"


def test_it_serves_and_ends_with_its_shim(tree: Path) -> None:
    with served(tree) as server:
        for client in (server.client(), server.client()):
            fid = client.walk("file")
            client.open(fid)
            assert client.read(fid, 10) == b"hello"
        server.control.close()
        assert server.process.wait(20) == 0


def test_a_client_that_talks_nonsense_loses_its_own_connection(tree: Path) -> None:
    with served(tree) as server:
        bad, good = server.client(), server.client()
        bad.connection.sendall(b"\xff" * 64)
        with pytest.raises((EOFError, ConnectionResetError)):
            bad.receive()
        assert good.attributes(good.walk("file"))["size"] == 5


def test_of_the_host_there_is_the_directory_and_nothing_else(tree: Path) -> None:
    with served(tree) as server:
        server.client()
        proc = Path(f"/proc/{server.process.pid}")
        mounts = [line.split()[4] for line in (proc / "mountinfo").read_text().splitlines()]
        assert mounts == ["/"]
        assert os.listdir(proc / "root") == ["file"]
        for kind in ("net", "ipc", "uts", "mnt"):
            assert os.readlink(proc / f"ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")


def test_nothing_is_above_its_working_directory(tree: Path) -> None:
    """It is uid 0, and what may be written in /proc without a capability is the host's (core_pattern)."""
    with served(tree) as server:
        server.client()
        cwd = Path(f"/proc/{server.process.pid}/cwd")
        # As the process itself would be led: a path that passes a mount's root stays there.
        for above in ("..", "../..", "../../.."):
            assert os.path.samefile(cwd, cwd / above)
        assert sorted(os.listdir(cwd)) == sorted(os.listdir(f"/proc/{server.process.pid}/fd"))


def test_it_has_root_s_powers_over_files_alone_and_a_filter(tree: Path) -> None:
    with served(tree) as server:
        server.client()
        lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
        status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        # chown, dac_override, dac_read_search, fowner, fsetid, setfcap
        allowed = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 31
        for name in ("CapPrm", "CapEff", "CapBnd"):
            assert int(status[name], 16) & ~allowed == 0
        assert int(status["CapInh"], 16) == int(status["CapAmb"], 16) == 0
        assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")


FORBIDDEN = {
    "exec": "os.execv('/bin/true', ['true'])",
    "fork": "os.fork()",
    "socket": "socket.socket()",
    "unshare": "system.unshare(system.CLONE_NEWNS)",
    "mount": "system.mount('none', '/', None, system.MS_REMOUNT)",
    "kill": "os.kill(1, 0)",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_no_file_server_does_ends_it(tree: Path, what: str) -> None:
    code = f"""
import os, socket, sys, threading
from shim import system
from shim.ninep import confine
confine.enter(sys.argv[1])
confine.give_up_powers()
thread = threading.Thread(target=lambda: None)
thread.start()  # threads may be
thread.join()
sys.stdout.write("confined\\n")
sys.stdout.flush()
{FORBIDDEN[what]}
"""
    argv = [sys.executable, "-c", STARTER, str(tree), "", "0", code]
    done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, timeout=60, check=False)
    assert done.stdout == b"confined\n", done.stderr
    assert done.returncode == -signal.SIGSYS


def test_a_link_out_of_the_directory_leads_nowhere(tree: Path) -> None:
    (tree / "out").symlink_to("/secret")
    (tree / "up").symlink_to("../secret")
    with served(tree) as server:
        client = server.client()
        for name in ("out", "up"):
            fid = client.walk(name)
            with pytest.raises(Refused):
                client.open(fid)
