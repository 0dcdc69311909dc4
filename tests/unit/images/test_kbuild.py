"""A kernel's configuration is held to the fragment that asked for it, whatever Kconfig made of it."""

import re
from pathlib import Path

import pytest

from images import kbuild
from images.tuned import kernel as tuned
from rpc.errors import FailedPrecondition
from tests.testbed import kernel as testbed

CONFIGURATION = '# CONFIG_OFF is not set\nCONFIG_ON=y\nCONFIG_NAME="bed"\nCONFIG_MODULE=m\n'
FRAGMENTS = pytest.mark.parametrize(
    "fragment", [tuned.FRAGMENT, testbed.FRAGMENT], ids=lambda path: str(path.parent.name)
)


@pytest.mark.parametrize(
    "line",
    ["CONFIG_ON=y", 'CONFIG_NAME="bed"', "# CONFIG_OFF is not set", "# CONFIG_ABSENT is not set", "# why"],
)
def test_holds(line: str) -> None:
    kbuild.check(f"\n{line}\n", CONFIGURATION)


@pytest.mark.parametrize(
    "line",
    ["CONFIG_OFF=y", "CONFIG_MODULE=y", 'CONFIG_NAME="other"', "CONFIG_ABSENT=y", "# CONFIG_ON is not set"],
)
def test_is_turned_down_by_name(line: str) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        kbuild.check(f"CONFIG_ON=y\n{line}\n", CONFIGURATION)
    assert caught.value.details == line


@FRAGMENTS
def test_every_line_of_a_fragment_says_one_thing_once(fragment: Path) -> None:
    lines = fragment.read_text().splitlines()
    said = [line for line in lines if line and not (line.startswith("#") and "is not set" not in line)]
    assert all(re.fullmatch(r"CONFIG_\w+=(y|m|\d+|\".*\")|# CONFIG_\w+ is not set", line) for line in said)
    names = [re.findall(r"CONFIG_\w+", line)[0] for line in said]
    assert len(names) == len(set(names)) > 100


def test_make_gets_its_settings_in_every_call() -> None:
    configure, make = kbuild.commands("vmlinux", {"KBUILD_BUILD_TIMESTAMP": "Debian 6.12-1"})
    for script in (configure, make):
        assert "make --silent 'KBUILD_BUILD_TIMESTAMP=Debian 6.12-1'" in script
