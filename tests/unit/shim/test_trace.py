"""Spans: failures leave one too, a guest cannot place its own outside the pod's life, files are whole."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim import trace as module
from shim.trace import GUEST, SHIM, Span, Trace, write_json

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@pytest.fixture
def trace() -> Trace:
    return Trace("default", "web", 1_700_000_000.5)


def test_a_span_lasts_as_long_as_its_body(trace: Trace) -> None:
    before = time.monotonic()
    with trace.span("outer", detail="why"), trace.span("inner", "outer"):
        pass
    after = time.monotonic()
    inner, outer = trace.spans
    assert (inner.name, inner.parent, outer.name, outer.detail) == ("inner", "outer", "outer", "why")
    assert before <= outer.start_s <= inner.start_s <= inner.end_s <= outer.end_s <= after


def test_a_body_that_raises_leaves_a_failed_span(trace: Trace) -> None:
    with pytest.raises(KeyError), trace.span("boot", "pod", "try 1"):
        raise KeyError
    assert trace.spans[0].name == "boot"
    assert trace.spans[0].parent == "pod"
    assert trace.spans[0].detail == "failed: KeyError try 1"


def test_a_guests_clock_is_moved_onto_the_hosts(trace: Trace) -> None:
    """Guest time 2 s was host time 102 s, so what began at 0.5 s of the guest began at 100.5 s here."""
    trace.add("start", 99.0, 99.5)
    trace.add_guest([("kernel", 500_000_000, 1_500_000_000)], 2_000_000_000, 102.0, "guest.boot")
    assert trace.spans[1] == Span("kernel", 100.5, 101.5, GUEST, "guest.boot")


@given(
    st.lists(st.tuples(st.text(max_size=200), INT64, INT64), max_size=100),
    INT64,
    st.floats(0, 1e9),
    st.floats(0, 1e3),
)
def test_a_guest_that_lies_stays_within_the_life_of_its_pod(
    spans: list[tuple[str, int, int]], now_ns: int, host_now: float, age: float
) -> None:
    trace = Trace("default", "web", 0.0)
    begun = host_now - age
    trace.add("start", begun, begun)
    trace.add_guest(spans, now_ns, host_now, "guest.boot")
    claimed = trace.spans[1:]
    assert len(claimed) <= 64
    for span in claimed:
        assert begun <= span.start_s <= span.end_s <= host_now
        assert len(span.name) <= 64
        assert span.where == GUEST


def test_a_guest_alone_cannot_claim_a_past(trace: Trace) -> None:
    trace.add_guest([("kernel", -(1 << 62), 1 << 62)], 0, 50.0, "guest.boot")
    assert trace.spans == [Span("kernel", 50.0, 50.0, GUEST, "guest.boot")]


def test_a_trace_is_bounded(trace: Trace, tmp_path: Path) -> None:
    for number in range(module.MOST_SPANS + 3):
        trace.add(f"exec {number}", number, number + 1)
    assert len(trace.spans) == module.MOST_SPANS
    trace.write(tmp_path / "trace.json")
    document = json.loads((tmp_path / "trace.json").read_text())
    assert (len(document["spans"]), document["dropped"]) == (module.MOST_SPANS, 3)


def test_what_is_written_is_what_casemate_trace_reads(trace: Trace, tmp_path: Path) -> None:
    trace.accel = "tcg"
    trace.add("boot", 1.0, 2.0, parent="pod", detail="QEMU")
    path = tmp_path / "trace.json"
    trace.write(path)
    assert json.loads(path.read_text()) == {
        "namespace": "default",
        "id": "web",
        "accel": "tcg",
        "created_at": 1_700_000_000.5,
        "dropped": 0,
        "spans": [
            {"name": "boot", "start_s": 1.0, "end_s": 2.0, "where": SHIM, "parent": "pod", "detail": "QEMU"}
        ],
    }
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["trace.json"]


def test_a_reader_sees_the_old_document_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"n": -1, "filling": "x" * 50_000})
    seen: list[int] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.append(json.loads(path.read_text())["n"])

    reader = threading.Thread(target=read)
    reader.start()
    number = 0
    while number < 200 or len(seen) < 2:  # the reader has its turn when this machine gives it one
        write_json(path, {"n": number, "filling": "x" * 50_000})
        number += 1
    done.set()
    reader.join()
    assert seen == sorted(seen)


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    """What is found out of the host is kept in one place by the shims of all pods."""
    path = tmp_path / "accel.json"
    write_json(path, {"filling": ""})
    errors: list[Exception] = []
    done = threading.Event()

    def write(size: int) -> None:
        try:
            for _ in range(200):
                write_json(path, {"filling": "x" * size})
        except OSError as error:
            errors.append(error)

    def read() -> None:
        try:
            while not done.is_set():
                assert len(json.loads(path.read_text())["filling"]) in (0, 10, 3_000, 70_000)
        except ValueError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(size,)) for size in (10, 3_000, 70_000)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert errors == []
    assert os.listdir(tmp_path) == ["accel.json"]


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        write_json(path, {"n": object()})
    assert os.listdir(tmp_path) == ["state.json"]
    assert json.loads(path.read_text()) == {"n": 1}
    with pytest.raises(FileNotFoundError):
        write_json(tmp_path / "missing/state.json", {})
