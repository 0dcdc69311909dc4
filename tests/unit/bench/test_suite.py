"""Which ways a full run measures in what: nothing that another way shows already, and no target left out."""

import pytest

from bench import suite, ways

ALL = ("runc", "crun", "casemate", "casemate-node", "casemate-pool", "casemate-virtiofs", "casemate-boot")


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("boot", set()),
        ("crowd", {"crun", "casemate-virtiofs", "casemate-boot"}),
        ("exec", {"casemate-pool", "casemate-virtiofs", "casemate-boot"}),
        ("density", {"casemate-pool", "casemate-boot"}),
        ("io", {"casemate-pool", "casemate-virtiofs", "casemate-boot"}),
        ("files", {"casemate-pool", "crun", "casemate-node", "casemate-boot"}),
    ],
)
def test_a_way_is_measured_where_it_shows_something(kind: str, left_out: set[str]) -> None:
    taking_part = {way.name for way in ways.parse_all(ALL) if suite.shows_something(kind, way)}
    assert taking_part == set(ALL) - left_out
