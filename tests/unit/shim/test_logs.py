"""The shim's log: complete in its own file, as much as containerd takes in its FIFO."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from shim.logs import FifoHandler, Logfmt, set_up_logging

log = logging.getLogger("casemate.test")


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """The root logger as it was, afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers[:]:
        if handler not in handlers:
            if isinstance(handler, FifoHandler):
                os.close(handler._fd)
            root.removeHandler(handler)
    root.setLevel(level)


def formatted(message: str, *arguments: object) -> str:
    return Logfmt().format(logging.LogRecord("x", logging.WARNING, "", 0, message, arguments, None))


def test_lines_are_as_containerds_own() -> None:
    line = formatted("pod %s: %s", "web", 'it said "no"')
    pattern = r'time="\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z" level=warning msg="(.*)" runtime=casemate'
    match = re.fullmatch(pattern, line)
    assert match is not None
    assert match[1] == r"pod web: it said \"no\""


def test_a_record_is_one_line_whatever_is_in_it() -> None:
    line = formatted("a\nb\\c")
    assert "\n" not in line
    assert r"a\nb\\c" in line


@pytest.mark.parametrize("character", ["\r", "\x1b", "\x00", "\x9b"])
def test_no_control_character_reaches_a_terminal(character: str) -> None:
    """Clients choose names and paths, guests choose words."""
    assert character not in formatted(f"mount {character}[31m")


def test_an_exception_is_told_with_where_it_was(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    set_up_logging("info", str(tmp_path))
    try:
        raise KeyError("web")
    except KeyError:
        log.exception("a task of the pod failed")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "KeyError: 'web'" in err
    assert "test_logs.py" in err


def test_the_level_is_the_operators(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    set_up_logging("warning", str(tmp_path))
    log.info("chatter")
    log.warning("trouble")
    err = capsys.readouterr().err
    assert "trouble" in err
    assert "chatter" not in err


def test_containerd_gets_the_log_while_it_reads(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    set_up_logging("info", str(tmp_path))
    log.info("pod is up")
    assert b'msg="pod is up"' in os.read(reader, 1000)
    os.close(reader)
    log.info("containerd is gone")  # no error, no signal


def test_a_containerd_that_does_not_read_holds_up_nobody(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    set_up_logging("info", str(tmp_path))
    for _ in range(100):
        log.info("x" * 4000)
    os.close(reader)


def test_without_a_reader_there_is_the_own_log_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    os.mkfifo(tmp_path / "log")
    set_up_logging("info", str(tmp_path))
    log.info("alone")
    assert "alone" in capsys.readouterr().err
    assert len(os.listdir("/proc/self/fd")) == before
