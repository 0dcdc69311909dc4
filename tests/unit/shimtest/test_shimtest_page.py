"""What containerd's tests of shims say, read, and made a page of; what the suite is built with."""

import json
from pathlib import Path

import pytest

from rpc.errors import DataLoss, NotFound
from tests.shimtest import __main__ as runner
from tests.shimtest import page, suite
from tests.shimtest.changes import CHANGES
from tests.shimtest.outcomes import FAILS, LEFT_OUT, NO_END, PASSES, Outcome, Reading, name_of, row_of
from tests.shimtest.reasons import REASONS, known

FACTS = {
    "commit": "abc of 2026-01-01",
    "accel": "TCG",
    "date": "2026-01-02",
    "minutes": "9",
    "stress_s": "60",
}
PAGE = Path(__file__).parents[3] / "docs/shimtest.md"


def said(*events: tuple[str, str] | tuple[str, str, str]) -> Reading:
    """After these: action, test, output."""
    reading = Reading()
    for action, test, *output in events:
        reading.take(json.dumps({"Action": action, "Test": test, "Output": "".join(output)}))
    return reading


@pytest.mark.parametrize(
    ("test", "row"),
    [
        ("TestShim", ""),
        ("TestShim/casemate", ""),
        ("TestShim/casemate/Stress", ""),
        ("TestShim/casemate/Exec", "Exec"),
        ("TestShim/casemate/Lifecycle#01", "Lifecycle#01"),
        ("TestShim/casemate/ExitCodes/Exit42", "ExitCodes"),
        ("TestShim/casemate/Stress/Exec", "Stress/Exec"),
        ("TestShim/casemate/Stress/Lifecycle/iter00001", "Stress/Lifecycle"),
        ("FuzzTransferMissing", "FuzzTransferMissing"),
    ],
)
def test_a_row_is_a_test_with_what_is_below_it(test: str, row: str) -> None:
    assert row_of(test) == row


def test_a_row_can_be_asked_for_alone() -> None:
    assert runner.expression("Lifecycle#01") == r"^TestShim$/^casemate$/^Lifecycle\#01$"
    assert runner.expression("Stress/Exec") == "^TestShim$/^casemate$/^Stress$/^Exec$"
    assert row_of(name_of("Stress/Exec")) == "Stress/Exec"


def test_a_failure_keeps_the_last_line_of_the_tests_own() -> None:
    test = "TestShim/casemate/Exec"
    reading = said(
        ("run", test),
        ("output", test, "    exec_suite.go:90: creating task\n"),
        ("output", test, "    exec_suite.go:95: create failed: no | room\n"),
        ("output", test, "    panic.go:694: shutting down shim\n"),
        ("output", test, "    helpers.go:499: shim logs:\n"),
        ("output", test, "        time=now level=warning\n"),
        ("output", test, "--- FAIL: TestShim/casemate/Exec (5.70s)\n"),
        ("fail", test),
    )
    assert dict(reading.found) == {"Exec": Outcome(FAILS, "create failed: no | room")}
    assert "level=warning" in reading.text("Exec")


def test_a_failure_below_a_row_is_the_rows() -> None:
    row, below = "TestShim/casemate/ExitCodes", "TestShim/casemate/ExitCodes/Exit42"
    reading = said(
        ("run", row),
        ("run", below),
        ("output", below, "    exec_suite.go:1: expected 42, got 0\n"),
        ("fail", below),
        ("fail", row),
    )
    assert dict(reading.found) == {"ExitCodes": Outcome(FAILS, "expected 42, got 0")}


def test_what_passes_needs_no_words_and_what_is_left_out_has_the_suites() -> None:
    passing, skipped = "TestShim/casemate/Exec", "TestShim/casemate/HundredLayers"
    reading = said(
        ("run", passing),
        ("output", passing, "    exec_suite.go:95: exec done\n"),
        ("pass", passing),
        ("run", skipped),
        ("output", skipped, "    layers_suite.go:78: needs FormatMounts\n"),
        ("skip", skipped),
    )
    assert list(reading.found.values()) == [Outcome(PASSES), Outcome(LEFT_OUT, "needs FormatMounts")]


