"""The generated /init is run on this machine: it is an ordinary static program."""

import subprocess
import time
from pathlib import Path
from struct import unpack

import pytest

from images.initprogram import Buffer, Call, Step, Strings, build

STDOUT, MONOTONIC, RDONLY = 1, 1, 0


def run(steps: list[Step], directory: Path) -> "subprocess.CompletedProcess[bytes]":
    program = directory / "init"
    program.write_bytes(build(steps))
    program.chmod(0o755)
    return subprocess.run([program], cwd=directory, capture_output=True, timeout=10, check=False)


def say(text: str) -> Step:
    return Step(Call.WRITE, (STDOUT, text, len(text)))


def test_steps_run_in_order_with_their_arguments(tmp_path: Path) -> None:
    done = run([say("one "), Step(Call.MKDIR, ("made", 0o700)), say("two")], tmp_path)
    assert done.stdout == b"one two"
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700


def test_the_last_step_becomes_another_program(tmp_path: Path) -> None:
    program = ("/bin/sh", "-c", 'echo "$0 $A"; exit 7', "zero")
    done = run([Step(Call.EXECVE, (program[0], Strings(program), Strings(("A=b c", "D="))))], tmp_path)
    assert (done.stdout, done.returncode) == (b"zero b c\n", 7)


def test_a_failure_that_matters_is_told_and_ends_with_the_errno(tmp_path: Path) -> None:
    steps = [say("before"), Step(Call.OPEN, ("missing", RDONLY), "init: no file"), say("never")]
    done = run(steps, tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (b"before", b"init: no file\n", 2)


def test_a_failure_that_does_not_matter_is_passed_over(tmp_path: Path) -> None:
    done = run([Step(Call.MKDIR, ("/", 0o755)), say("on")], tmp_path)
    assert (done.stdout, done.stderr) == (b"on", b"")


def test_a_list_that_ends_without_another_program_is_a_failure(tmp_path: Path) -> None:
    assert run([], tmp_path).returncode == 1
    assert run([say("x")], tmp_path).returncode == 1


def test_steps_share_a_buffer_that_is_the_same_object(tmp_path: Path) -> None:
    clock, other = Buffer(16), Buffer(16)
    steps = [
        Step(Call.CLOCK_GETTIME, (MONOTONIC, clock)),
        *(Step(Call.WRITE, (STDOUT, b, 16)) for b in (clock, other)),
    ]
    seconds, nanoseconds, *zeros = unpack("<4q", run(steps, tmp_path).stdout)
    assert abs(seconds + nanoseconds / 1e9 - time.monotonic()) < 10
    assert zeros == [0, 0]


def test_a_step_with_six_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 5"):
        build([Step(Call.MOUNT, (1, 2, 3, 4, 5, 6))])


def test_the_same_steps_are_the_same_bytes(tmp_path: Path) -> None:
    assert build([say("x")]) == build([say("x")]) != build([say("y")])
