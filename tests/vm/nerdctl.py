"""nerdctl beside a containerd of the tests, with files, networks and addresses of its own.

It knows nerdctl's options; what should come of them is the tests' business.
"""

import subprocess

from bench.ctr import NAMESPACE, Ctr
from bench.instance import RUNTIME, Instance
from tests.vm import builds
from tests.vm.dockerlike import DockerLike

CNI_PROGRAMS = "/usr/lib/cni"
ADDRESSES = "/var/lib/cni"
"""Where CNI's host-local writes down who has which, whatever nerdctl is told."""


class Nerdctl(DockerLike):
    """In the namespace that the tests' image is in."""

    runtime = ("--runtime", RUNTIME)

    def __init__(self, instance: Instance) -> None:
        super().__init__(instance)
        self.ctr = Ctr(instance)
        program = str(builds.nerdctl())
        own = instance.base / "nerdctl"
        self._command = (
            program,
            f"--namespace={NAMESPACE}",
            f"--data-root={own}/data",
            f"--cni-path={CNI_PROGRAMS}",
            f"--cni-netconfpath={own}/networks",
            "--cgroup-manager=cgroupfs",  # as on every host, with systemd or without
        )
        self.tini = str(builds.docker() / "usr/bin/tini-static")

    def prepare(self) -> None:
        """Once in the life of the instance."""
        for command in (["mkdir", "-p", ADDRESSES], ["mount", "-t", "tmpfs", "none", ADDRESSES]):
            subprocess.run(self.instance.inside(*command), check=True)

    def is_own(self, left: str) -> bool:
        """Whether a line of a census is of what nerdctl and CNI's plug-ins keep, as with any runtime."""
        return left.startswith(("files: /run/nerdctl", "files: /run/cni"))

    def command(self, *argv: str) -> list[str]:
        return self.instance.inside(*self._command, *argv)
