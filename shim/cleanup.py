"""Takes away what is left of a pod, from its journal alone: for `delete` and `casemate gc`.

Works without the shim, without libvirt and without what was in its memory. Safe to run twice, and
beside another one that does the same.
"""

import errno
import json
import os
import select
from pathlib import Path

from rpc.errors import CasemateError, FailedPrecondition
from shim import cgroup, system
from shim.journal import Entry, Kind, read_journal
from shim.paths import PodPaths

# The kernel has to take down QEMU's memory before the namespace's first process is gone. Longer than
# containerd waits for `delete`: whoever cleans goes on without it (persistence.py).
KILL_TIMEOUT_S = 60.0
REMOVALS = 5
TRACES_KEPT = 100  # where the configuration does not say
KEPT = ("state.json", "trace.json", "console.log", "shim.log")


def clean_pod(paths: PodPaths, *, kept: int = TRACES_KEPT) -> list[str]:
    """Undoes everything of one pod and keeps its records in ended/. Returns what was undone.

    Killing the shim kills every process of the pod, as they are in its PID namespace, and the kernel
    reports the shim's end only after theirs. Raises FailedPrecondition if a process outlives its SIGKILL, or
    if something else could not be undone: then all the rest is, and the journal stays for another time.
    """
    undone: list[str] = []
    failed: list[CasemateError | OSError] = []
    entries = read_journal(paths.journal)[::-1]
    for entry in entries:
        if entry.kind is Kind.PROCESS:  # they use the rest
            undone += _undo_process(entry)
    for undo in (_take_devices_back, _run_hooks):
        try:
            undone += undo(paths, entries)
        except (CasemateError, OSError) as error:
            failed.append(error)
    for entry in entries:
        if entry.kind not in _UNDO:
            continue
        try:
            undone += _UNDO[entry.kind](entry)
        except (CasemateError, OSError) as error:
            failed.append(error)
    if failed:
        raise FailedPrecondition("; ".join(map(str, failed)), hint="casemate gc tries again")
    if paths.directory.is_dir():
        if paths.has_records:
            retire(paths, kept)
        else:
            remove_tree(paths.directory)
        undone.append(f"directory {paths.directory}")
    return undone


def _undo_process(entry: Entry) -> list[str]:
    pidfd = system.open_process(int(entry.value), entry.started)
    if pidfd is None:
        return []
    try:
        system.kill_process(pidfd)
        gone, _, _ = select.select([pidfd], [], [], KILL_TIMEOUT_S)
    finally:
        os.close(pidfd)
    if not gone:
        raise FailedPrecondition(
            f"process {entry.value} did not end within {KILL_TIMEOUT_S:.0f} s of SIGKILL",
            hint=f"see /proc/{entry.value}/stack for what the kernel waits for",
        )
    return [f"process {entry.value}"]


def _take_devices_back(paths: PodPaths, entries: list[Entry]) -> list[str]:
    """Those of other pods that are gone, too: the ledger says whose owner lives."""
    ledgers = {entry.value for entry in entries if entry.kind is Kind.DEVICES}
    if not ledgers:
        return []
    from config.cpulist import ranges
    from config.load import load
    from shim.reclaim import reclaim  # most pods have none

    lines = []
    for ledger_dir in ledgers:
        taken = reclaim(load().replace(ledger_dir=ledger_dir), f"the end of pod {paths.key}")
        lines += [f"claim of device {each}{f': {why}' if why else ''}" for each, why in taken.devices.items()]
        lines += [f"claim of CPUs {ranges(cpus)}, pod {pod}" for pod, cpus in taken.cpus.items()]
    return lines


def _run_hooks(paths: PodPaths, entries: list[Entry]) -> list[str]:
    if not any(entry.kind is Kind.POSTSTOP for entry in entries):
        return []
    from shim.poststop import run_owed  # most pods have none

    return run_owed(paths.journal)


def _undo_socket(entry: Entry) -> list[str]:
    try:
        os.unlink(entry.value)
    except FileNotFoundError:
        return []
    return [f"socket {entry.value}"]


def _undo_cgroup(entry: Entry) -> list[str]:
    return [f"cgroup {entry.value}"] if cgroup.remove(entry.value) else []


_UNDO = {
    Kind.SOCKET: _undo_socket,
    Kind.CGROUP: _undo_cgroup,
}


def retire(paths: PodPaths, kept: int) -> None:
    """Moves the records aside and removes the rest, also beside another that does the same."""
    try:
        paths.ended.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in KEPT:
            try:
                os.replace(paths.directory / name, paths.ended / name)
            except FileNotFoundError:
                continue
        mark_ended(paths.ended / "state.json")
        prune(paths.ended.parent, kept)
    except OSError as error:
        # Records are a help, not a promise: a full disk must not keep the rest from being removed.
        if not system.is_no_space(error):
            raise
    finally:
        remove_tree(paths.directory)


def mark_ended(path: Path) -> None:
    """state.json of a pod that ended says so, also when its shim had no time to."""
    try:
        document = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return
    if not isinstance(document, dict):
        return
    document["state"] = "ended"
    containers = document.get("containers")
    for container in containers if isinstance(containers, list) else ():
        if isinstance(container, dict):
            container["state"] = "stopped"
    path.write_text(json.dumps(document))


def remove_tree(directory: Path) -> None:
    """Removes a directory of ours; mounts below it are unmounted, never emptied, and no link is followed."""
    top = os.path.join(os.path.realpath(directory.parent), directory.name)
    for point in reversed(mount_points_below(top)):
        system.umount_if_mounted(point)
    try:
        parent = os.open(directory.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        for attempt in range(REMOVALS):
            try:
                _remove(directory.name, parent)
                return
            except OSError as error:
                # Somebody was still writing: a thread of libvirt's in a shim that ends.
                if error.errno != errno.ENOTEMPTY or attempt + 1 == REMOVALS:
                    raise
    finally:
        os.close(parent)


def mount_points_below(directory: str) -> list[str]:
    """Those of the calling thread, in the order in which they were mounted (proc(5), mountinfo)."""
    points = []
    with open("/proc/thread-self/mountinfo", "rb") as file:
        for line in file:
            point = os.fsdecode(line.split()[4].decode("unicode_escape").encode("latin-1"))
            if point.startswith(directory + "/"):
                points.append(point)
    return points


def _remove(name: str, parent: int) -> None:
    """By descriptors, so that nobody can put a link where a directory was. What is gone already is fine."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except FileNotFoundError:
        return
    except NotADirectoryError:  # a file, or a link (ELOOP and ENOTDIR are the same to O_DIRECTORY)
        _quietly(os.unlink, name, parent)
        return
    try:
        for entry in os.listdir(fd):
            _remove(entry, fd)
    finally:
        os.close(fd)
    _quietly(os.rmdir, name, parent)


def _quietly(act: "Callable[..., None]", name: str, parent: int) -> None:
    try:
        act(name, dir_fd=parent)
    except FileNotFoundError:
        return  # another that cleans was faster


def prune(ended: Path, kept: int) -> list[Path]:
    """Removes the oldest records beyond `kept`. Returns what was removed."""
    try:
        entries = sorted(ended.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except FileNotFoundError:
        return []
    removed = entries[kept:]
    for path in removed:
        remove_tree(path)
    return removed


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
