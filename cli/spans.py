"""The spans of one pod's trace.json, as a tree with what was not traced made visible.

Arithmetic only: drawing is waterfall.py's, Chrome's format is chrome.py's.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from rpc.errors import DataLoss, NotFound
from shim.phases import RUN

GUEST = "guest"


@dataclass(frozen=True, slots=True)
class Span:
    """One phase: host CLOCK_MONOTONIC seconds; end_s None while it goes on."""

    name: str
    start_s: float
    end_s: float | None
    where: str
    parent: str | None
    detail: str


@dataclass(frozen=True, slots=True)
class Node:
    """A span with what happened within it."""

    span: Span
    end_s: float  # of an open span, the trace's end
    children: list["Node"] = field(default_factory=list)

    @property
    def duration_s(self) -> float:
        return self.end_s - self.span.start_s


@dataclass(frozen=True, slots=True)
class Gap:
    """Time between start and end that no span of that level covers."""

    start_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


def read_trace(path: Path) -> dict[str, Any]:
    """trace.json. Raises NotFound or DataLoss."""
    try:
        trace = json.loads(path.read_bytes())
        if not isinstance(trace["spans"], list):
            raise TypeError("spans: not a list")
    except FileNotFoundError:
        raise NotFound(f"{path}: no trace was written") from None
    except (ValueError, TypeError, KeyError) as error:
        raise DataLoss(f"{path} is not a trace: {error!r}") from None
    result: dict[str, Any] = trace
    return result


def spans_of(trace: Mapping[str, Any]) -> list[Span]:
    """The spans, by start. Raises DataLoss for one that is none."""
    try:
        spans = [
            Span(
                str(entry["name"]),
                _seconds(entry["start_s"]),
                None if entry.get("end_s") is None else _seconds(entry["end_s"]),
                str(entry.get("where", "shim")),
                entry.get("parent"),
                str(entry.get("detail") or ""),
            )
            for entry in trace["spans"]
        ]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataLoss(f"the trace has a span that is none: {error!r}") from None
    return sorted(spans, key=lambda span: (span.start_s, -(span.end_s or float("inf"))))


def _seconds(value: float) -> float:
    if not isfinite(value):  # JSON knows no infinity, Python's reader does
        raise ValueError(f"{value} is not a time")
    return float(value)


def tree(spans: Sequence[Span]) -> list[Node]:
    """The spans nested under their parents, each level by start.

    A parent is named, and a name may occur twice (two containers): the last one that began before
    is meant. A span whose parent is not there stands at the top.
    """
    if not spans:
        return []
    last = max(span.start_s if span.end_s is None else span.end_s for span in spans)
    nodes = [Node(span, max(span.start_s, last if span.end_s is None else span.end_s)) for span in spans]
    top: list[Node] = []
    for node in nodes:
        parent = _parent(node, nodes)
        (top if parent is None else parent.children).append(node)
    return top


def _parent(node: Node, nodes: Sequence[Node]) -> Node | None:
    named = [other for other in nodes if other.span.name == node.span.parent]
    candidates = [other for other in named if other is not node and other not in _below(node)]
    before = [other for other in candidates if other.span.start_s <= node.span.start_s]
    if before:
        return max(before, key=lambda other: other.span.start_s)
    # A guest's clock is aligned to half a round trip: its span may seem to begin before its parent's.
    return min(candidates, key=lambda other: other.span.start_s, default=None)


def _below(node: Node) -> Iterator[Node]:
    for child in node.children:
        yield child
        yield from _below(child)


def gaps(nodes: Sequence[Node], start_s: float, end_s: float) -> list[Gap]:
    """What of start..end none of nodes (sorted by start) covers."""
    found: list[Gap] = []
    reached = start_s
    for node in nodes:
        if node.span.start_s > reached:
            found.append(Gap(reached, min(node.span.start_s, end_s)))
        reached = max(reached, node.end_s)
    if reached < end_s:
        found.append(Gap(reached, end_s))
    return found


def sections(top: Sequence[Node]) -> list[list[Node]]:
    """Top-level nodes split where more time passed than was traced in all.

    So a pod's start and its end, with its whole life in between, are drawn each on their scale.
    The span of the container's run is its life, not a phase: a long one is such a passing of time.
    """
    phases_of = [node for node in top if node.span.name != RUN]
    if not phases_of:
        return [list(top)] if top else []
    untraced = gaps(phases_of, phases_of[0].span.start_s, _end(phases_of))
    traced_s = _length(phases_of) - sum(gap.duration_s for gap in untraced)
    long_s = max(traced_s, 1.0)
    lives = [node for node in top if node.span.name == RUN and node.duration_s > long_s]
    shown = [node for node in top if node not in lives]
    cuts = [gap.end_s for gap in gaps(shown, shown[0].span.start_s, _end(shown)) if gap.duration_s > long_s]
    result: list[list[Node]] = [[]]
    for node in shown:
        if cuts and node.span.start_s >= cuts[0]:
            cuts.pop(0)
            result.append([])
        result[-1].append(node)
    return result


def _end(nodes: Sequence[Node]) -> float:
    return max(node.end_s for node in nodes)


def _length(nodes: Sequence[Node]) -> float:
    return _end(nodes) - nodes[0].span.start_s
