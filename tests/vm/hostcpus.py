"""What is done in the machine of test_dedicated_host.py: CPUs are claimed on a host that keeps one to itself.

Its /init's main(); answers with what was seen. Knows nothing of what should be.
"""

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path

from rpc.errors import ResourceExhausted
from shim import cgroup
from shim.dedicated import Cpus, may_run_on
from shim.vm.pinning import Pinning
from tests.vm import hostscan
from vfio.ledger.demand import Host, HostNode, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Pod, Process
from vfio.offer import nodes


@dataclass
class Seen:
    """begun: the affinity that a process begins with. bare, top, below: what it may run on where there is no
    cpuset, at the top, and in a cgroup that has CPU 1. ran: on which CPU it ran that was pinned there.
    """

    begun: set[int]
    nodes: tuple[HostNode, ...]
    bare: list[int]
    top: list[int] = field(default_factory=list)
    below: list[int] = field(default_factory=list)
    pinnings: list[Pinning] = field(default_factory=list)
    claimed: list[tuple[int, ...]] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    refused: str = ""


def main() -> None:
    hostscan.answer(_claim)


def _claim() -> Seen:
    libc = ctypes.CDLL(None)
    seen = Seen(os.sched_getaffinity(0), tuple(nodes()), may_run_on("/proc"))
    if libc.mount(b"cgroup2", cgroup.CGROUPS.encode(), b"cgroup2", 0, None) != 0:
        raise OSError("no cgroup2")
    top = Path(cgroup.CGROUPS)
    seen.top = may_run_on("/proc")
    (top / "cgroup.subtree_control").write_text("+cpuset")
    below = top / "pods"
    below.mkdir()
    cpus = Cpus(frozenset(seen.top), frozenset())
    me = Process.here(os.getpid(), 0)
    with Ledger(Path("/tmp/ledger")) as ledger:
        for pod in ("first", "second", "third"):
            host = cpus.within(Host(nodes=seen.nodes))
            try:
                claim = ledger.claim(Pod("test", pod), me, Wanted(cpus=1), host)
            except ResourceExhausted as error:
                seen.refused = str(error)
                break
            seen.claimed.append(claim.own_cpus)
            seen.pinnings.append(cpus.pinning(claim, 1))
    for pinning in seen.pinnings:
        os.sched_setaffinity(0, pinning.vcpus)
        seen.ran.append(libc.sched_getcpu())
    (below / "cpuset.cpus").write_text("1")
    (below / "cgroup.procs").write_text(str(os.getpid()))
    seen.below = may_run_on("/proc")
    return seen
