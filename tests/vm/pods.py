"""What a test says to have a container: run, detached, exec, kill, and where casemate keeps its pod's files.

It knows ctr's command line; what should come out is the test's business.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from bench.ctr import Ctr, Result, Running, Terminal
from bench.instance import Instance
from images import oci
from shim.paths import PodPaths
from tests.vm.builds import VERSIONS
from tests.vm.operator import casemate

FULL = "v2"
"""The containerd the whole list runs on."""

every_version = pytest.mark.parametrize("instance", list(VERSIONS), indirect=True)
"""What is tested on the other containerds, too."""

RUN_S = 60.0
"""A pod's whole life under TCG on a machine that is busy with others takes a fraction of it."""

IMAGE = oci.DEMO
CGROUP_MOUNT = ("--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro")


def prepare(instance: Instance, demo: Path, store: Path) -> None:
    """Import the image, and run it once with runc, so that what containerd opens once in its life is open.

    Pods of the default shape are restored; nothing is made behind a test's back.
    """
    templates = store.parent / "test-templates"
    (instance.config_dir / "config.toml").write_text(
        f'image_dir = "{store}"\ntemplate_dir = "{templates}"\nmake_templates = false\n'
    )
    for name in ("pods", "spares"):
        instance.path(f"/run/casemate/{name}").mkdir(parents=True)
    ctr = Ctr(instance)
    ctr.import_image(demo)
    ctr("run", "--rm", IMAGE, "warm-up", "true").ok()
    built = casemate(instance, "template", "build")
    assert built.returncode == 0, built.stderr
    if "saved" in built.stdout:  # the guest image is a new one: those of old ones go
        casemate(instance, "gc")


TERMINAL_PROGRAM = """\
import os, signal, sys
def show(*_):
    size = os.get_terminal_size(0)
    os.write(1, f'size={size.columns}x{size.lines}\\n'.encode())  # print() may be interrupted
signal.signal(signal.SIGWINCH, show)
print('isatty', *(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)), flush=True)
show()
while (line := input()) != 'quit':
    print(f'echo={line}', flush=True)
sys.exit(7)
"""
"""Says whether its streams are terminals, its terminal's size at start and at every change, and what it
reads.
"""


MOUNT = """\
import ctypes, sys
sys.exit(ctypes.CDLL(None).mount(b"none", b"/mnt", b"tmpfs", 0, None))
"""
"""Does what takes a privilege; the demo's image has no mount(8)."""


FORBIDDEN = """\
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
# keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1)
print("allowed" if libc.syscall(250, 0, -2, 1) > 0 else errno.errorcode[ctypes.get_errno()])
"""
"""Says what comes of a system call that anybody may make, but for who is under a client's own filter."""


class Pods:
    def __init__(self, ctr: Ctr, runtime: str, image: str) -> None:
        self.ctr = ctr
        self.runtime = runtime
        self.image = image

    def argv(self, name: str, command: tuple[str, ...], options: tuple[str, ...]) -> tuple[str, ...]:
        return ("run", "--runtime", self.runtime, *options, self.image, name, *command)

    def run(
        self,
        *command: str,
        options: tuple[str, ...] = (),
        stdin: bytes | IO[bytes] | None = None,
        timeout_s: float = RUN_S,
        name: str | None = None,
    ) -> Result:
        """`ctr run --rm`, to its end."""
        argv = self.argv(name or self.ctr.new_id(), command, ("--rm", *options))
        return self.ctr(*argv, stdin=stdin, timeout_s=timeout_s)

    @contextlib.contextmanager
    def start(
        self, *command: str, options: tuple[str, ...] = (), name: str | None = None
    ) -> Iterator[Running]:
        """`ctr run --rm` in the background, with pipes."""
        name = name or self.ctr.new_id()
        with self.ctr.start(*self.argv(name, command, ("--rm", *options))) as running:
            yield running

    @contextlib.contextmanager
    def terminal(self, *command: str, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
        argv = self.argv(self.ctr.new_id(), command, ("--rm", "--tty"))
        with self.ctr.terminal(*argv, columns=columns, rows=rows) as terminal:
            yield terminal

    @contextlib.contextmanager
    def detached(
        self, *command: str, options: tuple[str, ...] = (), timeout_s: float = RUN_S
    ) -> Iterator[str]:
        """The id of a container that runs in the background; killed and removed at the end of the block."""
        name = self.ctr.new_id()
        self.ctr(*self.argv(name, command, ("--detach", *options)), timeout_s=timeout_s).ok()
        try:
            yield name
        finally:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Kill, wait for the end, delete task and container; fine if some of it is gone already."""
        self.ctr("task", "kill", "--signal", "9", name, timeout_s=60)
        self.ctr("task", "delete", "--force", name, timeout_s=60)
        self.ctr("container", "delete", name).ok()

    def exec(
        self,
        name: str,
        *command: str,
        options: tuple[str, ...] = (),
        stdin: bytes | None = None,
        timeout_s: float = 60.0,
    ) -> Result:
        argv = ("task", "exec", "--exec-id", self.ctr.new_id("e"), *options, name, *command)
        return self.ctr(*argv, stdin=stdin, timeout_s=timeout_s)

    def kill(self, name: str, signal: str = "SIGKILL", *options: str) -> Result:
        return self.ctr("task", "kill", "--signal", signal, *options, name, timeout_s=60)

    def tasks(self) -> list[str]:
        """The lines of `ctr task list`: name, pid, status."""
        return self.ctr("task", "list").ok().out.splitlines()[1:]

    def status(self, name: str) -> str:
        """RUNNING, STOPPED, PAUSED ...; empty if there is no such task."""
        for line in self.tasks():
            columns = line.split()
            if columns[0] == name:
                return columns[-1]
        return ""

    def wait_status(self, name: str, wanted: str, timeout_s: float = 60.0) -> None:
        """Wait for `ctr task list` to say so. ctr has no wait for a task it did not start: hence a bounded
        poll.
        """
        deadline = time.monotonic() + timeout_s
        while (status := self.status(name)) != wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"task {name} is {status or 'gone'}, not {wanted}, after {timeout_s} s")
            time.sleep(0.05)

    # -- casemate's own files -----------------------------------------------------------------------------

    def paths(self, name: str) -> PodPaths:
        """The pod's files as this process reaches them."""
        return PodPaths(self.ctr.namespace, name, self.ctr.instance.path("/run/casemate"))

    def state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.paths(name).state.read_text())
        return state

    def ended_directory(self, name: str) -> Path:
        """What is kept of an ended pod."""
        return self.paths(name).ended

    def wait_state(self, name: str, wanted: str, timeout_s: float = 60.0) -> None:
        """Wait until the pod's state.json says so of its container (for when containerd is away to be
        asked).
        """
        deadline = time.monotonic() + timeout_s
        while (states := {item["id"]: item["state"] for item in self.state(name)["containers"]}).get(
            name
        ) != wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} is not {wanted} after {timeout_s} s: {states}")
            time.sleep(0.05)
