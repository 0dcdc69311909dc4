"""What is left of a run that failed: the last lines of who knows why."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.instance import Instance
from bench.stand import LOG_LINES, LOGS, Runner, Stand
from bench.ways import known


def stand(say: Callable[[str], None], base: Path, *names: str) -> Stand:
    """Nothing of it was started."""
    made = Stand.__new__(Stand)
    made.say = say
    made._undo = cast(Any, SimpleNamespace(close=lambda: say("taken away")))
    instance = Instance.__new__(Instance)
    instance.log, instance.base = base / "containerd.log", base
    instance.path = lambda place: Path(base, *Path(place).parts[1:])  # type: ignore[assignment, method-assign]
    ctr = cast(Any, SimpleNamespace(instance=instance))
    made.runners = {name: Runner(known()[name], ctr, "image") for name in names}
    return made


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "containerd.log").write_text("".join(f"line {number}\n" for number in range(100)))
    for number in range(LOGS + 1):
        directory = tmp_path / f"run/casemate/ended/key{number}"
        directory.mkdir(parents=True)
        (directory / "shim.log").write_text(f"words of {number}\n")
        os.utime(directory / "shim.log", (number, number))
    return tmp_path


def test_a_failure_shows_the_newest_logs_before_they_go(base: Path) -> None:
    said: list[str] = []
    stand(said.append, base, "runc", "casemate").__exit__(ValueError, ValueError(), None)
    assert said[-1] == "taken away"
    assert len(said) == 1 + LOGS + 2  # runc's containerd is not asked
    assert said[0].startswith(f"casemate: {base / 'containerd.log'}:\n")
    assert said[0].count("\nline ") == LOG_LINES
    assert [text.partition("\n")[2] for text in said[1:-2]] == [f"words of {n}" for n in range(1, LOGS + 1)]
    assert said[-2].startswith("dmesg:\n")
    assert said[-2].count("\n") in range(1, LOG_LINES + 1)


def test_a_run_that_went_well_has_nothing_to_show(base: Path) -> None:
    said: list[str] = []
    stand(said.append, base, "casemate").__exit__(None, None, None)
    assert said == ["taken away"]
