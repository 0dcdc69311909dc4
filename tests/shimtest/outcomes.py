"""What `go tool test2json` says of a run of the suite, read into one outcome a row. It computes.

A row is a test of a suite, with all that runs below it. Stress only holds others: each of them is one.
"""

import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from rpc.errors import DataLoss

CONFIG = "casemate"
"""The name of the configuration's file, which is in the names of tests."""
ABOVE = f"TestShim/{CONFIG}/"
STRESS = "Stress/"
PASSES, FAILS, LEFT_OUT = "passes", "fails", "left out"
_RESULTS = {"pass": PASSES, "fail": FAILS, "skip": LEFT_OUT}
_LINE = re.compile(r" +(\w+)\.go:\d+: (.*)")
_CLEANING_UP = {"helpers", "panic"}
"""The files whose lines follow a failure: the shim's log, and Go's, of what a test defers."""
_LAST_LINES = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """result: PASSES, FAILS or LEFT_OUT. words: the last line of the test's own, if it does not pass."""

    result: str
    words: str = ""


NO_END = Outcome(FAILS, "did not come to its end")


def row_of(test: str) -> str:
    """The row that a test belongs to, or "" for one that only holds others."""
    if not test.startswith(ABOVE):
        return "" if ABOVE.startswith(f"{test}/") else test
    names = test.removeprefix(ABOVE).split("/")
    if f"{names[0]}/" == STRESS:
        return "/".join(names[:2]) if len(names) > 1 else ""
    return names[0]


def name_of(row: str) -> str:
    """The test of the suite that has all of the row: the other way round."""
    return row if row.startswith("Fuzz") else ABOVE + row


class Reading:
    """Takes line by line, which a guest may have a part in."""

    def __init__(self) -> None:
        self._found: dict[str, Outcome] = {}
        self._words: dict[str, str] = {}
        self._lines: dict[str, deque[str]] = {}

    def take(self, line: str) -> str:
        """The row that has ended by it, or "". Raises DataLoss for a line that test2json did not write."""
        try:
            event = json.loads(line)
            action, test, output = event["Action"], event.get("Test", ""), event.get("Output", "")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataLoss("no line of `go tool test2json`", line[:200]) from error
        row = row_of(test) if test else ""
        if row and action == "run":
            self._found.setdefault(row, NO_END)
        elif row and action == "output":
            self._lines.setdefault(row, deque(maxlen=_LAST_LINES)).append(output)
            said = _LINE.match(output)
            if said and said[1] not in _CLEANING_UP:
                self._words[row] = said[2].strip()
        elif row and action in _RESULTS and test == name_of(row):
            result = _RESULTS[action]
            self._found[row] = Outcome(result, "" if result == PASSES else self._words.get(row, ""))
            return row
        return ""

    def text(self, row: str) -> str:
        """The last lines of all that the row has said."""
        return "".join(self._lines.get(row, ()))

    @property
    def found(self) -> Mapping[str, Outcome]:
        """By row, in the order in which they began."""
        return self._found
