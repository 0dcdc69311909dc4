"""What a check says, and what checks are given. Declares data; looks at nothing itself."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from config.settings import Settings


class Level(Enum):
    OK = "ok"
    WARNING = "warning"  # pods run, something is slower, weaker or missing
    FAILURE = "failure"  # no pod starts


@dataclass(frozen=True, slots=True)
class Result:
    """One line: what was looked at, what was found, and for anything but ok, what to do."""

    name: str
    level: Level
    found: str
    fix: str | None = None


@dataclass(frozen=True, slots=True)
class CheckContext:
    """The host to look at. root is another directory only in tests, with a tree of files like a host's."""

    settings: Settings
    containerd: str  # the path of its socket
    root: Path = field(default=Path("/"))

    def path(self, absolute: str) -> Path:
        return self.root / absolute.lstrip("/")


Check = Callable[[CheckContext], Iterator[Result]]


def ok(name: str, found: str) -> Result:
    return Result(name, Level.OK, found)


def warning(name: str, found: str, fix: str) -> Result:
    return Result(name, Level.WARNING, found, fix)


def failure(name: str, found: str, fix: str | None) -> Result:
    return Result(name, Level.FAILURE, found, fix)
