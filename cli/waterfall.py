"""Draws a trace as a waterfall of text: one line per span, its bar on a common time axis.

Gives lines of (text, style) parts; prints nothing and knows no terminal but its width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cli.output import Part
from cli.spans import GUEST, Gap, Node, gaps, sections
from cli.text import one_line

_MOST_DEPTH = 32
_STYLES = {GUEST: "green", "containerd": "magenta"}


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What bars are made of."""

    host: str
    guest: str
    untraced: str
    tick: str


BLOCKS = Glyphs("█", "▒", "·", "▏")
ASCII = Glyphs("#", "=", ".", "|")


@dataclass(frozen=True, slots=True)
class _Row:
    label: str
    where: str
    start_s: float
    end_s: float
    detail: str = ""
    untraced: bool = False
    open: bool = False


def draw(top: Sequence[Node], *, width: int, glyphs: Glyphs = BLOCKS) -> Iterator[list[Part]]:
    """The waterfall's lines. Percentages are of the section: start and end of a long life are two."""
    parts = sections(top)
    origin_s = top[0].span.start_s if top else 0.0
    reached_s = origin_s
    for number, nodes in enumerate(parts):
        start_s = nodes[0].span.start_s
        end_s = max(node.end_s for node in nodes)
        if number:
            yield [("", "")]
            meanwhile = {
                node.span.name for node in top if node.span.start_s < start_s and node.end_s > reached_s
            }
            lives = ", ".join(sorted(meanwhile - {node.span.name for node in nodes}))
            yield [(f"{duration(start_s - reached_s)} later{f' ({lives})' if lives else ''}:", "dim")]
        yield from _section(nodes, start_s, end_s, origin_s, width, glyphs)
        reached_s = end_s


def _section(
    nodes: list[Node], start_s: float, end_s: float, origin_s: float, width: int, glyphs: Glyphs
) -> Iterator[list[Part]]:
    total_s = end_s - start_s
    rows = list(_rows(nodes, start_s, end_s, total_s, depth=0))
    label_width = max(len(row.label) for row in rows)
    where_width = max(len(row.where) for row in rows)
    bar_width = max(10, width - label_width - where_width - 25)
    head = f"{'':{label_width}}  {'':{where_width}}  {'at':>8}  {'took':>8}  {'%':>4} "
    yield [(f"{head}{duration(total_s)} in all", "bold")]
    for row in rows:
        share = 100 * (row.end_s - row.start_s) / total_s if total_s else 0.0
        style = "yellow" if row.untraced else _STYLES.get(row.where, "cyan")
        took = duration(row.end_s - row.start_s) + ("+" if row.open else "")
        line: list[Part] = [
            (f"{row.label:{label_width}}  ", style if row.untraced else ""),
            (f"{row.where:{where_width}}  ", style),
            (f"{duration(row.start_s - origin_s):>8}  {took:>8}  {share:4.0f} ", ""),
            (_bar(row, start_s, total_s, bar_width, glyphs), style),
        ]
        if row.detail:
            line.append((f"  {row.detail}", "dim"))
        yield line
    untraced_s = sum(gap.duration_s for gap in gaps(nodes, start_s, end_s))
    if total_s:
        share = 100 * untraced_s / total_s
        yield [(f"untraced: {duration(untraced_s)}, {share:.0f} % of {duration(total_s)}", "dim")]


def _rows(nodes: Sequence[Node], start_s: float, end_s: float, total_s: float, depth: int) -> Iterator[_Row]:
    """Spans and, at the same level, the time between them that is worth a line (1 %)."""
    worth = [gap for gap in gaps(nodes, start_s, end_s) if gap.duration_s >= total_s / 100]
    entries: list[Node | Gap] = sorted([*nodes, *worth], key=_start)
    indent = "  " * min(depth, _MOST_DEPTH)
    for entry in entries:
        if isinstance(entry, Gap):
            # Within a span the time is traced, only not what it went to.
            name = "not broken down" if depth else "untraced"
            yield _Row(f"{indent}({name})", "", entry.start_s, entry.end_s, untraced=True)
            continue
        span = entry.span
        yield _Row(
            indent + one_line(span.name),
            one_line(span.where),
            span.start_s,
            entry.end_s,
            one_line(span.detail),
            open=span.end_s is None,
        )
        if entry.children:
            yield from _rows(entry.children, span.start_s, entry.end_s, total_s, depth + 1)


def _start(entry: Node | Gap) -> float:
    return entry.start_s if isinstance(entry, Gap) else entry.span.start_s


def _bar(row: _Row, start_s: float, total_s: float, width: int, glyphs: Glyphs) -> str:
    if total_s <= 0:
        return glyphs.tick
    first = min(width - 1, max(0, int((row.start_s - start_s) / total_s * width)))
    last = min(width, max(0, round((row.end_s - start_s) / total_s * width)))
    glyph = glyphs.untraced if row.untraced else glyphs.guest if row.where == GUEST else glyphs.host
    # A span shorter than a column still happened: a thin mark where it did.
    return " " * first + (glyph * (last - first) if last > first else glyphs.tick)


def duration(seconds: float) -> str:
    """Three or four digits, and the unit that suits."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.1f}ms" if seconds < 0.0995 else f"{1000 * seconds:.0f}ms"
    if seconds < 120:
        return f"{seconds:.2f}s"
    return f"{seconds / 60:.1f}min" if seconds < 7200 else f"{seconds / 3600:.1f}h"
