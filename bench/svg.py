"""Pictures of samples, shares and lives, as SVG: a few shapes, no script, nothing from elsewhere.

It draws what it is given: which samples belong into one picture is page.py's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from xml.etree import ElementTree

from bench.document import Life
from bench.measures import Measure
from rpc.errors import printable
from shim.trace import CONTAINERD, GUEST, SHIM

MADE_BY = "casemate bench"
NAMESPACE = "http://www.w3.org/2000/svg"
WIDTH, LABEL, ROW, MARGIN = 820, 200, 22, 14
COLOURS = ("#3b6ea5", "#c26d2d", "#4d8a57", "#8a5a9c", "#a8443f", "#6b7280", "#b59a2c", "#2c8a99")
PLACES = {"client": "#6b7280", SHIM: COLOURS[0], GUEST: COLOURS[2], CONTAINERD: COLOURS[3]}
_CLIENT, _LEFT = "ctr: exec to exit", "until nothing is left"


@dataclass(frozen=True, slots=True)
class Group:
    """One measure: of each way its values, in the unit that they are kept in."""

    measure: Measure
    values: Mapping[str, Sequence[float]]
    medians: Mapping[str, float]


class _Picture:
    def __init__(self, width: int, height: int, title: str) -> None:
        size = {"width": str(width), "height": str(height), "viewBox": f"0 0 {width} {height}"}
        font = {"font-family": "sans-serif", "font-size": "12"}
        self.root = ElementTree.Element(
            "svg", {"xmlns": NAMESPACE, "role": "img", "data-by": MADE_BY, **size, **font}
        )
        ElementTree.SubElement(self.root, "title").text = printable(title)
        self.rectangle(0, 0, width, height, "#ffffff")

    def rectangle(self, x: float, y: float, width: float, height: float, colour: str, says: str = "") -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
        shape = ElementTree.SubElement(self.root, "rect", {**place, "fill": colour})
        if says:
            ElementTree.SubElement(shape, "title").text = printable(says)

    def line(self, x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> None:
        place = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
        ElementTree.SubElement(self.root, "line", {**place, "stroke": colour, "stroke-width": str(width)})

    def dot(self, x: float, y: float, colour: str) -> None:
        place = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3"}
        ElementTree.SubElement(self.root, "circle", {**place, "fill": colour, "fill-opacity": "0.45"})

    def text(self, x: float, y: float, text: str, anchor: str = "start", colour: str = "#1f2430") -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor, "fill": colour}
        ElementTree.SubElement(self.root, "text", place).text = printable(text)

    def axis(self, left: float, right: float, top: float, bottom: float, most: float, unit: str) -> None:
        for value in ticks(most):
            x = left + (right - left) * value / most
            self.line(x, top, x, bottom, "#e3e5e8")
            self.text(x, bottom + 14, f"{value:g}", "middle", "#6b7280")
        self.text(right, bottom + 28, unit, "end", "#6b7280")

    def __str__(self) -> str:
        return ElementTree.tostring(self.root, encoding="unicode") + "\n"


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to most: between four and ten of them. most must be positive."""
    step = 10.0 ** floor(log10(most))
    for fraction in (1.0, 0.5, 0.2):
        if most / (step * fraction) >= 4:
            step *= fraction
            break
    return [round(step * number, 10) for number in range(floor(most / step + 1e-9) + 1)]


