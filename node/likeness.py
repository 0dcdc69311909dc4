"""Being as another process is: what a forked shim has to have of the `start` that asked for it.

What the kernel lets one take over is taken over (cgroups, limits, priority, OOM score, umask); what it does
not, or not safely, has to be the same already: namespaces, root, user, capabilities, confinement. All of it
is read from the kernel, of a process that is held by a pidfd. It must not know what the process is for.
"""

import os
import resource
import select
import signal

from rpc.errors import FailedPrecondition
from shim import cgroup, system

NAMESPACES = ("mnt", "net", "uts", "ipc", "cgroup", "user", "pid", "pid_for_children", "time")
# /proc/PID/status: what cannot be given back once it is gone, or is given for good.
PRIVILEGES = (
    *("Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
)
LIMITS = range(16)  # RLIM_NLIMITS (asm-generic/resource.h)


def take_over(pid: int, started: int) -> None:
    """Of the process that has this pid and start time. Raises FailedPrecondition with what is different."""
    pidfd = system.open_process(pid, started)
    if pidfd is None:
        raise FailedPrecondition(f"process {pid} has ended")
    try:
        theirs = _status(pid)
        _compare(pid, theirs)
        # A cgroup first, since all that is used from here on is to be counted there; and a cpuset may
        # take CPUs away again.
        cgroup.follow(_read(f"/proc/{pid}/cgroup"))
        os.umask(int(theirs["Umask"], 8))
        for limit in LIMITS:
            wanted = resource.prlimit(pid, limit)
            if resource.getrlimit(limit) != wanted:
                resource.setrlimit(limit, wanted)
        _schedule_like(pid)
        _take_signals_like(theirs)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(_read(f"/proc/{pid}/oom_score_adj"))
        if select.select([pidfd], [], [], 0)[0]:
            raise FailedPrecondition(f"process {pid} has ended")  # and the pid may have been another's
    except OSError as error:
        raise FailedPrecondition(f"{error.filename or 'the process'}: {error.strerror}") from error
    finally:
        os.close(pidfd)


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


def _schedule_like(pid: int) -> None:
    if os.sched_getaffinity(0) != (wanted := os.sched_getaffinity(pid)):
        os.sched_setaffinity(0, wanted)
    policy = os.sched_getscheduler(pid), os.sched_getparam(pid).sched_priority
    if policy != (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority):
        os.sched_setscheduler(0, policy[0], os.sched_param(policy[1]))
    nice = os.getpriority(os.PRIO_PROCESS, pid)
    if nice != os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def _take_signals_like(theirs: dict[str, str]) -> None:
    """Who is executed inherits which are ignored and blocked, so they may be containerd's; no handler is."""
    ignored, blocked = (int(theirs[name], 16) for name in ("SigIgn", "SigBlk"))
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if ignored >> number - 1 & 1:
            signal.signal(number, signal.SIG_IGN)
        else:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    signals = (number for number in signal.valid_signals() if blocked >> number - 1 & 1)
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)


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
