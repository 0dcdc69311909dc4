"""The journal: what was added is read again, whatever was cut off, and what is damaged is said to be."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpc.errors import DataLoss
from shim import system
from shim.journal import Entry, Journal, Kind, read_journal

ENTRIES = [Entry(Kind.SOCKET, "/run/s/1"), Entry(Kind.PROCESS, "17", 900), Entry(Kind.CGROUP, "/sys/ü\n")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def write(path: Path, entries: list[Entry]) -> None:
    journal = Journal(path)
    for entry in entries:
        journal.add(entry)
    journal.close()


def test_entries_are_read_in_the_order_in_which_they_were_added(path: Path) -> None:
    write(path, ENTRIES)
    assert read_journal(path) == ENTRIES


def test_a_journal_is_continued_by_the_next_process(path: Path) -> None:
    write(path, ENTRIES[:1])
    write(path, ENTRIES[1:])
    assert read_journal(path) == ENTRIES


def test_an_entry_is_in_the_file_before_add_returns(path: Path) -> None:
    journal = Journal(path)
    journal.add(ENTRIES[0])
    assert read_journal(path) == ENTRIES[:1]
    journal.close()


def test_only_its_owner_may_read_it(path: Path) -> None:
    write(path, [])
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_an_empty_journal(path: Path) -> None:
    assert read_journal(path) == []


@given(data=st.data())
def test_whatever_the_crash_cut_off_the_lines_before_it_are_read(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    write(path, ENTRIES)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    assert read_journal(path) == ENTRIES[: content[:cut].count(b"\n")]


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "hologram", "value": "x", "started": 0}',
        '{"kind": "process", "value": "1"}',
        '{"kind": "process", "value": "1", "started": null}',
        '{"kind": "process", "value": "1", "started": 1e999}',
        '["process", "1", 0]',
        '{"kind": "process", "value": "0", "started": 1}',
        '{"kind": "process", "value": "-1", "started": 1}',
        '{"kind": "process", "value": "x", "started": 1}',
        '{"kind": "process", "value": "99999999999999999999", "started": 1}',
        "17",
        "{",
    ],
)
def test_a_line_that_means_nothing_is_named(path: Path, line: str) -> None:
    write(path, ENTRIES[:1])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataLoss, match=r"journal\.jsonl: line 2") as caught:
        read_journal(path)
    assert caught.value.hint


def test_a_line_that_is_not_text_is_named(path: Path) -> None:
    path.write_bytes(b'{"kind": "socket", "value": "\xff\xfe", "started": 0}\n')
    with pytest.raises(DataLoss, match=r"journal\.jsonl"):
        read_journal(path)


def test_a_process_is_known_by_its_start_time_too(path: Path) -> None:
    journal = Journal(path)
    journal.add_process(os.getpid())
    journal.close()
    assert read_journal(path) == [Entry(Kind.PROCESS, str(os.getpid()), system.start_time(os.getpid()))]


def test_a_process_is_looked_up_in_the_given_procfs(path: Path) -> None:
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    journal = Journal(path)
    journal.add_process(os.getpid(), proc)
    journal.close()
    os.close(proc)
    assert read_journal(path)[0].started == system.start_time("self")


def test_a_process_that_is_gone_is_no_entry(path: Path) -> None:
    pid = os.posix_spawn("/bin/true", ["true"], os.environ)
    os.waitpid(pid, 0)
    journal = Journal(path)
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        journal.add_process(pid)
    journal.close()
    assert read_journal(path) == []


def test_a_full_disk_is_an_error_at_once() -> None:
    journal = Journal(Path("/dev/full"))
    with pytest.raises(OSError, match="No space left"):
        journal.add(ENTRIES[0])
    journal.close()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond size: a full disk that takes the first half of a line."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_half_a_line_is_an_error_and_no_entry(path: Path) -> None:
    write(path, ENTRIES[:1])
    size = path.stat().st_size
    journal = Journal(path)
    with room_for(size + 10), pytest.raises(OSError, match="No space left"):
        journal.add(ENTRIES[1])
    journal.close()
    assert read_journal(path) == ENTRIES[:1]


def test_what_is_added_after_half_a_line_is_read(path: Path) -> None:
    """There is room again, and the same shim goes on."""
    write(path, ENTRIES[:1])
    journal = Journal(path)
    with room_for(path.stat().st_size + 10), pytest.raises(OSError, match="No space left"):
        journal.add(ENTRIES[1])
    journal.add(ENTRIES[2])
    journal.close()
    assert read_journal(path) == [ENTRIES[0], ENTRIES[2]]


TICKS = st.integers(0, 1 << 62)
PATHS = st.builds(Entry, st.sampled_from([Kind.SOCKET, Kind.CGROUP]), st.text(max_size=50), TICKS)
PROCESSES = st.builds(Entry, st.just(Kind.PROCESS), st.integers(2, (1 << 22) - 1).map(str), TICKS)


@given(st.lists(PATHS | PROCESSES))
def test_any_value_survives(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]) -> None:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    write(path, entries)
    assert read_journal(path) == entries
    assert all(json.loads(line) for line in path.read_text().splitlines())
