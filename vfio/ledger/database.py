"""The ledger's file: its tables, what the database itself sees to, and transactions that are all or nothing.

What no program may do, whatever its faults, is a trigger here: skip a state, change what the audit log says,
make a transition that it does not say. It must not know what a claim is for.
"""

import fcntl
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from config.places import LEDGER_FILE
from rpc.errors import (
    CasemateError,
    DataLoss,
    FailedPrecondition,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from vfio.ledger.records import MOVES, Cause, Instant

VERSION = 1
# A transaction takes milliseconds, and who is killed holds nothing; so this is a host whose disk hangs.
BUSY_S = 60.0

_TABLES = """
CREATE TABLE moves (
    before TEXT NOT NULL,
    after TEXT NOT NULL,
    PRIMARY KEY (before, after)
) WITHOUT ROWID;

-- Of the transaction that goes on: when it is and who it is, for the triggers.
CREATE TABLE act (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    wall_s REAL NOT NULL,
    uptime_s REAL NOT NULL,
    boot TEXT NOT NULL,
    actor TEXT NOT NULL
);
INSERT INTO act VALUES (1, 0, 0, '', '');

-- partitions: JSON, a list of names. page_bytes: 0 without huge pages.
CREATE TABLE claims (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    namespace TEXT NOT NULL,
    pod TEXT NOT NULL,
    tenant TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started INTEGER NOT NULL,
    boot TEXT NOT NULL,
    partitions TEXT NOT NULL,
    page_bytes INTEGER NOT NULL,
    made_s REAL NOT NULL,
    ended_s REAL
);
CREATE INDEX claims_that_hold ON claims (id) WHERE ended_s IS NULL;

-- The worker is who resets it.
CREATE TABLE devices (
    address TEXT PRIMARY KEY,
    state TEXT NOT NULL CHECK (state IN ('free', 'claimed', 'in use', 'resetting', 'quarantined')),
    claim INTEGER REFERENCES claims (id),
    reason TEXT NOT NULL DEFAULT '',
    since_s REAL NOT NULL,
    worker_pid INTEGER,
    worker_started INTEGER,
    worker_boot TEXT,
    CHECK (state NOT IN ('claimed', 'in use') OR claim IS NOT NULL),
    CHECK (state <> 'free' OR claim IS NULL),
    CHECK ((state = 'resetting') = (worker_pid IS NOT NULL)),
    CHECK ((state = 'quarantined') = (reason <> ''))
) WITHOUT ROWID;

-- Never deleted: who had what, and for how long. request: which of the claim's it was given for, or NULL for
-- a companion. seconds is NULL while the claim holds.
CREATE TABLE uses (
    claim INTEGER NOT NULL REFERENCES claims (id),
    address TEXT NOT NULL,
    request INTEGER,
    from_s REAL NOT NULL,
    from_uptime_s REAL NOT NULL,
    boot TEXT NOT NULL,
    to_s REAL,
    seconds REAL,
    PRIMARY KEY (claim, address)
) WITHOUT ROWID;
CREATE UNIQUE INDEX one_use_at_a_time ON uses (address) WHERE seconds IS NULL;

CREATE TABLE cpus (
    cpu INTEGER PRIMARY KEY,
    node INTEGER NOT NULL,
    claim INTEGER NOT NULL REFERENCES claims (id)
);

CREATE TABLE pages (
    claim INTEGER NOT NULL REFERENCES claims (id),
    node INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL,
    count INTEGER NOT NULL CHECK (count > 0),
    PRIMARY KEY (claim, node, size_bytes)
) WITHOUT ROWID;

-- Functions that are bound to another driver than the host's, or are about to be.
CREATE TABLE bindings (
    address TEXT PRIMARY KEY,
    claim INTEGER NOT NULL REFERENCES claims (id),
    driver TEXT NOT NULL,
    override TEXT NOT NULL,
    condition TEXT NOT NULL,
    boot TEXT NOT NULL,
    used INTEGER NOT NULL DEFAULT 0,
    clean INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;

CREATE TABLE audit (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    at_s REAL NOT NULL,
    uptime_s REAL NOT NULL,
    boot TEXT NOT NULL,
    actor TEXT NOT NULL,
    cause TEXT NOT NULL,
    address TEXT,
    claim INTEGER,
    before TEXT,
    after TEXT,
    detail TEXT NOT NULL
);
CREATE INDEX audit_of_device ON audit (address, number);
CREATE INDEX audit_of_boot ON audit (boot, uptime_s);
"""

# RAISE takes no expression before SQLite 3.47: the words are fixed.
_TRIGGERS = """
CREATE TRIGGER devices_move BEFORE UPDATE ON devices
    WHEN OLD.state <> NEW.state
        AND NOT EXISTS (SELECT 1 FROM moves WHERE before = OLD.state AND after = NEW.state)
    BEGIN SELECT RAISE(ABORT, 'a device cannot go from that state to this one'); END;
CREATE TRIGGER devices_skip_reset BEFORE UPDATE ON devices
    WHEN OLD.state = 'claimed' AND NEW.state = 'free'
        AND EXISTS (SELECT 1 FROM bindings WHERE address = OLD.address)
    BEGIN SELECT RAISE(ABORT, 'a device that was bound is not free before it is reset'); END;
CREATE TRIGGER devices_stay BEFORE DELETE ON devices
    BEGIN SELECT RAISE(ABORT, 'no device is forgotten'); END;
CREATE TRIGGER devices_change_hands BEFORE UPDATE ON devices
    WHEN OLD.claim IS NOT NULL AND NEW.claim IS NOT NULL AND OLD.claim <> NEW.claim
    BEGIN SELECT RAISE(ABORT, 'a device goes from one claim to another by way of being free'); END;

CREATE TRIGGER devices_new AFTER INSERT ON devices
    BEGIN
        INSERT INTO audit (at_s, uptime_s, boot, actor, cause, address, claim, before, after, detail)
            SELECT wall_s, uptime_s, boot, actor, 'state', NEW.address, NEW.claim, NULL, NEW.state, NEW.reason
            FROM act;
    END;
CREATE TRIGGER devices_moved AFTER UPDATE ON devices WHEN OLD.state <> NEW.state
    BEGIN
        INSERT INTO audit (at_s, uptime_s, boot, actor, cause, address, claim, before, after, detail)
            SELECT wall_s, uptime_s, boot, actor, 'state', NEW.address, coalesce(NEW.claim, OLD.claim),
                OLD.state, NEW.state, NEW.reason
            FROM act;
    END;

CREATE TRIGGER audit_kept BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;
CREATE TRIGGER audit_unchanged BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;
-- INSERT OR REPLACE deletes without asking the trigger above.
CREATE TRIGGER audit_not_replaced BEFORE INSERT ON audit
    WHEN NEW.number IN (SELECT number FROM audit)
    BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END;

CREATE TRIGGER uses_kept BEFORE DELETE ON uses
    BEGIN SELECT RAISE(ABORT, 'what was used stays written down'); END;
CREATE TRIGGER uses_unchanged BEFORE UPDATE ON uses
    WHEN OLD.seconds IS NOT NULL OR NEW.seconds IS NULL OR NEW.seconds < 0
        OR (NEW.claim, NEW.address, NEW.from_s, NEW.from_uptime_s, NEW.boot)
            IS NOT (OLD.claim, OLD.address, OLD.from_s, OLD.from_uptime_s, OLD.boot)
    BEGIN SELECT RAISE(ABORT, 'of a use only its end can be written, once'); END;
CREATE TRIGGER uses_not_replaced BEFORE INSERT ON uses
    WHEN EXISTS (SELECT 1 FROM uses WHERE claim = NEW.claim AND address = NEW.address)
    BEGIN SELECT RAISE(ABORT, 'what was used stays written down'); END;
CREATE TRIGGER claims_unchanged BEFORE UPDATE ON claims
    WHEN OLD.ended_s IS NOT NULL OR NEW.ended_s IS NULL
        OR (NEW.id, NEW.namespace, NEW.pod, NEW.tenant, NEW.made_s)
            IS NOT (OLD.id, OLD.namespace, OLD.pod, OLD.tenant, OLD.made_s)
    BEGIN SELECT RAISE(ABORT, 'of a claim only its end can be written, once'); END;
CREATE TRIGGER claims_kept BEFORE DELETE ON claims
    BEGIN SELECT RAISE(ABORT, 'what was claimed stays written down'); END;
"""

_KEEP_LAST_OF_BOOT = """
INSERT INTO audit (at_s, uptime_s, boot, actor, cause, detail)
    SELECT wall_s, uptime_s, boot, actor, ?, 'the last that was heard of it before it was booted' FROM act
    WHERE boot NOT IN ('', ?)
        AND uptime_s > (SELECT coalesce(max(uptime_s), 0) FROM audit WHERE audit.boot = act.boot)
"""


class Database:
    """One connection to DIRECTORY/ledger.sqlite, which is made if it is not there.

    For one process (a child that is forked opens its own), and one transaction at a time. Raises
    PermissionDenied where others than this user could read or write it, FailedPrecondition for the file of a
    newer version, DataLoss for a damaged one, ResourceExhausted and Unavailable for a full or hanging disk.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LEDGER_FILE
        self._turn = threading.Lock()
        with self._errors():
            _make_private(directory, self.path)
            # Whoever comes first makes the tables, alone: a change of the journal's mode waits for nobody.
            with _locked(directory):
                self._connection = self._opened()

    def close(self) -> None:
        with self._turn:
            self._connection.close()

    @contextmanager
    def writing(self, now: Instant, actor: str) -> Iterator[sqlite3.Connection]:
        """All that is done within is on the disk when it ends, or none of it. Nobody else writes then.

        So act says until when the host was up for certain, audit or not; of an earlier boot that is kept as a
        line of the audit log before it is written over.
        """
        with self._transaction("IMMEDIATE") as connection:
            connection.execute(_KEEP_LAST_OF_BOOT, (Cause.BOOT.value, now.boot))
            connection.execute(
                "UPDATE act SET wall_s = ?, uptime_s = ?, boot = ?, actor = ?",
                (now.wall_s, now.uptime_s, now.boot, actor),
            )
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """One moment of the ledger, whoever writes meanwhile."""
        with self._transaction("DEFERRED") as connection:
            yield connection

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[sqlite3.Connection]:
        with self._turn, self._errors():
            self._connection.execute(f"BEGIN {kind}")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _in_words(self.path, error) from error

    def _opened(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA recursive_triggers = ON")
            # What is said to be written is on the disk, also after a power cut.
            connection.execute("PRAGMA synchronous = FULL")
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                connection.execute("PRAGMA journal_mode = WAL")
                _create(connection)
            elif version != VERSION:
                raise FailedPrecondition(
                    f"{self.path} is of version {version}, and this casemate knows {VERSION}",
                    hint="a newer casemate wrote it; install that one again",
                )
        except BaseException:
            connection.close()
            raise
        return connection


def _create(connection: sqlite3.Connection) -> None:
    moves = ", ".join(f"('{before.value}', '{after.value}')" for before in MOVES for after in MOVES[before])
    connection.executescript(
        f"BEGIN EXCLUSIVE; {_TABLES} INSERT INTO moves VALUES {moves}; {_TRIGGERS} "
        f"PRAGMA user_version = {VERSION}; COMMIT;"
    )


def _make_private(directory: Path, path: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    # SQLite gives what it makes beside the file the file's mode.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
    for place in (directory, path):
        about = place.stat(follow_symlinks=False)
        if about.st_uid != os.geteuid() or stat.S_IMODE(about.st_mode) & 0o077:
            raise PermissionDenied(
                f"{place} is not this user's alone",
                hint=f"whoever can write it can have any device: chown and chmod go-rwx {place}",
            )


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _in_words(path: Path, error: sqlite3.Error) -> CasemateError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Unavailable(f"{path}: others have written for {BUSY_S:.0f} s", str(error))
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(f"{path}: there is no space left to write to", str(error))
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DataLoss(
            f"{path} is damaged",
            str(error),
            "end all pods with devices, move the file away, and bind the devices to their drivers by hand",
        )
    return FailedPrecondition(f"{path}: {error}")
