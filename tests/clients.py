"""docs/clients.md: what clients ask for, and what comes of it, made of tests and their results.

A test of tests/vm or tests/kubernetes says `@pytest.mark.client(WHAT, OUTCOME, HOW)` of what it holds: WHAT
is what a user types, OUTCOME one of the three below. Whether it ran, and passed, is what tests/recorded.py
keeps. `python -m tests.clients` writes the page, which tests/unit/project checks.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import recorded
from tests.recorded import Record

CHECKOUT = Path(__file__).resolve().parent.parent
PAGE = CHECKOUT / "docs" / "clients.md"
FOLDERS = ("vm", "kubernetes")
OUTCOMES = ("works", "differs", "refused")
HEAD = """\
# What clients ask for

Each row is what a test of tests/vm shows, which the row names: `sudo make test` fails if it is not so any
more. Those of kubectl are of tests/kubernetes, with a real kubelet and API server: CI does not run these, as
building Kubernetes takes long, `sudo make kubernetes` does. *Works* is as with runc, *differs* as said,
*refused* by an error that says what and why. What is not listed was not tried. What containerd's own tests of
shims find is in [shimtest.md](shimtest.md).

What a row says comes from a mark of its test, and whether that test passed from the last run that was
recorded, of `sudo make test CASEMATE_RECORD_CLIENTS=1`, which writes tests/clients.json: each client has the
days and commits of these runs, a plus for changes beyond one. A row whose test did not pass, or was not run,
says so.
`python -m tests.clients` writes this page of both.

nerdctl is 2.2, built from its sources with containerd 2.x. `nerdctl run --runtime io.containerd.casemate.v2`.

Docker is Debian 13's (26.1), on both releases, with containerd 1.7. `docker run --runtime
io.containerd.casemate.v2`, or `"default-runtime": "io.containerd.casemate.v2"` in its daemon.json.
"""


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    outcome: str
    how: str
    test: str
    key: str

    @property
    def client(self) -> str:
        return self.what.split()[0]


def rows() -> list[Row]:
    """Those of all tests, by client, otherwise as they stand there. Raises ValueError for a malformed one."""
    paths = [path for folder in FOLDERS for path in sorted((CHECKOUT / "tests" / folder).glob("test_*.py"))]
    found = [row for path in paths for row in _rows_of(path)]
    return sorted(found, key=lambda row: row.client)


def _rows_of(path: Path) -> Iterator[Row]:
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.client":
                what, outcome, how = [ast.literal_eval(argument) for argument in decorator.args]
                if outcome not in OUTCOMES or not what:
                    raise ValueError(f"{path.name}: {node.name}: {what!r} {outcome!r}")
                test = f"{path.stem.removeprefix('test_')}: {node.name}"
                yield Row(
                    what, outcome, how, test, recorded.key(f"{path.parent.name}/{path.name}", node.name)
                )


def page() -> str:
    listed, records = rows(), recorded.read()
    clients = dict.fromkeys(row.client for row in listed)
    return HEAD + "".join(
        section(client, [row for row in listed if row.client == client], records) for client in clients
    )


def section(client: str, listed: Sequence[Row], records: Mapping[str, Record]) -> str:
    """records: by a row's key."""
    found = [records[row.key] for row in listed if row.key in records]
    passed = {f"{about.date} ({about.commit})": None for about in found if about.outcome == "passed"}
    text = f"\n## {client}\n\n"
    if passed:
        text += f"Passed {', '.join(sorted(passed))}.\n\n"
    text += "| what | | how | test |\n|---|---|---|---|\n"
    for row in listed:
        shown = row.what.removeprefix(client).strip()
        outcome = row.outcome + _doubt(records.get(row.key))
        text += f"| {shown} | {outcome} | {row.how} | {row.test.replace('test_', '', 1)} |\n"
    return text


def _doubt(about: Record | None) -> str:
    if about is None:
        return " (no run of its test is recorded)"
    if about.outcome == "passed":
        return ""
    return f" (its test {_PAST[about.outcome]} {about.date}, {about.commit})"


_PAST = {"skipped": "was skipped", "failed": "failed"}


if __name__ == "__main__":
    PAGE.write_text(page())
