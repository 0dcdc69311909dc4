"""A casemated beside a test's containerd: started, watched, killed. What should come of it is the test's."""

import os
import select
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from bench.instance import Instance
from shim.forkserver import SOCKET

STARTED_S = 30.0


class Node:
    """casemated in the namespaces of an instance, as containerd is."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.pid = 0

    def start(self, environment: Mapping[str, str] | None = None, *wrapper: str) -> None:
        """wrapper: a program that executes it, as nsenter does. Returns when it serves."""
        self.pid = self.instance.spawn([*wrapper, str(self.instance.base / "bin/casemated")], environment)
        self.wait_serving()

    def wait_serving(self, but: int = 0) -> int:
        """The fork server, once there is one that is not `but`. Nothing tells: hence a bounded poll."""
        deadline = time.monotonic() + STARTED_S
        while True:
            log = self.instance.log.read_text(errors="replace")
            for pid in self.children():
                if pid != but and f"the fork server listens at /run/casemate/{SOCKET} (process {pid})" in log:
                    return pid
            assert time.monotonic() < deadline, self.instance.log_tail()
            time.sleep(0.02)

    @property
    def socket(self) -> Path:
        return self.instance.path(f"/run/casemate/{SOCKET}")

    def children(self) -> list[int]:
        return [int(word) for word in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def kill(self, number: int = signal.SIGKILL, pid: int = 0) -> None:
        """Returns when it is gone."""
        pidfd = os.pidfd_open(pid or self.pid)
        try:
            signal.pidfd_send_signal(pidfd, number)
            assert select.select([pidfd], [], [], STARTED_S)[0], f"casemated does not end by signal {number}"
        finally:
            os.close(pidfd)
        if not pid:
            self.instance.wait_exit(self.pid, STARTED_S)
            self.pid = 0

    def wait_gone(self, pid: int) -> None:
        """The fork server's end, which follows casemated's."""
        deadline = time.monotonic() + STARTED_S
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, f"process {pid} lives without casemated"
            time.sleep(0.02)

    def close(self) -> None:
        """Ends it, and takes away what one that was killed leaves."""
        if self.pid:
            self.kill(signal.SIGTERM)
        self.socket.unlink(missing_ok=True)
