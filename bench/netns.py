"""Network namespaces as a CNI plugin leaves them: a pod's, and what its interfaces are connected to.

It knows ip(8); what packets should do is a test's.
"""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager


class Namespace:
    """A network namespace with a loopback that is up, for as long as a process of ours is in it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.pid = process.pid
        self.path = f"/proc/{process.pid}/ns/net"

    def ip(self, *words: str) -> str:
        """`ip WORDS`, in it."""
        return self.run("ip", *words)

    def run(self, *command: str) -> str:
        done = subprocess.run(
            ["nsenter", f"--net={self.path}", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    @contextmanager
    def start(self, *command: str) -> Iterator["subprocess.Popen[str]"]:
        """A program in it, with pipes; killed at the end of the block."""
        with subprocess.Popen(
            ["nsenter", f"--net={self.path}", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def options(self) -> tuple[str, ...]:
        """Of `ctr run`, for a container in it."""
        return ("--with-ns", f"network:{self.path}")


@contextmanager
def namespace() -> Iterator[Namespace]:
    process = subprocess.Popen(
        ["unshare", "--net", "sh", "-c", "ip link set lo up && echo && exec sleep infinity"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield Namespace(process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def connect(
    pod: Namespace, name: str, other: Namespace, other_name: str, *addresses: tuple[str, str], mtu: int = 1500
) -> None:
    """A pair of veths. addresses: (the pod's, the other's) with their prefix lengths, IPv4 or IPv6."""
    pod.ip("link", "add", name, "mtu", str(mtu), "type", "veth", "peer", "name", other_name)
    pod.ip("link", "set", other_name, "mtu", str(mtu), "netns", str(other.pid))
    for place, interface, mine in ((pod, name, 0), (other, other_name, 1)):
        for pair in addresses:
            place.ip(
                "address", "add", pair[mine], "dev", interface, *(("nodad",) if ":" in pair[mine] else ())
            )
        place.ip("link", "set", interface, "up")
