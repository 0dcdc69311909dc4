"""Docker Engine beside a containerd of the tests: its daemon with this checkout's runtime, and its client.

It knows docker's command line; what should come of it is the test's business.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from bench.ctr import NAMESPACE as CTR_NAMESPACE
from bench.ctr import Ctr, Running
from bench.instance import RUNTIME, Instance
from tests.vm import builds, census
from tests.vm.dockerlike import DockerLike

CONTAINERD = "v1.7"
"""The line that Debian's Docker is made for."""
NAMESPACE = "moby"
"""Of containerd's, where Docker has its containers."""
CGROUPS = f"{CTR_NAMESPACE}-docker"
"""Of this process alone, as there may be other tests on this machine."""
SOCKET = "unix:///run/docker.sock"
DAEMON_S = 60.0


class Docker(DockerLike):
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
        """Ends it, if it runs: of one that did not start there is no pid, and 0 would be our own group."""
        if not self.pid:
            return
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

    @contextlib.contextmanager
    def serving(self, script: str) -> Iterator[Running]:
        """Such a program in the background."""
        with self._started(self.instance.inside(sys.executable, "-c", script)) as running:
            yield running


def forget_cgroups() -> None:
    """That all containers were below: Docker leaves it."""
    for top in (census.CGROUPS, *census.CGROUPS.iterdir()):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (top / CGROUPS).rmdir()
