"""What was begun is finished although its beginner is killed, and nobody waits for it who need not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.instance import CHECKOUT
from rpc.errors import FailedPrecondition, Unavailable
from shim.persistence import finish

BEGINNER = """\
import os, sys
from shim.persistence import finish
def work():
    with open(sys.argv[1] + "/gate") as gate:
        with open(sys.argv[1] + "/pid", "w") as pid:
            pid.write(str(os.getpid()))
        os.rename(sys.argv[1] + "/pid", sys.argv[1] + "/begun")
        gate.read()
    os.rename(sys.argv[1] + "/begun", sys.argv[1] + "/done")
    return []
print(finish(work), flush=True)
"""
LIMIT_S = 20.0


def await_file(path: Path) -> None:
    """Another process makes it: hence a bounded poll."""
    deadline = time.monotonic() + LIMIT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


@pytest.mark.parametrize("killed", [True, False])
def test_it_is_finished_whether_its_beginner_lives_or_not(tmp_path: Path, killed: bool) -> None:
    os.mkfifo(tmp_path / "gate")
    argv = [sys.executable, "-c", BEGINNER, str(tmp_path)]
    with subprocess.Popen(argv, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as beginner:
        with open(tmp_path / "gate", "w"):
            await_file(tmp_path / "begun")
            worker = int((tmp_path / "begun").read_text())
            if killed:
                beginner.send_signal(signal.SIGKILL)
                assert beginner.communicate(timeout=LIMIT_S)[0] == b""  # its end is the end of its output
        await_file(tmp_path / "done")
        if killed:
            os.waitpid(worker, 0)  # ours now, as the tests' process takes orphans
        else:
            assert beginner.communicate(timeout=LIMIT_S)[0] == b"[]\n"


def test_what_was_done_is_told() -> None:
    assert finish(lambda: [str(os.getpid()), "two"])[1:] == ["two"]
    assert finish(lambda: [str(os.getpid())]) != [str(os.getpid())]


def test_what_went_wrong_is_raised() -> None:
    def fail() -> list[str]:
        raise OSError("no such luck")

    with pytest.raises(FailedPrecondition, match="no such luck"):
        finish(fail)


def test_a_worker_that_is_killed_is_told_from_one_that_has_nothing_to_do() -> None:
    def end() -> list[str]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    with pytest.raises(Unavailable, match="before it was done"):
        finish(end)
