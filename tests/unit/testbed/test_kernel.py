"""A kernel's configuration is held to the fragment that asked for it, whatever Kconfig made of it."""

import pytest

from tests.testbed.kernel import FRAGMENT, unmet

CONFIGURATION = '# CONFIG_OFF is not set\nCONFIG_ON=y\nCONFIG_NAME="bed"\nCONFIG_MODULE=m\n'


@pytest.mark.parametrize(
    "line",
    ["CONFIG_ON=y", 'CONFIG_NAME="bed"', "# CONFIG_OFF is not set", "# CONFIG_ABSENT is not set", "# why"],
)
def test_holds(line: str) -> None:
    assert unmet(f"\n{line}\n", CONFIGURATION) == []


@pytest.mark.parametrize(
    "line",
    ["CONFIG_OFF=y", "CONFIG_MODULE=y", 'CONFIG_NAME="other"', "CONFIG_ABSENT=y", "# CONFIG_ON is not set"],
)
def test_is_turned_down(line: str) -> None:
    assert unmet(f"\n{line}\n", CONFIGURATION) == [line]


def test_every_line_of_the_fragment_says_one_thing_once() -> None:
    lines = [
        line
        for line in FRAGMENT.read_text().splitlines()
        if "CONFIG_" in line and not line.startswith("# --")
    ]
    assert len(lines) == len(set(lines)) > 100
