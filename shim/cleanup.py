"""Takes away what is left of a pod, from its journal alone: for `delete` and `casemate gc`.

Works without the shim, without libvirt and without what was in its memory. Safe to run twice, and
beside another one that does the same.
"""

import json
import os
import select
import shutil
import stat
from pathlib import Path

from rpc.errors import FailedPrecondition
from shim import system
from shim.journal import Entry, Kind, read_journal
from shim.paths import PodPaths

# The kernel has to take down QEMU's memory before the namespace's first process is gone.
KILL_TIMEOUT_S = 4.0
KEPT = ("state.json", "trace.json", "console.log", "shim.log")


def clean_pod(paths: PodPaths, *, kept: int = 100) -> list[str]:
    """Undoes everything of one pod and keeps its records in ended/. Returns what was undone.

    Killing the shim kills every process of the pod, as they are in its PID namespace, and the kernel
    reports the shim's end only after theirs. Raises FailedPrecondition if a process outlives its SIGKILL.
    """
    undone: list[str] = []
    for entry in reversed(read_journal(paths.journal)):
        undone += _UNDO[entry.kind](entry)
    if paths.directory.is_dir():
        retire(paths, kept)
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


def _undo_socket(entry: Entry) -> list[str]:
    try:
        os.unlink(entry.value)
    except FileNotFoundError:
        return []
    return [f"socket {entry.value}"]


def _undo_mount(entry: Entry) -> list[str]:
    try:
        system.umount(entry.value, system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        if error.errno == 22:  # EINVAL: nothing is mounted there
            return []
        raise
    return [f"mount {entry.value}"]


_UNDO = {Kind.PROCESS: _undo_process, Kind.SOCKET: _undo_socket, Kind.MOUNT: _undo_mount}


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
    document["state"] = "ended"
    path.write_text(json.dumps(document))


def remove_tree(directory: Path) -> None:
    """Removes a directory of ours, never anything on a file system that is mounted below it."""
    try:
        device = directory.lstat().st_dev
    except FileNotFoundError:
        return
    for entry in os.scandir(directory):
        path = Path(entry.path)
        try:
            status = path.lstat()
            if status.st_dev != device:
                system.umount(entry.path, system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
                status = path.lstat()
            if stat.S_ISDIR(status.st_mode):
                remove_tree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            continue  # the other one that cleans was faster
    try:
        directory.rmdir()
    except FileNotFoundError:
        return


def prune(ended: Path, kept: int) -> list[Path]:
    """Removes the oldest records beyond `kept`. Returns what was removed."""
    try:
        entries = sorted(ended.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    except FileNotFoundError:
        return []
    removed = entries[kept:]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed
