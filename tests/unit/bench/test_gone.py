"""Nothing left: processes, mounts and directories that came are waited for, and named if they stay."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench import gone, supervisor
from rpc.errors import DeadlineExceeded


class Host:
    """What gone.py asks of an instance, answered by this process and a directory."""

    def __init__(self, root: Path) -> None:
        import os

        self.supervisor_pid = os.getpid()
        self.root = root

    def descendants(self) -> set[int]:
        return supervisor.descendants(self.supervisor_pid)

    def path(self, absolute: str) -> Path:
        return Path(f"{self.root}{absolute}")


@pytest.fixture
def host(tmp_path: Path) -> Any:
    (tmp_path / "run/casemate/pods").mkdir(parents=True)
    return Host(tmp_path)


def test_nothing_came_nothing_is_waited_for(host: Any) -> None:
    before = gone.look(host, "ns")
    began = time.monotonic()
    assert began <= gone.wait(host, "ns", before, 5.0) <= time.monotonic()


def test_the_end_of_a_process_is_the_time(host: Any) -> None:
    before = gone.look(host, "ns")
    process = subprocess.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    ended: list[float] = []

    def end() -> None:
        ended.append(time.monotonic())
        process.communicate(b"\n")

    timer = threading.Timer(0.2, end)
    timer.start()
    try:
        assert gone.wait(host, "ns", before, 30.0) >= ended[0]
    finally:
        timer.join()


def test_a_directory_that_stays_is_named(host: Any, tmp_path: Path) -> None:
    before = gone.look(host, "ns")
    left = tmp_path / "run/casemate/pods/0123"
    left.mkdir()
    with pytest.raises(DeadlineExceeded) as caught:
        gone.wait(host, "ns", before, 0.1)
    assert str(left) in str(caught.value.details)


def test_what_was_there_before_may_stay(host: Any, tmp_path: Path) -> None:
    (tmp_path / "run/casemate/pods/0123").mkdir()
    with subprocess.Popen([sys.executable, "-ISc", "input()"], stdin=subprocess.PIPE) as process:
        gone.wait(host, "ns", gone.look(host, "ns"), 5.0)
        assert process.poll() is None
        process.communicate(b"\n")