def test_a_test_that_has_not_ended_is_none_that_passes() -> None:
    reading = said(("run", "TestShim/casemate/Exec"), ("run", "TestShim/casemate/Exec/one"))
    assert dict(reading.found) == {"Exec": NO_END}
    reading = said(("run", "TestShim/casemate/Exec"), ("pass", "TestShim/casemate/Exec/one"))
    assert dict(reading.found) == {"Exec": NO_END}


@pytest.mark.parametrize("line", ["panic: no JSON", "[]", "{}", '"text"'])
def test_what_test2json_does_not_write_is_an_error(line: str) -> None:
    with pytest.raises(DataLoss, match="test2json"):
        Reading().take(line)


def whole() -> dict[str, Outcome]:
    """As a run whose every failure is explained."""
    return {"Exec": Outcome(PASSES)} | dict.fromkeys(REASONS, Outcome(FAILS, "words"))


def test_each_row_that_does_not_pass_has_its_reason() -> None:
    text = page.page(whole(), FACTS)
    assert "| Exec | passes |  |" in text
    assert f"| UDSRoundTrip | fails | {REASONS['UDSRoundTrip']} |" in text
    assert f"Of {len(REASONS) + 1} tests: 1 pass, {len(REASONS)} fail." in text
    assert (
        page.unexplained(whole(), "TCG") == page.unexplained(whole(), "KVM") == page.left_over(whole()) == []
    )


def test_what_has_no_reason_is_told() -> None:
    found = whole() | {"Clock": Outcome(FAILS, "a | b")}
    assert page.unexplained(found, "TCG") == ["Clock"]
    assert "| Clock | fails | NOT EXPLAINED: a / b |" in page.page(found, FACTS)


def test_a_slow_guest_is_a_reason_where_it_is_emulated() -> None:
    found = whole() | {"Stress/Exec": Outcome(FAILS, "deadline exceeded")}
    assert page.unexplained(found, "TCG") == []
    assert page.unexplained(found, "KVM") == ["Stress/Exec"]
    assert page.left_over(whole() | {"Stress/Exec": Outcome(PASSES)}) == []
    assert "NOT EXPLAINED" not in page.page(found, FACTS)
    assert "NOT EXPLAINED: deadline exceeded" in page.page(found, FACTS | {"accel": "KVM"})


def test_a_reason_without_a_failure_is_told() -> None:
    found = whole() | {"UDSRoundTrip": Outcome(PASSES)}
    del found["TransferCopyTo"]
    assert page.left_over(found) == ["TransferCopyTo", "UDSRoundTrip"]


def test_the_page_has_all_reasons_and_no_failure_without() -> None:
    rows = [line.split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    explained = {
        row.removeprefix("| "): why.removesuffix(" |") for row, result, why in rows if result != PASSES
    }
    assert REASONS.items() <= explained.items() <= known(emulated=True).items()


def checkout(at: Path) -> Path:
    """A checkout whose files have what is changed, and no more."""
    for change in CHANGES:
        with (at / change.file).open("a") as file:
            file.write(f"// before\n{change.old}// after\n")
    return at


def test_the_suite_is_built_with_changed_copies(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for directory in (theirs, ours):
        directory.mkdir()
    before = {path.name: path.read_text() for path in checkout(theirs).iterdir()}
    replaced = suite.changed(theirs, ours)
    assert {Path(name).name for name in replaced} == before.keys()
    for change in CHANGES:
        text = Path(replaced[str(theirs / change.file)]).read_text()
        assert change.new in text
        assert change.old not in text.replace(change.new, "")
    assert {path.name: path.read_text() for path in theirs.iterdir()} == before


def test_a_suite_that_has_changed_is_not_changed_blindly(tmp_path: Path) -> None:
    (checkout(tmp_path) / CHANGES[0].file).write_text("package shimtest\n")
    with pytest.raises(NotFound, match=CHANGES[0].file):
        suite.changed(tmp_path, tmp_path)


def test_what_is_no_checkout_of_the_suite_is_refused(tmp_path: Path) -> None:
    (tmp_path / "go.mod").write_text("module example.com/other\n")
    with pytest.raises(NotFound, match="no checkout of"):
        suite.build(tmp_path, tmp_path)
