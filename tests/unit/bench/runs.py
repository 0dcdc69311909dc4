"""Runs that never happened: documents with the samples that a test wants to have read."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench import measures
from bench.document import Document, Life, WayFacts
from bench.instance import RUNTIME
from bench.turns import Sample, Value, take_turns
from shim.trace import GUEST, Span

HOST = {
    "cpus": 2,
    "cpu_model": "a CPU",
    "memory_bytes": 8 << 30,
    "kernel": "6.1.0",
    "cgroups": "v2",
    "load": 0.1,
    "load_after": 0.9,
}


def samples(measure: str, values: Mapping[str, Sequence[float]], source: str = "") -> list[Sample]:
    """values: of each way one per round, taken in turns."""
    left = {way: iter(found) for way, found in values.items()}
    actions = {way: (lambda of=of: [Value(measure, next(of), source)]) for way, of in left.items()}
    return take_turns(actions, len(next(iter(values.values()))))


def document(
    kind: str = "boot",
    found: Sequence[Sample] = (),
    *,
    accel: str = "tcg",
    source: str = "boot",
    memory_bytes: int = 256 * measures.MIB,
    options: Mapping[str, Any] | None = None,
    lives: Sequence[Life] = (),
    machine: str = "",
) -> Document:
    casemate = WayFacts("casemate", RUNTIME, "abc1234", accel, "because", (source,), 1, memory_bytes)
    return Document(
        kind=kind,
        ways=(WayFacts("runc", "io.containerd.runc.v2"), casemate),
        samples=tuple(found),
        host=HOST,
        versions={"containerd": "2.1.9"},
        options={"rounds": 3, **(options or {})},
        lives=tuple(lives),
        began_at=1_750_000_000.0,
        machine=machine,
    )


def life(way: str, *names: str) -> Life:
    spans = tuple(Span(name, 100.1 + number, 100.9 + number, GUEST) for number, name in enumerate(names))
    return Life(way, 1, 100.0, 103.0, 103.5, spans)
