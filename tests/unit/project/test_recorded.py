"""That docs/clients.md says of a row whether its test ran, by what pytest tells and is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from tests import clients, recorded
from tests.recorded import Record, Recorder

Outcome = Literal["passed", "failed", "skipped"]
Phase = Literal["setup", "call", "teardown"]
TEST = "vm/test_x.py::test_that_it_works"
ROW = clients.Row("ctr run", "works", "", "x: test_that_it_works", TEST)


def report(
    outcome: Outcome, when: Phase = "call", parameter: str = "", mark: str = recorded.MARK
) -> pytest.TestReport:
    return pytest.TestReport(f"tests/{TEST}{parameter}", ("x", 1, "x"), {mark: 1}, outcome, None, when)


def kept(tmp_path: Path, *reports: pytest.TestReport) -> dict[str, Record]:
    recorder = Recorder(tmp_path / "clients.json")
    for each in reports:
        recorder.pytest_runtest_logreport(each)
    recorder.pytest_sessionfinish()
    return recorded.read(tmp_path / "clients.json")


@pytest.mark.parametrize(
    ("outcomes", "worst"),
    [
        ([("passed", "setup"), ("passed", "call"), ("passed", "teardown")], "passed"),
        ([("skipped", "setup"), ("passed", "teardown")], "skipped"),
        ([("passed", "setup"), ("passed", "call"), ("failed", "teardown")], "failed"),
    ],
)
def test_what_is_kept_is_the_worst_of_a_test(
    tmp_path: Path, outcomes: list[tuple[Outcome, Phase]], worst: str
) -> None:
    found = kept(tmp_path, *(report(outcome, when) for outcome, when in outcomes))
    assert {test: about.outcome for test, about in found.items()} == {TEST: worst}


def test_one_of_several_parameters_that_failed_is_the_tests(tmp_path: Path) -> None:
    found = kept(tmp_path, report("failed", parameter="[a]"), report("passed", parameter="[b]"))
    assert found[TEST].outcome == "failed"


def test_one_that_was_interrupted_did_not_pass(tmp_path: Path) -> None:
    assert kept(tmp_path, report("passed", "setup")) == {}


def test_a_test_of_no_client_leaves_no_trace(tmp_path: Path) -> None:
    assert kept(tmp_path, report("passed", mark="vm")) == {}
    assert not (tmp_path / "clients.json").exists()


def test_what_did_not_run_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "clients.json"
    recorded.write(file, {TEST: "passed", "vm/test_y.py::test_y": "passed"}, "2026-01-01", "abc")
    recorded.write(file, {TEST: "failed"}, "2026-01-02", "def+")
    assert recorded.read(file) == {
        TEST: Record("failed", "2026-01-02", "def+"),
        "vm/test_y.py::test_y": Record("passed", "2026-01-01", "abc"),
    }


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (Record("passed", "2026-01-01", "abc"), "works"),
        (Record("skipped", "2026-01-01", "abc"), "works (its test was skipped 2026-01-01, abc)"),
        (Record("failed", "2026-01-01", "abc"), "works (its test failed 2026-01-01, abc)"),
        (None, "works (no run of its test is recorded)"),
    ],
)
def test_a_row_says_so_unless_its_test_passed(about: Record | None, said: str) -> None:
    page = clients.section("ctr", [ROW], {} if about is None else {TEST: about})
    assert f"| run | {said} |  | x: that_it_works |" in page
    assert ("Passed 2026-01-01 (abc)." in page) is (said == "works")
