"""`casemate trace`: the waterfall line by line, and what no span covers."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.chrome import chrome_trace
from cli.spans import Span, gaps, sections, spans_of, tree
from cli.waterfall import ASCII, BLOCKS, draw, duration
from rpc.errors import DataLoss
from tests.unit.cli.conftest import Casemate, Host

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "CASEMATE_UPDATE_GOLDEN"


def span(
    name: str,
    start_s: float,
    end_s: float | None,
    where: str = "shim",
    parent: str | None = None,
    detail: str = "",
) -> dict[str, Any]:
    return {
        "name": name,
        "start_s": start_s,
        "end_s": end_s,
        "where": where,
        "parent": parent,
        "detail": detail,
    }


START = [
    span("start", 100.0, 100.060),
    span("interpreter", 100.0, 100.020, parent="start"),
    span("bind", 100.020, 100.055, parent="start"),
    span("pod.ready", 100.070, 102.0),
    span("libvirt.create", 100.2, 100.7, parent="pod.ready", detail="QEMU 7.2"),
    span("guest.boot", 100.7, 101.9, parent="pod.ready"),
    span("kernel", 100.8, 101.5, "guest", "guest.boot"),
    span("agent", 101.5, 101.8, "guest", "guest.boot"),
    span("task.create", 100.5, 102.1),
    span("task.start", 102.2, 102.25),
]
SHORT = [*START, span("task.run", 102.25, 102.35), span("task.delete", 102.36, 102.5)]
LONG = [*START, span("task.run", 102.25, 8000.0), span("task.delete", 8000.01, 8000.2)]
OPEN = [*START, span("task.run", 102.25, None)]
NESTED_UNKNOWN = [span("child", 0.0, 1.0, parent="nowhere"), span("late", 2.0, 2.0)]


def check_golden(name: str, text: str) -> None:
    """Compares with golden/NAME.txt; with CASEMATE_UPDATE_GOLDEN=1 writes it (then read the diff)."""
    path = GOLDEN / f"{name}.txt"
    if os.environ.get(UPDATE):
        path.write_text(text)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("name", "spans"), [("short", SHORT), ("long", LONG), ("open", OPEN), ("odd", NESTED_UNKNOWN)]
)
def test_waterfall_is_drawn_as_it_was(casemate: Casemate, pods: Host, name: str, spans: list[Any]) -> None:
    directory = pods.pod("default", "web", ended=True)
    document = {
        "namespace": "default",
        "id": "web",
        "accel": "tcg",
        "created_at": 1.0,
        "dropped": 0,
        "spans": spans,
    }
    (directory / "trace.json").write_text(json.dumps(document))
    result = casemate("trace", "web")
    assert result.exit_code == 0
    check_golden(name, result.stdout)


@pytest.fixture
def web(pods: Host) -> Path:
    directory = pods.pod("default", "web", ended=True)
    document = {"namespace": "default", "id": "web", "accel": "kvm", "created_at": 1.0, "spans": SHORT}
    (directory / "trace.json").write_text(json.dumps(document))
    return directory


def test_json_is_the_record(casemate: Casemate, web: Path) -> None:
    assert json.loads(casemate("trace", "web", "--json").stdout) == json.loads(
        (web / "trace.json").read_text()
    )


def test_without_a_name_the_latest_pod_is_meant(casemate: Casemate, web: Path, pods: Host) -> None:
    newest = pods.pod("default", "newest", ended=True, created_at=1_800_000_000.0)
    (newest / "trace.json").write_text(json.dumps({"namespace": "default", "id": "newest", "spans": []}))
    pods.pod("default", "untraced", ended=True, created_at=1_900_000_000.0)
    result = casemate("trace")
    assert result.stdout.startswith("default/newest")
    assert "no spans yet" in result.stderr


def test_no_trace_at_all_is_exit_code_3(casemate: Casemate, pods: Host) -> None:
    assert casemate("trace").exit_code == 3
    pods.pod("default", "web", ended=True)
    result = casemate("trace", "web")
    assert result.exit_code == 3
    assert "no trace was written" in result.stderr


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"spans": {}}',
        '{"spans": [1]}',
        '{"spans": [{"name": "x"}]}',
        '{"spans": [{"start_s": "x"}]}',
        '{"spans": [{"name": "x", "start_s": NaN}]}',
        '{"spans": [{"name": "x", "start_s": 1, "end_s": Infinity}]}',
    ],
)
def test_a_damaged_trace_is_an_error_that_says_so(casemate: Casemate, web: Path, text: str) -> None:
    (web / "trace.json").write_text(text)
    result = casemate("trace", "web")
    assert result.exit_code == 1
    assert "error:" in result.stderr


def test_spans_that_were_dropped_are_mentioned(casemate: Casemate, web: Path) -> None:
    document = json.loads((web / "trace.json").read_text()) | {"dropped": 12}
    (web / "trace.json").write_text(json.dumps(document))
    assert "12 more spans were not kept" in casemate("trace", "web").stderr


def test_a_guests_span_names_cannot_move_the_terminal(casemate: Casemate, web: Path) -> None:
    spans = [span("\x1b[2Jx\ny", 0.0, 1.0, "guest\x1b[1m", detail="\x1b]0;t\x07\r")]
    (web / "trace.json").write_text(json.dumps({"spans": spans}))
    output = casemate("trace", "web").stdout
    assert "\x1b" not in output
    assert "\r" not in output
    assert "x y" in output


# --- Chrome's format ---


def test_chrome_file_is_what_perfetto_reads(casemate: Casemate, web: Path, tmp_path: Path) -> None:
    target = tmp_path / "trace.chrome.json"
    result = casemate("trace", "web", "--chrome", str(target))
    assert result.exit_code == 0
    assert result.stdout == ""
    document = json.loads(target.read_text())
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(SHORT)
    boot = next(event for event in events if event["name"] == "guest.boot")
    assert (boot["ts"], boot["dur"]) == (700_000.0, 1_200_000.0)
    names = {event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"}
    assert names == {"default/web: shim", "default/web: guest"}
    assert json.loads(casemate("trace", "web", "--chrome", "-").stdout) == document


def test_chrome_and_json_exclude_each_other(casemate: Casemate, web: Path) -> None:
    assert casemate("trace", "web", "--chrome", "-", "--json").exit_code == 2


moments = st.integers(0, 1000).map(lambda number: number / 8)  # exact as floats


@st.composite
def some_spans(draw_: st.DrawFn) -> list[Span]:
    spans = []
    for number in range(draw_(st.integers(0, 12))):
        start_s = draw_(moments)
        length_s = draw_(st.none() | moments)
        end_s = None if length_s is None else start_s + length_s
        parent = draw_(st.none() | st.sampled_from([f"s{index}" for index in range(12)]))
        spans.append(
            Span(f"s{number}", start_s, end_s, draw_(st.sampled_from(["shim", "guest"])), parent, "")
        )
    return sorted(spans, key=lambda each: (each.start_s, -(each.end_s or float("inf"))))


@given(some_spans())
def test_chrome_rows_hold_only_what_nests(spans: list[Span]) -> None:
    document = chrome_trace(spans, "x")
    rows: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            rows.setdefault((event["pid"], event["tid"]), []).append(
                (event["ts"], event["ts"] + event["dur"])
            )
    for row in rows.values():
        for index, (start, end) in enumerate(row):
            for other_start, other_end in row[index + 1 :]:
                apart = other_start >= end or other_end <= start
                nested = (start <= other_start and other_end <= end) or (
                    other_start <= start and end <= other_end
                )
                assert apart or nested
    assert sum(map(len, rows.values())) == len(spans)


# --- the arithmetic ---


def count(nodes: list[Any]) -> int:
    return sum(1 + count(node.children) for node in nodes)


@given(some_spans())
def test_every_span_is_in_the_tree_once_and_in_a_section(spans: list[Span]) -> None:
    top = tree(spans)
    assert count(top) == len(spans)
    assert sum(map(len, sections(top))) == len(top)  # there is no task.run here


@given(some_spans())
def test_gaps_and_spans_together_are_the_whole_time(spans: list[Span]) -> None:
    top = tree(spans)
    if not top:
        return
    start_s, end_s = top[0].span.start_s, max(node.end_s for node in top)
    found = gaps(top, start_s, end_s)
    points = sorted({start_s, end_s, *(node.span.start_s for node in top), *(node.end_s for node in top)})
    for left, right in pairwise(points):
        middle = (left + right) / 2
        covered = any(node.span.start_s < middle < node.end_s for node in top)
        in_gap = any(gap.start_s < middle < gap.end_s for gap in found)
        assert covered != in_gap


@given(some_spans(), st.integers(20, 200), st.sampled_from([BLOCKS, ASCII]))
def test_every_span_has_a_line_with_a_mark(spans: list[Span], width: int, glyphs: Any) -> None:
    lines = ["".join(text for text, _ in parts) for parts in draw(tree(spans), width=width, glyphs=glyphs)]
    for each in spans:
        matching = [line for line in lines if line.strip().startswith(each.name + " ")]
        assert len(matching) == 1
        assert any(glyph in matching[0] for glyph in (glyphs.host, glyphs.guest, glyphs.tick))


def test_a_name_that_occurs_twice_takes_the_children_that_began_after_it() -> None:
    spans = spans_of(
        {
            "spans": [
                span("create", 0, 1),
                span("a", 0.5, 0.6, parent="create"),
                span("create", 2, 3),
                span("b", 2.5, 2.6, parent="create"),
            ]
        }
    )
    assert [[child.span.name for child in node.children] for node in tree(spans)] == [["a"], ["b"]]


def test_a_guests_span_that_seems_to_begin_before_its_parent_stays_with_it() -> None:
    """Clocks are aligned to half a round trip."""
    spans = spans_of({"spans": [span("kernel", 0.999, 2, "guest", "boot"), span("boot", 1, 3)]})
    (boot,) = tree(spans)
    assert [child.span.name for child in boot.children] == ["kernel"]


def test_a_span_is_never_its_own_ancestor() -> None:
    spans = spans_of({"spans": [span("a", 0, 1, parent="b"), span("b", 0, 1, parent="a")]})
    assert count(tree(spans)) == 2


@pytest.mark.parametrize(("life_s", "parts"), [(0.5, 1), (2.0, 1), (3.5, 2), (50.0, 2)])
def test_a_life_longer_than_all_that_was_traced_divides_start_from_end(life_s: float, parts: int) -> None:
    end_s = 102.25 + life_s
    spans = [*START, span("task.run", 102.25, end_s), span("task.delete", end_s, end_s + 0.2)]
    assert len(sections(tree(spans_of({"spans": spans})))) == parts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0ms"),
        (0.0994, "99.4ms"),
        (0.0996, "100ms"),
        (0.9996, "1.00s"),
        (119.99, "119.99s"),
        (120, "2.0min"),
        (7199, "120.0min"),
        (7200, "2.0h"),
    ],
)
def test_durations_have_the_unit_that_suits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_spans_that_are_none_are_data_loss() -> None:
    with pytest.raises(DataLoss):
        spans_of({"spans": ["x"]})


def test_output_that_has_no_blocks_gets_ascii(web: Path) -> None:
    import subprocess

    from tests.unit.cli.conftest import spawn

    process = spawn("trace", "web", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    output = process.communicate()[0].decode("ascii")
    assert "####" in output
    assert "====" in output
