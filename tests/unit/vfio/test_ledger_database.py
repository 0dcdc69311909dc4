"""The ledger's file: private, append-only where it says so, no state skipped, whoever writes to it."""

import os
import sqlite3
from pathlib import Path

import pytest

from config.places import LEDGER_FILE as FILE
from rpc.errors import DataLoss, FailedPrecondition, PermissionDenied
from tests.unit.vfio.hosts import OTHER, OWNER, POD, WORKER, at, plain
from vfio.ledger.database import VERSION
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import MOVES, Binding, State

ONE = at("01:00.0")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A ledger with one device in use, one that was used and is quarantined, and a claim that has ended."""
    directory = tmp_path / "state/ledger"
    with Ledger(directory) as ledger:
        claim = ledger.claim(POD, OWNER, Wanted((Request(),)), plain(2)).id
        ledger.use(claim)
        ended = ledger.claim(OTHER, OWNER, Wanted((Request(),)), plain(2)).id
        ledger.bind(ended, [Binding(at("02:00.0"), ended, "nvidia", "")])
        ledger.release(ended, WORKER)
        ledger.quarantine(at("02:00.0"), "for the test")
    return directory


def raw(directory: Path) -> sqlite3.Connection:
    """Another program's connection, that knows nothing of the ledger's rules."""
    return sqlite3.connect(directory / FILE, isolation_level=None)


def test_only_its_user_can_read_it(directory: Path) -> None:
    with Ledger(directory) as ledger:
        ledger.devices()
        modes = {path.name: path.stat().st_mode & 0o777 for path in [directory, *directory.iterdir()]}
    assert modes.pop("ledger") == 0o700
    assert set(modes) >= {FILE, f"{FILE}-wal"}
    assert set(modes.values()) == {0o600}


@pytest.mark.parametrize("name", [".", FILE])
def test_one_that_others_may_write_is_refused(directory: Path, name: str) -> None:
    (directory / name).chmod(0o770)
    with pytest.raises(PermissionDenied, match="is not this user's alone"):
        Ledger(directory)


def test_a_file_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir(mode=0o700)
    (tmp_path / "ledger" / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Ledger(tmp_path / "ledger")
    assert not (tmp_path / "elsewhere").exists()


def test_commits_are_on_the_disk_before_they_are_said_to_be(directory: Path) -> None:
    with Ledger(directory) as ledger, ledger._database.reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM audit",
        "DELETE FROM audit WHERE number = 1",
        "UPDATE audit SET detail = 'nothing'",
        (
            "REPLACE INTO audit SELECT 1, at_s, uptime_s, boot, 'me', cause, address, claim, before, after,"
            " detail FROM audit WHERE number = 2"
        ),
        "INSERT OR REPLACE INTO audit SELECT * FROM audit WHERE number = 1",
        "DELETE FROM uses",
        "UPDATE uses SET seconds = 1 WHERE seconds IS NOT NULL",
        "UPDATE uses SET seconds = NULL, to_s = NULL WHERE seconds IS NOT NULL",
        "UPDATE uses SET from_s = from_s + 10, seconds = 1 WHERE seconds IS NULL",
        "UPDATE uses SET seconds = -1 WHERE seconds IS NULL",
        "REPLACE INTO uses SELECT claim, address, request, from_s, from_uptime_s, boot, to_s, 0.0 FROM uses",
        "DELETE FROM claims",
        "UPDATE claims SET tenant = 'another'",
        "UPDATE claims SET ended_s = NULL",
        "DELETE FROM devices",
        "UPDATE devices SET claim = 2 WHERE claim = 1",
    ],
)
def test_what_was_is_not_changed(directory: Path, statement: str) -> None:
    with Ledger(directory) as ledger:
        before = ledger.log(), ledger.usage(), ledger.claims(), ledger.devices()
    connection = raw(directory)
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    connection.close()
    with Ledger(directory) as ledger:
        after = ledger.log(), ledger.usage(), ledger.claims(), ledger.devices()
    assert before[0] == after[0]
    assert before[2:] == after[2:]
    assert [use.to_s for use in before[1]] == [use.to_s for use in after[1]]


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_no_program_skips_a_state(tmp_path: Path, before: State, after: State) -> None:
    if before is after:
        return
    with Ledger(tmp_path / "ledger") as ledger:
        claim = ledger.claim(POD, OWNER, Wanted((Request(),)), plain(1)).id
        if before in (State.IN_USE, State.RESETTING, State.QUARANTINED):
            ledger.use(claim)
        if before in (State.RESETTING, State.QUARANTINED):
            ledger.release(claim, WORKER)
        if before is State.QUARANTINED:
            ledger.quarantine(ONE, "x")
        if before is State.FREE:
            ledger.release(claim, WORKER)
        lines = len(ledger.log(ONE))
    columns = {
        State.FREE: "claim = NULL, reason = '', worker_pid = NULL",
        State.CLAIMED: f"claim = {claim}, reason = '', worker_pid = NULL",
        State.IN_USE: f"claim = {claim}, reason = '', worker_pid = NULL",
        State.RESETTING: "reason = '', worker_pid = 1",
        State.QUARANTINED: "reason = 'x', worker_pid = NULL",
    }[after]
    connection = raw(tmp_path / "ledger")
    statement = f"UPDATE devices SET state = '{after.value}', {columns}"
    if after in MOVES[before]:
        connection.execute(statement)
    else:
        with pytest.raises(sqlite3.IntegrityError, match="from that state to this one"):
            connection.execute(statement)
    connection.close()
    with Ledger(tmp_path / "ledger") as ledger:
        # What another program did is in the log as well.
        assert len(ledger.log(ONE)) == lines + (after in MOVES[before])


def test_no_program_frees_a_bound_device_without_a_reset(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger") as ledger:
        claim = ledger.claim(POD, OWNER, Wanted((Request(),)), plain(1)).id
        ledger.bind(claim, [Binding(ONE, claim, "nvidia", "")])
    connection = raw(tmp_path / "ledger")
    with pytest.raises(sqlite3.IntegrityError, match="is not free before it is reset"):
        connection.execute("UPDATE devices SET state = 'free', claim = NULL")
    connection.close()


def test_the_file_of_a_newer_version_is_left_alone(directory: Path) -> None:
    connection = raw(directory)
    connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    with pytest.raises(FailedPrecondition, match=f"is of version {VERSION + 1}"):
        Ledger(directory)


def test_a_damaged_file_is_named(directory: Path) -> None:
    with (directory / FILE).open("r+b") as file:
        file.seek(0)
        file.write(os.urandom(8192))
    with pytest.raises(DataLoss, match="is damaged"):
        Ledger(directory)


def test_a_mistake_of_ours_within_a_transaction_leaves_nothing(directory: Path) -> None:
    with Ledger(directory) as ledger:
        before = ledger.devices(), ledger.log()
        database = ledger._database
        with pytest.raises(ZeroDivisionError), database.writing(ledger._clock(), "me") as connection:
            connection.execute(
                "INSERT INTO audit (at_s, uptime_s, boot, actor, cause, detail) VALUES (0,0,'','','','')"
            )
            print(1 / 0)
        assert (ledger.devices(), ledger.log()) == before
        ledger.restored(at("02:00.0"))
        ledger.clear(at("02:00.0"))  # the connection is as good as before
