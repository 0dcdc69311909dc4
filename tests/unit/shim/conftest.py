"""What holds for every test of the shim: it leaves no process behind, not even an orphan's orphan."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture(scope="session", autouse=True)
def subreaper() -> None:
    """Processes whose parents are gone become ours, so that they can be counted."""
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    before = children()
    yield
    left = children() - before
    assert not left, [describe(pid) for pid in left]


def children() -> set[int]:
    """Of all our threads, dead ones included (proc(5): CONFIG_PROC_CHILDREN)."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(map(int, path.read_text().split()))
        except FileNotFoundError:
            continue  # a thread that has ended
    return found


def describe(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    if state != "Z":
        os.kill(pid, 9)
    os.waitpid(pid, 0)
    return f"{pid} {words or 'a zombie'}"