def strips(title: str, groups: Sequence[Group]) -> str:
    """Every sample a dot on one axis from zero, the median a stroke with its value. Groups share a unit."""
    ways = list(dict.fromkeys(way for group in groups for way in group.values))
    scale, unit = groups[0].measure.scale, groups[0].measure.unit
    most = max(value for group in groups for values in group.values.values() for value in values) / scale
    rows = sum(1 + len(group.values) for group in groups)
    height = 2 * MARGIN + rows * ROW + 34
    picture = _Picture(WIDTH, height, title)
    left, right, bottom = LABEL, WIDTH - 70, height - 40
    picture.axis(left, right, MARGIN, bottom, most, unit)
    y = MARGIN + ROW / 2
    for group in groups:
        picture.text(MARGIN, y + 4, group.measure.text.replace("`", ""))
        y += ROW
        for way, values in group.values.items():
            colour = COLOURS[ways.index(way) % len(COLOURS)]
            picture.text(LABEL - 10, y + 4, way, "end")
            for value in values:
                picture.dot(left + (right - left) * value / scale / most, y, colour)
            x = left + (right - left) * group.medians[way] / scale / most
            picture.line(x, y - 8, x, y + 8, colour, 2.5)
            picture.text(WIDTH - MARGIN, y + 4, group.measure.show(group.medians[way]), "end")
            y += ROW
    return str(picture)


def stacks(title: str, unit: str, bars: Mapping[str, Mapping[str, float]]) -> str:
    """Of each way one bar, made of named parts; the legend says which colour is which. In `unit`."""
    names = list(dict.fromkeys(name for parts in bars.values() for name in parts))
    most = max(sum(parts.values()) for parts in bars.values())
    height = 2 * MARGIN + (len(bars) + len(names)) * ROW + 44
    picture = _Picture(WIDTH, height, title)
    left, right = LABEL, WIDTH - 70
    bottom = MARGIN + len(bars) * ROW
    picture.axis(left, right, MARGIN, bottom, most, unit)
    for row, (way, parts) in enumerate(bars.items()):
        y, x = MARGIN + row * ROW, float(left)
        picture.text(LABEL - 10, y + 15, way, "end")
        for name, value in parts.items():
            width = (right - left) * value / most
            colour = COLOURS[names.index(name) % len(COLOURS)]
            picture.rectangle(x, y + 3, width, ROW - 6, colour, f"{name}: {value:.1f} {unit}")
            x += width
        picture.text(x + 6, y + 15, f"{sum(parts.values()):.1f}")
    for row, name in enumerate(names):
        y = bottom + 44 + row * ROW
        picture.rectangle(left, y - 10, 12, 12, COLOURS[row % len(COLOURS)])
        picture.text(left + 20, y, name)
    return str(picture)


def waterfall(life: Life, most_s: float) -> str:
    """One container's life from its client's exec, phase by phase. most_s: where the axis ends."""
    rows = [(_CLIENT, "client", life.exec_s, life.exit_s), (_LEFT, "client", life.exit_s, life.gone_s)]
    for span in sorted(life.spans, key=lambda span: (span.start_s, -span.end_s)):
        rows.append((("  " if span.parent else "") + span.name, span.where, span.start_s, span.end_s))
    height = 2 * MARGIN + (len(rows) + 1) * ROW + 34
    picture = _Picture(WIDTH, height, f"a container's life: {life.way}")
    left, right, bottom = LABEL, WIDTH - 90, height - 40
    picture.axis(left, right, MARGIN + ROW, bottom, most_s, "s")
    picture.text(MARGIN, MARGIN + 8, f"{life.way}: {life.exit_s - life.exec_s:.3f} s")
    for row, (name, place, start_s, end_s) in enumerate(rows, start=1):
        y = MARGIN + row * ROW
        x = left + (right - left) * max(start_s - life.exec_s, 0) / most_s
        width = max((right - left) * (end_s - start_s) / most_s, 1.0)
        says = (
            f"{name.strip()}: {1000 * (end_s - start_s):.1f} ms from {1000 * (start_s - life.exec_s):.1f} ms"
        )
        picture.text(MARGIN + 12 * name.startswith(" "), y + 14, name.strip())
        picture.rectangle(x, y + 3, width, ROW - 8, PLACES.get(place, COLOURS[5]), says)
        picture.text(min(x + width + 6, right + 40), y + 14, f"{1000 * (end_s - start_s):.0f} ms")
    return str(picture)
