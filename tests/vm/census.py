"""Counts what a containerd instance and its shims hold, so that a test can tell what was left behind.

It looks at the kernel and at containerd, never at what the shim believes. What an ended pod keeps on
purpose is not counted (NOT_COUNTED).
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from bench.ctr import Ctr
from bench.instance import Instance

SNAPSHOTTERS = "/metadata.db"
"""Of containerd's open files: what a snapshotter opens when it is first asked for."""
PIDFD = "anon_inode:[pidfd]"
"""Of these, too: Go's own of a process that containerd waits for by another, as of one whose user namespace
it takes (pkg/sys/unshare_linux.go), which Go's collector closes whenever it comes."""
NOT_COUNTED = (
    "/run/casemate/ended",  # traces and logs of ended pods, bounded in number
    "/run/casemate/cache",  # what can be found out again
    "/run/casemate/users",  # locks on the users that QEMUs run as, as many as there were pods at once
    "/run/containerd/fifo",  # ctr's own: it leaves those of a detached exec, with runc as well
    "/run/mount",  # mount(8)'s own, of the tests that mount
    "/run/libvirt",  # a token that libvirt makes once for the whole host
)
"""What outlives a pod by design."""

BUNDLES = tuple(
    f"/run/containerd/io.containerd.{plugin}" for plugin in ("runtime.v2.task", "sandbox.controller.v1.shim")
)
MADE_ONCE = ("/run/casemate/pods", "/run/casemate/spares")
"""Directories that stay once they are made, as does one in each of BUNDLES for each of containerd's
namespaces: after a cut of power the first pod makes them again. What is in them counts."""

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Census:
    """Names, by kind, of everything there is at one moment."""

    processes: frozenset[str]
    mounts: frozenset[str]
    files: frozenset[str]
    links: frozenset[str]
    namespaces: frozenset[str]
    cgroups: frozenset[str]
    loops: frozenset[str]
    objects: frozenset[str]
    open_files: frozenset[str]

    def left_since(self, before: "Census") -> list[str]:
        """What is here now and was not before, one line each; of a directory tree its top."""
        left = []
        for field in fields(self):
            names = getattr(self, field.name) - getattr(before, field.name)
            left += [f"{field.name}: {name}" for name in sorted(names) if os.path.dirname(name) not in names]
        return left


def take(ctr: Ctr) -> Census:
    instance = ctr.instance
    return Census(
        processes=frozenset(_processes(instance)),
        mounts=frozenset(_mounts(instance)),
        files=frozenset(_files(instance)),
        links=frozenset(_links(instance)),
        namespaces=frozenset(_namespaces(instance)),
        cgroups=frozenset(cgroups(ctr)),
        loops=frozenset(_loops(instance)),
        objects=frozenset(_objects(ctr)),
        open_files=frozenset(_open_files(instance)),
    )


def left_after(
    ctr: Ctr, before: Census, timeout_s: float = 30.0, but: Callable[[str], bool] = lambda line: False
) -> list[str]:
    """What is still there that was not before, once it no longer changes for the better or time is up.

    but: what is somebody else's.

    containerd and the kernel finish some of their own clean-up after `ctr` returned (closing the shim's
    connection, lazily freed mounts), and announce it to nobody: hence a bounded poll.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = [line for line in take(ctr).left_since(before) if not but(line)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def _processes(instance: Instance) -> list[str]:
    """Everything below the supervisor (orphans are re-parented to it), zombies included, but containerd
    itself.
    """
    found = []
    for pid in instance.descendants() - {instance.containerd_pid}:
        with suppress(FileNotFoundError, ProcessLookupError):
            command = (
                Path(f"/proc/{pid}/cmdline")
                .read_bytes()
                .replace(b"\0", b" ")
                .decode(errors="replace")
                .strip()
            )
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            found.append(f"{pid} {command or f'[{name}]'}")
    return found


def _mounts(instance: Instance) -> list[str]:
    """Mount points with type and source in containerd's mount namespace, numbered where they are stacked."""
    found: list[str] = []
    for line in Path(f"/proc/{instance.supervisor_pid}/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        kind, source = right.split(" ")[:2]
        name = f"{left.split(' ')[4]} ({kind}, {source})"
        found.append(f"{name} #{sum(1 for other in found if other.startswith(name))}")
    return found


def _files(instance: Instance) -> list[str]:
    """Everything in the instance's own /run (sockets, pod and bundle directories) and TMPDIR, not below
    its mounts.
    """
    found: list[str] = []
    for top, inside in ((instance.path("/run"), "/run"), (instance.base / "tmp", "TMPDIR")):
        device = os.stat(top).st_dev
        for directory, directories, names in os.walk(top):
            place = inside + directory[len(str(top)) :]
            directories[:] = [name for name in directories if f"{place}/{name}" not in NOT_COUNTED]
            if place not in BUNDLES:
                found += [
                    each for name in (*directories, *names) if (each := f"{place}/{name}") not in MADE_ONCE
                ]
            with suppress(FileNotFoundError):  # removed while we looked
                directories[:] = [
                    name for name in directories if os.lstat(f"{directory}/{name}").st_dev == device
                ]
    return found


def _links(instance: Instance) -> list[str]:
    """Network interfaces (taps, veths) in containerd's network namespace."""
    lines = Path(f"/proc/{instance.supervisor_pid}/net/dev").read_text().splitlines()[2:]
    return [line.split(":")[0].strip() for line in lines]


def _namespaces(instance: Instance) -> list[str]:
    """Namespaces that processes below the supervisor live in."""
    found = set()
    for pid in instance.descendants():
        for kind in ("net", "mnt", "pid"):
            with suppress(OSError):  # the process ended
                found.add(os.readlink(f"/proc/{pid}/ns/{kind}"))
    return sorted(found)


def cgroups(ctr: Ctr) -> list[str]:
    """cgroups below the one that ctr names after our containerd namespace, and that runc leaves. Others may
    use this machine, too.
    """
    found = []
    for directory, directories, _ in os.walk(CGROUPS):
        if f"/{ctr.cgroups}/" in f"{directory}/":
            found += [f"{directory}/{name}" for name in directories]
    return found


def _loops(instance: Instance) -> list[str]:
    """Loop devices that hold a file of the instance's."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # detached while we looked
            name = backing.read_text().strip()
            if str(instance.base) in name or "/run/" in name:
                found.append(f"{backing.parts[3]} {name}")
    return found


def _objects(ctr: Ctr) -> list[str]:
    """containerd's containers, tasks, active snapshots and leases."""
    found = []
    for kind in ("containers", "tasks", "leases", "snapshots"):
        for line in ctr(kind, "list").ok().out.splitlines()[1:]:
            columns = line.split()
            if columns and columns[-1] != "Committed":  # an image's own layers stay
                found.append(f"{kind} {columns[0]}")
    return found


def _open_files(instance: Instance) -> list[str]:
    """containerd's open files, those without a name (sockets, pipes) numbered by kind."""
    found: list[str] = []
    counts: dict[str, int] = {}
    directory = f"/proc/{instance.containerd_pid}/fd"
    for fd in os.listdir(directory):
        with suppress(FileNotFoundError):
            target = os.readlink(f"{directory}/{fd}")
            if target.endswith(SNAPSHOTTERS) or target == PIDFD:
                continue
            kind = target.split("[")[0] if target.startswith(("socket:", "pipe:")) else target
            counts[kind] = counts.get(kind, 0) + 1
            found.append(f"{kind} #{counts[kind]}")
    return found
