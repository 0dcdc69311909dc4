"""What casemated writes to the ledger while pods have devices, and that it leaves it alone while none has."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from node import witness
from node.witness import EVERY_S, Witness
from tests.unit.vfio.hosts import BOOT, OWNER, POD, WORKER, plain
from vfio.ledger.demand import Request, Wanted
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Instant


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def look(directory: Path, said: list[str]) -> Callable[[], None]:
    return Witness(str(directory), said.append).look


def claimed(directory: Path) -> int:
    with Ledger(directory, clock=lambda: Instant(1000.0, 100.0, BOOT)) as ledger:
        return ledger.claim(POD, OWNER, Wanted((Request(),)), plain(1)).id


def written(directory: Path) -> tuple[str, str]:
    """Who has written last, in which boot."""
    with Ledger(directory) as ledger, ledger._database.reading() as connection:
        actor, boot = connection.execute("SELECT actor, boot FROM act").fetchone()
        return actor.partition(",")[0], boot


def test_a_claim_is_said_to_hold_and_the_log_is_no_longer(
    directory: Path, look: Callable[[], None], said: list[str]
) -> None:
    claimed(directory)
    with Ledger(directory) as ledger:
        before = len(ledger.log())
    look()
    assert written(directory)[0] == "casemated"
    with Ledger(directory) as ledger:
        (use,) = ledger.usage()
        # The claim was of another boot, of which this is the first that is heard.
        assert use.seconds == 0.0
        assert len(ledger.log()) == before
    assert said == []


def test_no_ledger_is_made(directory: Path, look: Callable[[], None]) -> None:
    look()
    assert not directory.exists()


def test_a_ledger_of_which_nobody_has_anything_is_opened_once(
    directory: Path, look: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claimed(directory)
    with Ledger(directory) as ledger:
        ledger.release(claim, WORKER)
    opened = opens(monkeypatch)
    age(directory, -3600)
    look()
    look()
    assert len(opened) == 2  # it was changed just now: a change after that might not be seen
    age(directory, 7200)
    opened.clear()
    look()
    look()
    assert len(opened) == 1
    claim = claimed(directory)
    opened.clear()
    look()
    look()
    assert len(opened) == 2  # one that holds is written down each time
    with Ledger(directory) as ledger:
        ledger.release(claim, WORKER)
    age(directory)
    opened.clear()
    look()
    look()
    assert len(opened) == 1


def age(directory: Path, by_s: float = 3600) -> None:
    """As if all that was written to it had been so this long ago."""
    for path in directory.iterdir():
        then_s = path.stat().st_mtime - by_s
        os.utime(path, (then_s, then_s))


def opens(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories of the ledgers that are opened from now on."""
    from vfio.ledger import ledger as module

    opened: list[Path] = []

    def noted(directory: Path, *, actor: str) -> Ledger:
        opened.append(directory)
        return Ledger(directory, actor=actor)

    monkeypatch.setattr(module, "Ledger", noted)
    return opened


def test_it_looks_once_a_minute(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 5000.0
    monkeypatch.setattr(witness, "time", Turned(lambda: now_s))
    watch = Witness(str(directory), print)
    claimed(directory)
    opened = opens(monkeypatch)
    watch.tend()
    assert watch.due_s == now_s + EVERY_S
    for _ in range(3):
        now_s += 30.0
        watch.tend()
    assert len(opened) == 2
    assert watch.due_s == now_s - 30.0 + EVERY_S


class Turned:
    """The module time, whose clock goes on by hand."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic


def test_a_ledger_that_cannot_be_written_is_complained_about_once(
    directory: Path, look: Callable[[], None], said: list[str]
) -> None:
    claimed(directory)
    directory.chmod(0o755)
    look()
    look()
    assert len(said) == 1
    assert f"{directory} is not this user's alone" in said[0]
    directory.chmod(0o700)
    look()
    look()
    assert said[1:] == ["how long devices are held is written down again"]


def test_who_has_no_right_to_look_does_not_end(look: Callable[[], None], directory: Path) -> None:
    directory.write_text("a file where the directory should be")
    look()
