"""A trace in Chrome's trace event format, which Perfetto and chrome://tracing open.

Spans of one place that overlap without nesting get rows of their own: a row can only show a stack.
"""

from collections.abc import Sequence
from typing import Any

from cli.spans import Span

_MICRO = 1e6


def chrome_trace(spans: Sequence[Span], title: str) -> dict[str, Any]:
    """The whole document for spans sorted by start. Times are relative to the first one."""
    events: list[dict[str, Any]] = []
    places = sorted({span.where for span in spans})
    origin_s = spans[0].start_s if spans else 0.0
    last_s = max((span.end_s or span.start_s for span in spans), default=0.0)
    for process, place in enumerate(places, start=1):
        events.append(_name("process_name", process, 0, f"{title}: {place}"))
        rows: list[list[float]] = []  # per row, the ends of the spans that are open, outermost first
        for span in spans:
            if span.where != place:
                continue
            end_s = last_s if span.end_s is None else max(span.end_s, span.start_s)
            row = _row(rows, span.start_s, end_s)
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "cat": place,
                    "pid": process,
                    "tid": row + 1,
                    "ts": round((span.start_s - origin_s) * _MICRO, 3),
                    "dur": round((end_s - span.start_s) * _MICRO, 3),
                    "args": {"detail": span.detail, "parent": span.parent},
                }
            )
        events.extend(_name("thread_name", process, row + 1, place) for row in range(len(rows)))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _row(rows: list[list[float]], start_s: float, end_s: float) -> int:
    """The first row on which start..end lies after, or wholly within, what is open there."""
    for number, open_ends in enumerate(rows):
        while open_ends and open_ends[-1] <= start_s:
            open_ends.pop()
        if not open_ends or end_s <= open_ends[-1]:
            open_ends.append(end_s)
            return number
    rows.append([end_s])
    return len(rows) - 1


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}
