"""A volume that somebody on the host uses, too: what of the one does the other see? Each thing tried once.

The container's part runs there: python3 -c PROGRAM PATH.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.stand import RUN_S, Runner

LOCKED = """\
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    try:
        fcntl.{call}(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("locked")
"""
TOLD = """\
import ctypes, os, select, sys
libc = ctypes.CDLL(None)
fd = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(fd, sys.argv[1].encode(), 0x100)
print("watching", flush=True)
if select.select([fd], [], [], 3)[0]:
    print("told", flush=True)
"""
MAPPED = """\
import mmap, sys
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
print(memory[:3], flush=True)
sys.stdin.readline()
print(memory[:3], flush=True)
"""
SEEN_S = 2.0
"""Longer than a guest takes names and attributes for granted."""

Try = Callable[[Runner, str, Path, str], bool]


def flock_of_the_host_is_seen(runner: Runner, name: str, directory: Path, path: str) -> bool:
    with (directory / "file").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return "locked" in runner.execute(name, "python3", "-c", LOCKED.format(call="flock"), f"{path}/file")


def record_lock_of_the_host_is_seen(runner: Runner, name: str, directory: Path, path: str) -> bool:
    with (directory / "file").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        return "locked" in runner.execute(name, "python3", "-c", LOCKED.format(call="lockf"), f"{path}/file")


def changes_of_the_host_are_told(runner: Runner, name: str, directory: Path, path: str) -> bool:
    exec_id = runner.ctr.new_id("e")
    words = ("task", "exec", "--exec-id", exec_id, name, "python3", "-c", TOLD, path)
    with runner.ctr.start(*words) as running:
        running.read_until(b"watching", RUN_S)
        (directory / "made").touch()
        return b"told" in running.finish(RUN_S).stdout


def writes_of_the_host_are_seen_in_mapped_memory(
    runner: Runner, name: str, directory: Path, path: str
) -> bool:
    (directory / "mapped").write_bytes(b"old")
    words = ("task", "exec", "--exec-id", runner.ctr.new_id("e"), name, "python3", "-c", MAPPED)
    with runner.ctr.start(*words, f"{path}/mapped") as running:
        running.read_until(b"old", RUN_S)
        with (directory / "mapped").open("r+b") as file:
            file.write(b"new")
        time.sleep(SEEN_S)  # that it is not seen is told by nothing: what is given it to be seen in
        running.write(b"\n")
        return b"new" in running.finish(RUN_S).stdout


def writes_of_the_host_are_seen_when_opened(runner: Runner, name: str, directory: Path, path: str) -> bool:
    seen = []
    for content in ("one", "two"):
        (directory / "opened").write_text(content)
        seen.append(runner.execute(name, "cat", f"{path}/opened") == content)
    return all(seen)


def owners_and_attributes_are_the_hosts(runner: Runner, name: str, directory: Path, path: str) -> bool:
    """Also the other way round."""
    made = directory / "owned"
    made.touch()
    os.chown(made, 1234, 567)
    os.setxattr(made, "user.name", b"value")
    look = "import os, sys; s = os.stat(sys.argv[1]); os.chown(sys.argv[1], 7, 8)\n"
    look += "print(s.st_uid, s.st_gid, os.getxattr(sys.argv[1], 'user.name').decode())"
    said = runner.execute(name, "python3", "-c", look, f"{path}/owned").split()
    return said == ["1234", "567", "value"] and (made.stat().st_uid, made.stat().st_gid) == (7, 8)


TRIES: tuple[Try, ...] = (
    flock_of_the_host_is_seen,
    record_lock_of_the_host_is_seen,
    changes_of_the_host_are_told,
    writes_of_the_host_are_seen_in_mapped_memory,
    writes_of_the_host_are_seen_when_opened,
    owners_and_attributes_are_the_hosts,
)


def try_all(runner: Runner, name: str, directory: Path, path: str) -> Iterator[tuple[str, bool]]:
    """directory: the host's, which the container has at path."""
    for one in TRIES:
        yield one.__name__, one(runner, name, directory, path)
