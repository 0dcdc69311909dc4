"""`casemate bench` without a container: what it refuses, and reports of runs that were kept."""

import json
from pathlib import Path

import pytest

from bench import document, measures
from cli.exits import ExitCode
from tests.unit.bench import runs
from tests.unit.cli.conftest import Casemate


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    found = runs.samples(measures.EXEC, {"runc": [0.1, 0.1], "casemate": [0.15, 0.15]}, "boot")
    document.write(runs.document("exec", found), tmp_path / "exec.json")
    return tmp_path / "exec.json"


def test_a_report_says_reached_and_missed(casemate: Casemate, kept: Path) -> None:
    result = casemate("bench", "report", str(kept))
    assert result.exit_code == ExitCode.OK
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ctr task exec of true")]
    assert "1.50 x runc" in line
    assert line.endswith("reached")
    assert "not measured: no run of casemate bench boot" in result.stdout


def test_a_report_as_json(casemate: Casemate, kept: Path) -> None:
    found = {
        one["target"]: one for one in json.loads(casemate("bench", "report", str(kept), "--json").stdout)
    }
    assert found["exec"]["verdict"] == "reached"
    assert found["exec"]["measured"] == pytest.approx(1.5)
    assert found["start.restored"] == {
        "machine": "TCG",
        "target": "start.restored",
        "text": "`ctr run` of `true`, the machine restored",
        "unit": "x runc",
        "at_most": {"kvm": 1.5, "tcg": 6.0},
        "measured": None,
        "detail": None,
        "accel": None,
        "verdict": "not measured",
        "reason": "no run of `casemate bench boot`",
    }


def test_a_report_writes_pages(casemate: Casemate, kept: Path, tmp_path: Path) -> None:
    page, html = tmp_path / "performance.md", tmp_path / "report.html"
    result = casemate("bench", "report", str(kept), "--page", str(page), "--html", str(html))
    assert result.exit_code == ExitCode.OK
    assert "1.50 (1.50 to 1.50)" in page.read_text()
    assert "<svg" in html.read_text()
    assert (tmp_path / "performance/exec.svg").exists()


def test_a_report_of_nothing(casemate: Casemate, tmp_path: Path) -> None:
    assert casemate("bench", "report").exit_code == ExitCode.USAGE
    assert casemate("bench", "report", str(tmp_path / "no.json")).exit_code == ExitCode.NOT_FOUND
    (tmp_path / "x.json").write_text("{}")
    assert casemate("bench", "report", str(tmp_path / "x.json")).exit_code == ExitCode.FAILURE


@pytest.mark.parametrize(
    "words",
    [
        ("boot", "--runtime", "podman"),
        ("exec", "--runtime", "runc", "--runtime", "runc"),
        ("delete", "--runtime", "runc", "--runtime", "casemate", "--rounds", "1"),
        ("density", "--pods", "0"),
        ("io", "--size", "0"),
        ("boot", "--parallel", "0"),
        ("run",),
    ],
)
def test_wrong_usage_starts_nothing(casemate: Casemate, words: tuple[str, ...]) -> None:
    assert casemate("bench", *words).exit_code == ExitCode.USAGE


def test_what_is_measured_is_said(casemate: Casemate) -> None:
    assert "a block device. TCP to the host" in " ".join(casemate("bench", "io", "--help").stdout.split())
