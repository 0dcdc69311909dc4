"""One run's file: the machine, the versions, each way, every sample with its turn. JSON out and in again.

What is in a file that says it is one of ours is checked once, here; the rest trusts it.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from bench.measures import MEASURES, MIB
from bench.turns import Sample
from rpc.errors import DataLoss, NotFound
from shim.trace import Span

SCHEMA = 1
KINDS = ("boot", "exec", "delete", "density", "io", "files")
_FLAGS = {
    "rounds": ("--rounds", 1),
    "parallel": ("--parallel", 1),
    "crowd": ("--parallel", 1),
    "pods": ("--pods", 1),
    "settle_s": ("--settle", 1),
    "size_bytes": ("--size", MIB),
}
_ALONE = (("parallel", 1), ("crowd", 1))

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WayFacts:
    """A way and the guests it had. accel is empty where the runtime does not say; sources: "boot" ...

    casemated: whether it ran beside. files: how the containers' files came to their guests, "9p" ...
    """

    name: str
    runtime: str
    commit: str = ""
    accel: str = ""
    accel_reason: str = ""
    sources: tuple[str, ...] = ()
    vcpus: int = 0
    memory_bytes: int = 0
    casemated: bool = False
    files: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Life:
    """One container's life as its client saw it, with the spans that a shim wrote; monotonic seconds."""

    way: str
    turn: int
    exec_s: float
    exit_s: float
    gone_s: float
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class ProcessShare:
    """Bytes of PSS of all processes of one name and way, divided by the pods; of it what is guest RAM."""

    way: str
    name: str
    pss_bytes: float
    guest_ram_bytes: float


@dataclass(frozen=True, slots=True)
class Trials:
    """How many things that programs expect of a file system were tried, and what was not so, in its words."""

    way: str
    tried: int
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """A client of many at once that did not end with 0, in its own words. round: from 0."""

    way: str
    round: int
    text: str


@dataclass(frozen=True, slots=True)
class Document:
    """began_at is Unix time in seconds. options are those of the command line. files: the guest image's.

    machine: what whoever measured calls it, or empty; a report keeps runs of several machines apart by it.
    """

    kind: str
    ways: tuple[WayFacts, ...]
    samples: tuple[Sample, ...]
    host: Mapping[str, Any]
    versions: Mapping[str, str]
    options: Mapping[str, Any]
    lives: tuple[Life, ...] = ()
    processes: tuple[ProcessShare, ...] = ()
    failures: tuple[Failure, ...] = ()
    files: Mapping[str, int] = field(default_factory=dict)
    run: str = field(default_factory=lambda: uuid4().hex)
    began_at: float = field(default_factory=time.time)
    took_s: float = 0.0
    machine: str = ""
    trials: tuple[Trials, ...] = ()

    @property
    def reference(self) -> str:
        """The way that the others are compared with: the first."""
        return self.ways[0].name

    @property
    def accel(self) -> WayFacts | None:
        """A way that says what accelerated its guests; None if none does."""
        return next((way for way in self.ways if way.accel), None)

    @property
    def command(self) -> str:
        """What measures the same."""
        words = ["casemate bench", self.kind]
        words += [f"--runtime {name}" for name in self.options.get("runtimes", ())]
        for option, (flag, scale) in _FLAGS.items():
            if option in self.options and (option, self.options[option]) not in _ALONE:
                words.append(f"{flag} {self.options[option] / scale:g}")
        return " ".join(words)

    def measures(self) -> list[str]:
        there = {sample.measure for sample in self.samples}
        return [name for name in MEASURES if name in there]

    def values(self, way: str, measure: str) -> list[float]:
        return [sample.value for sample in self.samples if (sample.way, sample.measure) == (way, measure)]

    def sources(self, way: str, measure: str) -> set[str]:
        return {sample.source for sample in self.samples if (sample.way, sample.measure) == (way, measure)}

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "program": "casemate bench", **asdict(self)}


def read(path: Path) -> Document:
    """Raises NotFound, or DataLoss for what is not one of our files."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    try:
        return from_json(json.loads(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataLoss(f"{path} is not a file of `casemate bench`", details=repr(error)) from None


def from_json(given: Mapping[str, Any]) -> Document:
    """Raises ValueError, TypeError, KeyError or AttributeError for what to_json() cannot have given."""
    values = dict(given)
    if (values.pop("schema"), values.pop("program")) != (SCHEMA, "casemate bench"):
        raise ValueError("of another program or version")
    values["ways"] = _records(
        WayFacts,
        (
            {**way, "sources": tuple(way["sources"]), "files": tuple(way.get("files", ()))}
            for way in given["ways"]
        ),
    )
    values["trials"] = _records(
        Trials, ({**one, "differences": tuple(one["differences"])} for one in given.get("trials", ()))
    )
    values["samples"] = _records(Sample, given["samples"])
    values["processes"] = _records(ProcessShare, given["processes"])
    values["failures"] = _records(Failure, given.get("failures", ()))
    values["lives"] = _records(
        Life, ({**life, "spans": _records(Span, life["spans"])} for life in given["lives"])
    )
    document = Document(**values)
    _check(document)
    return document


def _records(kind: type[T], rows: Iterable[Mapping[str, Any]]) -> tuple[T, ...]:
    return tuple(kind(**row) for row in rows)


def _check(document: Document) -> None:
    names = {way.name for way in document.ways}
    if document.kind not in KINDS or not document.ways or len(names) != len(document.ways):
        raise ValueError("no such kind of run, or ways without names of their own")
    for sample in document.samples:
        if sample.way not in names or sample.measure not in MEASURES:
            raise ValueError(f"a sample of {sample.way!r}, {sample.measure!r}")
        if type(sample.turn) is not int or type(sample.round) is not int or not isfinite(sample.value):
            raise ValueError("a sample without a turn or a value")
    for trials in document.trials:
        if trials.way not in names or not len(trials.differences) <= trials.tried:
            raise ValueError(f"trials of {trials.way!r}")
    for failure in document.failures:
        if failure.way not in names or type(failure.round) is not int:
            raise ValueError(f"a failure of {failure.way!r}")
    for life in document.lives:
        if life.way not in names or not life.exec_s <= life.exit_s <= life.gone_s:
            raise ValueError(f"a life of {life.way!r} that does not go forward")


def write(document: Document, path: Path) -> None:
    path.write_text(text(document))


def text(document: Document) -> str:
    """One sample to a line: what changed between two runs can be seen in a diff."""
    lines: Sequence[str] = [
        f'"{key}": ' + (_rows(value) if key in ("samples", "processes") else json.dumps(value))
        for key, value in document.to_json().items()
    ]
    return "{" + ",\n".join(lines) + "}\n"


def _rows(rows: Iterable[Mapping[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "]"
