"""When nothing of a container is left: no process, no mount, no directory that was not there before.

It looks at the kernel and at directories, never at what a runtime says. Which container it was is the
caller's business: nothing else may be started or ended in the same containerd meanwhile.
"""

import os
import select
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench import supervisor
from bench.instance import Instance
from rpc.errors import DeadlineExceeded

SPARE = "casemate-spare"
"""What the first process of such a machine is called."""
CHANGED_S = 0.1
"""A process may turn out to be none of the container's: what is forked for the pool gets its name later."""
LOOK_AGAIN_S = 0.002
"""The removal of a directory is announced to nobody without a watch on it; the rest is waited for."""


@dataclass(frozen=True, slots=True)
class Present:
    """What there is in one containerd's namespaces. Mounts are their ids, with where they are.

    Only an id is a mount's own: its path changes when somebody on the host renames a directory above it.
    """

    processes: frozenset[int]
    mounts: Mapping[int, str]
    directories: frozenset[Path]


def look(instance: Instance, namespace: str) -> Present:
    """Machines that wait in a pool are no container's, and not seen."""
    processes = instance.descendants()
    return Present(
        frozenset(processes - _waiting(processes)),
        {int(row[0]): row[4] for row in map(str.split, _mountinfo(instance).read_text().splitlines())},
        frozenset(_directories(instance, namespace)),
    )


def _waiting(processes: Iterable[int]) -> set[int]:
    """Those that are called SPARE, and all that are below one, in PID namespaces of their own or not."""
    named = {pid for pid in processes if _name(pid) == SPARE}
    return named.union(*map(supervisor.descendants, named))


def wait(instance: Instance, namespace: str, before: Present, timeout_s: float) -> float:
    """Returns the monotonic time at which everything that came after `before` was gone.

    Raises DeadlineExceeded with what is still there.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        now = look(instance, namespace)
        seen_at = time.monotonic()
        processes = now.processes - before.processes
        mounts = now.mounts.keys() - before.mounts.keys()
        directories = now.directories - before.directories
        if not (processes or mounts or directories):
            return seen_at
        if seen_at > deadline:
            left = [f"process {pid} {_name(pid)}" for pid in processes]
            left += [f"mount {now.mounts[number]}" for number in mounts] + [str(path) for path in directories]
            raise DeadlineExceeded(
                f"something is left of a container after {timeout_s:.0f} s", details="\n".join(sorted(left))
            )
        if processes:
            _wait_for_one(processes, deadline)
        elif mounts:
            _wait_for_mounts(instance, deadline)
        else:
            time.sleep(LOOK_AGAIN_S)


def _wait_for_one(pids: Iterable[int], deadline: float) -> None:
    """Until one of them has ended; at once if one already has."""
    running = [pid for pid in pids if not _is_zombie(pid)]
    if not running:
        # Dead, and whoever must reap them has not come to it yet.
        time.sleep(LOOK_AGAIN_S)
        return
    with ExitStack() as undo:
        poll = select.poll()
        for pid in running:
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                return
            undo.callback(os.close, descriptor)
            poll.register(descriptor, select.POLLIN)
        poll.poll(min(_milliseconds(deadline), int(CHANGED_S * 1000)))


def _wait_for_mounts(instance: Instance, deadline: float) -> None:
    """Until the mount table changes; the kernel flags that as an error on the open file (proc(5))."""
    with _mountinfo(instance).open() as file:
        poll = select.poll()
        poll.register(file, select.POLLERR | select.POLLPRI)
        file.read()
        # What changed between the look before and this open is not told: hence no long wait.
        poll.poll(min(_milliseconds(deadline), int(CHANGED_S * 1000)))


def _milliseconds(deadline: float) -> int:
    return max(int((deadline - time.monotonic()) * 1000), 0) + 1


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return "(just ended)"


def _mountinfo(instance: Instance) -> Path:
    return Path(f"/proc/{instance.supervisor_pid}/mountinfo")


def _directories(instance: Instance, namespace: str) -> Iterable[Path]:
    """Bundles of containerd's and pods of casemate's."""
    for parent in (f"/run/containerd/io.containerd.runtime.v2.task/{namespace}", "/run/casemate/pods"):
        try:
            yield from instance.path(parent).iterdir()
        except FileNotFoundError:
            continue  # the first container makes it
