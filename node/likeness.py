"""Being as another process is: what a forked shim has to have of the `start` that asked for it.

What the kernel lets one take over is taken over (cgroups, limits, priority, OOM score, umask); what it does
not, or not safely, has to be the same already: namespaces, root, user, capabilities, confinement. All of it
is read from the kernel, of a process that is held by a pidfd. It must not know what the process is for.
"""

import os
import resource
import select
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rpc.errors import FailedPrecondition
from shim import cgroup, system

Nature = dict[str, Any]

NAMESPACES = ("mnt", "net", "uts", "ipc", "cgroup", "user", "pid", "pid_for_children", "time")
# /proc/PID/status: what cannot be given back once it is gone, or is given for good.
PRIVILEGES = (
    *("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
)
LIMITS = range(16)  # RLIM_NLIMITS (asm-generic/resource.h)


class Likeness:
    """Of the process that has this pid and start time, once it is known that ours may become like it.

    nature: what a process can be made to have that runs already, as plain values; where those of two are
    equal, what one of them has executed may serve the other. ignored: its signals that are, as a mask. Raises
    FailedPrecondition with what is different.
    """

    def __init__(self, pid: int, started: int) -> None:
        self._pid = pid
        pidfd = system.open_process(pid, started)
        if pidfd is None:
            raise FailedPrecondition(f"process {pid} has ended")
        self._pidfd = pidfd
        try:
            with _refusing():
                theirs = _status(pid)
                _compare(pid, theirs)
                self.nature = _nature(pid, theirs)
                self.ignored = int(theirs["SigIgn"], 16)
                self.cgroups = _read(f"/proc/{pid}/cgroup")
                self.oom_score_adj = int(_read(f"/proc/{pid}/oom_score_adj"))
            self.check_alive()
        except BaseException:
            self.close()
            raise

    def check_alive(self) -> None:
        """Else the pid may have been another's. Raises FailedPrecondition."""
        if select.select([self._pidfd], [], [], 0)[0]:
            raise FailedPrecondition(f"process {self._pid} has ended")

    def take_over(self) -> None:
        """Raises FailedPrecondition where that is not possible."""
        with _refusing():
            # A cgroup first, since all that is used from here on is to be counted there; and a cpuset may
            # take CPUs away again.
            cgroup.follow(self.cgroups)
            become(self.nature)
            ignore(self.ignored)
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write(str(self.oom_score_adj))

    def close(self) -> None:
        os.close(self._pidfd)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FailedPrecondition(f"{error.filename or 'the process'}: {error.strerror}") from error


def own_nature() -> Nature:
    """This process's."""
    return _nature(os.getpid(), _status("self"))


def _nature(pid: int, status: dict[str, str]) -> Nature:
    return {
        "limits": [list(resource.prlimit(pid, limit)) for limit in LIMITS],
        "umask": int(status["Umask"], 8),
        "cpus": sorted(os.sched_getaffinity(pid)),
        "policy": [os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority],
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "blocked": int(status["SigBlk"], 16),
    }


def become(nature: Nature) -> None:
    """Gives this process another one's nature. Raises OSError."""
    os.umask(nature["umask"])
    for limit, wanted in zip(LIMITS, nature["limits"], strict=True):
        if list(resource.getrlimit(limit)) != wanted:
            resource.setrlimit(limit, tuple(wanted))
    if os.sched_getaffinity(0) != (cpus := set(nature["cpus"])):
        os.sched_setaffinity(0, cpus)
    policy, priority = nature["policy"]
    if (policy, priority) != (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority):
        os.sched_setscheduler(0, policy, os.sched_param(priority))
    if nature["nice"] != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nature["nice"])
    signals = (number for number in signal.valid_signals() if nature["blocked"] >> number - 1 & 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)


def _compare(pid: int, theirs: dict[str, str]) -> None:
    for kind in NAMESPACES:
        if _link("self", kind) != _link(pid, kind):
            raise FailedPrecondition(f"casemated is in another {kind} namespace")
    if not os.path.samestat(os.stat("/proc/self/root/"), os.stat(f"/proc/{pid}/root/")):
        raise FailedPrecondition("casemated has another root directory")
    ours = _status("self")
    for name in PRIVILEGES:
        if ours.get(name) != theirs.get(name):
            raise FailedPrecondition(
                f"casemated's {name} is {ours.get(name)}, and containerd's {theirs.get(name)}"
            )
    if ours.get("Seccomp", "0") != "0":
        raise FailedPrecondition("casemated has a seccomp filter, which may not be containerd's")
    for name in ("attr/current", "personality"):
        if _optional("self", name) != _optional(pid, name):
            raise FailedPrecondition(f"casemated's {name} is not containerd's")


def ignore(ignored: int, but: frozenset[int] = frozenset()) -> None:
    """Who is executed inherits which signals are ignored, so they may be containerd's; no handler is. but:
    those that are handled here."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, *but}:
        if ignored >> number - 1 & 1:
            signal.signal(number, signal.SIG_IGN)
        else:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)


def _status(pid: int | str) -> dict[str, str]:
    rows = (line.partition(":") for line in _read(f"/proc/{pid}/status").splitlines())
    return {name: value.strip() for name, _, value in rows}


def _link(pid: int | str, kind: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except FileNotFoundError:
        return ""  # a kernel without such namespaces


def _optional(pid: int | str, name: str) -> str:
    """A kernel may be built without it, or have no security module that answers."""
    try:
        return _read(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()
