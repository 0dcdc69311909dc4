"""The gateway to other programs: what it gives them, and what it says when they fail."""

import subprocess
from pathlib import Path

import pytest

from images.run import run
from rpc.errors import DeadlineExceeded, FailedPrecondition, NotFound


def test_output_comes_back_and_input_is_empty() -> None:
    assert run(["sh", "-c", "cat; echo out; echo err >&2"]) == b"out\n"
    assert run(["cat"], stdin=b"in") == b"in"


def test_the_environment_does_not_depend_on_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("SECRET", "x")
    lines = run(["env"], environment={"ADDED": "1"}).decode().split()
    assert {"LC_ALL=C.UTF-8", "TZ=UTC", "ADDED=1"} <= set(lines)
    assert not any(line.startswith("SECRET") for line in lines)


def test_a_failure_prints_a_line_that_repeats_it(tmp_path: Path) -> None:
    command = ["sh", "-c", 'echo "$WORD" >&2; pwd; exit 3']
    with pytest.raises(FailedPrecondition) as caught:
        run(command, cwd=tmp_path, environment={"WORD": "it's wrong"})
    assert caught.value.brief == "sh ended with status 3"
    details = str(caught.value.details)
    assert details.startswith("it's wrong")
    line = details.splitlines()[-1].removeprefix("command: ")
    again = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr, again.stdout) == (3, "it's wrong\n", f"{tmp_path}\n")


def test_only_the_last_words_are_shown() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        run(["sh", "-c", "seq 1 10000 >&2; echo last >&2; exit 1"])
    details = str(caught.value.details)
    assert "last" in details
    assert len(details) < 3000


def test_a_signal_is_named() -> None:
    with pytest.raises(FailedPrecondition, match="killed by signal 9"):
        run(["sh", "-c", "kill -9 $$"])


def test_a_missing_program_tells_its_package() -> None:
    with pytest.raises(NotFound) as caught:
        run(["no-such-program"], package="the-package")
    assert caught.value.hint == "apt-get install the-package"


def test_a_program_that_hangs_is_ended() -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        run(["sleep", "60"], timeout_s=0.05)
    assert caught.value.details == "sleep 60"
