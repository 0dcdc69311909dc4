"""A host is as crowded as what waits for its processors says, and never less than not at all."""

from pathlib import Path

import pytest

from shim.vm.crowding import LOADAVG, crowding


@pytest.mark.parametrize(
    ("text", "cpus", "times"),
    [
        ("0.00 0.00 0.00 1/200 4711", 2, 1.0),
        ("1.90 0.00 0.00 1/200 4711", 2, 1.0),
        ("9.00 0.00 0.00 1/200 4711", 2, 4.5),
        ("1.00 0.00 0.00 16/200 4711", 2, 8.0),  # they have only come: the average is of a minute
        ("1.00 0.00 0.00 64/200 4711", 2, 10.0),  # somebody waits for the end of it, too
        ("64.00 60.00 9.00 3/200 4711", 64, 1.0),
    ],
)
def test_the_worse_of_now_and_of_late_counts(tmp_path: Path, text: str, cpus: int, times: float) -> None:
    (tmp_path / "loadavg").write_text(text + "\n")
    assert crowding(tmp_path / "loadavg", cpus) == times


def test_this_host_says_so_too() -> None:
    assert crowding(LOADAVG) >= 1.0
