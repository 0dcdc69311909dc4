"""Following files, step by step in this process: each event is made before it is waited for."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli.follow import follow
from tests.unit.cli.conftest import Shim

NewShim = Callable[[], Shim]


@pytest.fixture
def shim(new_shim: NewShim) -> Shim:
    return new_shim()


@pytest.fixture
def process(shim: Shim) -> Iterator[int]:
    descriptor = os.pidfd_open(shim.pid)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "pod/shim.log"
    path.parent.mkdir()
    path.write_text("old\n")
    return path


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def test_what_is_there_what_is_added_and_the_end(log: Path, process: int, shim: Shim) -> None:
    news = follow(log.parent, [log], process)
    assert next(news) == (log, b"old\n")
    append(log, "new\n")
    assert next(news) == (log, b"new\n")
    append(log, "last\n")
    shim.kill()
    assert list(news) == [(log, b"last\n")]


def test_a_process_that_is_gone_already_leaves_what_is_there(log: Path, process: int, shim: Shim) -> None:
    shim.kill()
    assert list(follow(log.parent, [log], process)) == [(log, b"old\n")]


def test_a_directory_that_is_gone_already_is_the_end(tmp_path: Path, process: int) -> None:
    assert list(follow(tmp_path / "gone", [tmp_path / "gone/x"], process)) == []


def test_a_removed_directory_is_the_end(log: Path, process: int, tmp_path: Path) -> None:
    news = follow(log.parent, [log], process)
    next(news)
    append(log, "bye\n")
    log.rename(tmp_path / "aside")
    log.parent.rmdir()
    assert list(news) == [(log, b"bye\n")]


def test_a_moved_directory_is_the_end(log: Path, process: int, tmp_path: Path) -> None:
    news = follow(log.parent, [log], process)
    next(news)
    append(log, "bye\n")
    log.parent.rename(tmp_path / "ended")
    assert list(news) == [(log, b"bye\n")]


def test_a_file_that_appears_later_is_read_from_its_beginning(log: Path, process: int) -> None:
    console = log.parent / "console.log"
    news = follow(log.parent, [log, console], process)
    assert next(news) == (log, b"old\n")
    console.write_text("hello\n")
    assert next(news) == (console, b"hello\n")


def test_a_replaced_file_is_read_to_its_end_and_the_new_one_from_its_beginning(
    log: Path, process: int
) -> None:
    news = follow(log.parent, [log], process)
    next(news)
    append(log, "end\n")
    (log.parent / "new").write_text("begin\n")
    (log.parent / "new").rename(log)
    assert [next(news), next(news)] == [(log, b"end\n"), (log, b"begin\n")]


def test_a_file_that_was_cut_is_read_anew(log: Path, process: int) -> None:
    news = follow(log.parent, [log], process)
    next(news)
    log.write_text("x\n")
    assert next(news) == (log, b"x\n")


def test_a_large_file_comes_in_pieces(log: Path, process: int, shim: Shim) -> None:
    log.write_bytes(b"x" * 200_000)
    shim.kill()
    pieces = [data for _, data in follow(log.parent, [log], process)]
    assert len(pieces) > 1
    assert sum(map(len, pieces)) == 200_000


def test_no_descriptor_is_left_open(log: Path, process: int) -> None:
    before = set(os.listdir("/proc/self/fd"))
    news = follow(log.parent, [log], process)
    next(news)
    assert set(os.listdir("/proc/self/fd")) > before
    news.close()  # type: ignore[attr-defined]  # it is a generator
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_directory_that_is_a_file_is_an_error(log: Path, process: int) -> None:
    with pytest.raises(NotADirectoryError):
        next(follow(log, [log], process))


def test_an_interrupt_gets_through(log: Path, process: int) -> None:
    """Ctrl-C while nothing happens."""
    news = follow(log.parent, [log], process)
    next(news)
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            next(news)
    finally:
        signal.signal(signal.SIGALRM, previous)
