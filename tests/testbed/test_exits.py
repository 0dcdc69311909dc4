"""What a run in the bed promises to who asked for it: the exit code, the output, a limit, a fresh disk."""

from pathlib import Path

import pytest

from tests.testbed import machine


def bash(bed: machine.Bed, script: str, **shape: float) -> int:
    return machine.run(bed, ["bash", "-c", script], machine.Shape(**shape))  # type: ignore[arg-type]


def test_exit_code_and_output_are_the_commands(bed: machine.Bed, capfd: pytest.CaptureFixture[str]) -> None:
    assert bash(bed, "printf 'one\\n\\ttwo'; printf three >&2; touch /left-on-the-disk; exit 42") == 42
    assert capfd.readouterr().out == "one\n\ttwothree"


def test_nothing_of_an_instance_is_left_for_the_next(bed: machine.Bed) -> None:
    before = bed.disk.stat().st_mtime_ns
    assert bash(bed, "touch /left-on-the-disk") == 0
    assert bash(bed, "test ! -e /left-on-the-disk") == 0
    assert bed.disk.stat().st_mtime_ns == before


def test_a_command_that_takes_too_long_is_stopped(
    bed: machine.Bed, capfd: pytest.CaptureFixture[str]
) -> None:
    assert bash(bed, "echo begun; sleep infinity", limit_s=40.0) == machine.TIMED_OUT
    out = capfd.readouterr().out
    assert out.startswith("begun\n")
    assert "was not done in time" in out


def test_a_bed_that_hangs_is_tried_once_more_and_told_of(
    bed: machine.Bed, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "HUNG_S", 30.0)
    # The first instance stops everything but PID 1, its heart too; the second finds that it was tried.
    script = "test -e /share/tried && exit 5; touch /share/tried; kill -STOP -- -1; sleep infinity"
    assert machine.run(bed, ["bash", "-c", script], machine.Shape(share=tmp_path)) == 5
    assert "the first instance hung" in capfd.readouterr().out
