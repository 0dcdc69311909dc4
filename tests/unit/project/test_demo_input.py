"""The demo's program by itself: what it sums, and that its exit code is a result and not a decoration."""

import json
import subprocess
from pathlib import Path

import pytest

from scripts import demo
from scripts.venv import SYSTEM_PYTHON

INPUT = Path(demo.INPUT)


@pytest.mark.parametrize(("quota", "over"), [("150", 3), ("1000", 0), ("0", 5)])
def test_exit_code_is_the_number_of_teams_over_quota(quota: str, over: int, tmp_path: Path) -> None:
    argv: list[str | Path] = [
        SYSTEM_PYTHON,
        "-B",
        INPUT / "report.py",
        INPUT / "gpu_hours.csv",
        "--machine",
        tmp_path / "m.json",
    ]
    done = subprocess.run(argv, env={"QUOTA_GPU_HOURS": quota}, capture_output=True, text=True, check=False)
    assert done.returncode == over
    assert done.stdout.count("OVER") == over
    assert "vision            246.0" in done.stdout
    assert json.loads((tmp_path / "m.json").read_text())["kernel"]
