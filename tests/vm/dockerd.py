"""Docker Engine beside a containerd of the tests: its daemon with this checkout's runtime, and its client.

It knows docker's command line; what should come of it is the test's business.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.ctr import NAMESPACE as CTR_NAMESPACE
from bench.ctr import Client, Ctr, CtrFailed, CtrTimeout, Result, Running
from bench.instance import RUNTIME, Instance
from images import oci
from tests.vm import builds, census

IMAGE = oci.DEMO
CONTAINERD = "v1.7"
"""The line that Debian's Docker is made for."""
NAMESPACE = "moby"
"""Of containerd's, where Docker has its containers."""
CGROUPS = f"{CTR_NAMESPACE}-docker"
"""Of this process alone, as there may be other tests on this machine."""
SOCKET = "unix:///run/docker.sock"
DAEMON_S = 60.0
RUN_S = 60.0
_numbers = itertools.count(1)


class Docker(Client):
    """A dockerd in the namespaces of an instance, whose containerd it uses."""

    def __init__(self, instance: Instance) -> None:
        content = builds.docker()
        super().__init__(instance)
        self._daemon = str(content / "usr/sbin/dockerd")
        self._client = str(content / "usr/bin/docker")
        self._path = f"{content}/usr/sbin:{content}/usr/bin"
        self.ctr = Ctr(instance, NAMESPACE, CGROUPS)
        """For a census: what containerd has of Docker's."""
        self.pid = 0

    def serve(self, *options: str) -> None:
        """Returns when it serves. Raises InstanceError with its last words."""
        argv = [
            self._daemon,
            "--containerd=/run/containerd/containerd.sock",
            f"--data-root={self.instance.base}/docker",
            f"--host={SOCKET}",
            f"--default-runtime={RUNTIME}",
            "--exec-opt=native.cgroupdriver=cgroupfs",  # as on every host, with systemd or without
            f"--cgroup-parent=/{CGROUPS}",
            *options,
        ]
        path = f"{self.instance.env()['PATH']}:{self._path}"
        self.pid = self.instance.spawn_ready(["env", f"PATH={path}", *argv], DAEMON_S)

    def stop(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.pid, number)
        self.instance.wait_exit(self.pid, DAEMON_S)
        self.pid = 0

    def is_own(self, left: str) -> bool:
        """Whether a line of a census is of the daemon itself, as with any runtime: it takes away the names of
        network namespaces a minute later, and may have been started anew meanwhile.
        """
        return " /run/docker/" in left or f" {self._daemon} " in left

    def command(self, *argv: str) -> list[str]:
        return self.instance.inside(self._client, f"--host={SOCKET}", *argv)

    def __call__(self, *argv: str, stdin: bytes | None = None, timeout_s: float = RUN_S) -> Result:
        """docker to its end. stdin is empty unless given."""
        began = time.monotonic()
        with self.start(*argv) as running:
            if stdin:
                running.write(stdin)
            done = running.finish(timeout_s)
        return Result(argv, done.code, done.stdout, done.stderr, time.monotonic() - began)

    def out(self, *argv: str) -> str:
        """What a command that goes well has to say, without the last end of line."""
        return self(*argv).ok().out.removesuffix("\n")

    def json(self, *argv: str) -> Any:
        return json.loads(self.out(*argv))

    def run(self, *argv: str, timeout_s: float = RUN_S) -> Result:
        """`docker run --rm`, to its end. argv: options, IMAGE and the command."""
        return self("run", "--rm", *argv, timeout_s=timeout_s)

    @contextlib.contextmanager
    def detached(self, *command: str, options: Sequence[str] = ()) -> Iterator[str]:
        """The name of a container that runs in the background; removed at the end of the block."""
        name = f"casemate{next(_numbers)}"
        try:
            self("run", "--detach", "--name", name, *options, IMAGE, *command).ok()
            yield name
        finally:
            self("rm", "--force", "--volumes", name).ok()

    def beside(self, script: str, *argv: str) -> str:
        """What a Python program of the host's says that is where dockerd is."""
        command = self.instance.inside(sys.executable, "-c", script, *argv)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @contextlib.contextmanager
    def serving(self, script: str) -> Iterator[Running]:
        """Such a program in the background."""
        with self._started(self.instance.inside(sys.executable, "-c", script)) as running:
            yield running

    def exec(self, name: str, *command: str) -> str:
        """What it wrote, if it went well."""
        return self("exec", name, *command).ok().out

    def wait_said(self, name: str, words: str, timeout_s: float = 60.0) -> None:
        """Until its log has a line of these words, or one that ends so."""
        with self.start("logs", "--follow", name) as log:
            log.read_until(f"{words}\n".encode(), timeout_s)

    def inspect(self, name: str) -> dict[str, Any]:
        (found,) = self.json("inspect", name)
        about: dict[str, Any] = found
        return about

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> None:
        """Docker's client has no wait for everything: hence a bounded poll."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise CtrTimeout(f"not so within {timeout_s} s: {what}")
            time.sleep(0.2)


def failure(result: Result) -> str:
    """What docker said of a call that failed."""
    if result.code == 0:
        raise CtrFailed(f"it did not fail: {result}")
    return result.err


def forget_cgroups() -> None:
    """That all containers were below: Docker leaves it."""
    for top in (census.CGROUPS, *census.CGROUPS.iterdir()):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (top / CGROUPS).rmdir()
