"""What came of the tests that docs/clients.md is made of, when they last ran and somebody had that recorded.

`sudo make test CASEMATE_RECORD_CLIENTS=1` adds what it has run to tests/clients.json, which is committed with
the page. It must not know what the page looks like.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

VARIABLE = "CASEMATE_RECORD_CLIENTS"
CHECKOUT = Path(__file__).resolve().parent.parent
FILE = CHECKOUT / "tests" / "clients.json"
MARK = "client"
_WORST = ("passed", "skipped", "failed")


@dataclass(frozen=True, slots=True)
class Record:
    """outcome: pytest's, the worst of a test's parameters and phases. date: YYYY-MM-DD, UTC."""

    outcome: str
    date: str
    commit: str


def read(file: Path = FILE) -> dict[str, Record]:
    """By test, as key() has it."""
    found: dict[str, dict[str, str]] = json.loads(file.read_text()) if file.exists() else {}
    return {test: Record(**about) for test, about in found.items()}


def key(path: str, name: str) -> str:
    """Of a test of this name in tests/PATH."""
    return f"{path}::{name}"


class Recorder:
    """A plug-in of pytest's."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._outcomes: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Of one that was interrupted nothing is known but that it began.
        if MARK in report.keywords and (report.when == "call" or report.outcome != "passed"):
            path, _, name = report.nodeid.partition("::")
            test = key(path.removeprefix("tests/"), name.partition("[")[0])
            before = self._outcomes.get(test, _WORST[0])
            self._outcomes[test] = max(before, report.outcome, key=_WORST.index)

    def pytest_sessionfinish(self) -> None:
        if self._outcomes:
            write(self._file, self._outcomes, datetime.now(UTC).date().isoformat(), _commit())


def write(file: Path, outcomes: Mapping[str, str], date: str, commit: str) -> None:
    """Those of tests that did not run stay as they were."""
    found = read(file) | {test: Record(outcome, date, commit) for test, outcome in outcomes.items()}
    lines = (f"{json.dumps(test)}: {json.dumps(asdict(found[test]))}" for test in sorted(found))
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _commit() -> str:
    """A plus where files of it were changed, but for what is written of results."""
    written = (":!tests/clients.json", ":!docs/clients.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)
    return _git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", "-C", str(CHECKOUT), *words], check=True, capture_output=True, text=True
    ).stdout.strip()
