"""The guest's own kernel, as far as nothing is compiled: what is kept, and what its build is told."""

import json
from pathlib import Path

import pytest

from images.packages import Fetched
from images.tuned import kernel as tuned
from rpc.errors import FailedPrecondition


def keep(cache: Path, suite: str, fragment: str) -> None:
    entry = cache / "tuned/kernel-0123456789abcdef"
    entry.mkdir(parents=True)
    (entry / "origin.json").write_text(json.dumps({"suite": suite, "fragment": fragment, "versions": {}}))


def test_a_kernel_of_this_recipe_is_found_whatever_compiled_it(tmp_path: Path) -> None:
    assert not tuned.kept("trixie", tmp_path)
    keep(tmp_path, "trixie", tuned.FRAGMENT.read_text())
    assert tuned.kept("trixie", tmp_path)
    assert not tuned.kept("bookworm", tmp_path)


def test_a_kernel_of_another_recipe_is_not(tmp_path: Path) -> None:
    keep(tmp_path, "trixie", "CONFIG_64BIT=y\n")
    assert not tuned.kept("trixie", tmp_path)


def test_the_kernel_says_which_source_it_is_of(tmp_path: Path) -> None:
    versions = {"gcc-14": "14.2.0-19", "linux-source": "6.12.117-1", "linux-source-6.12": "6.12.117-1"}
    settings = tuned.settings(Fetched(tmp_path, versions))
    assert settings["KBUILD_BUILD_TIMESTAMP"] == "Debian 6.12.117-1"


@pytest.mark.parametrize("sources", [(), ("linux-source-6.1", "linux-source-6.12")])
def test_one_source_is_built(sources: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="one kernel source"):
        tuned.settings(Fetched(tmp_path, dict.fromkeys(sources, "6-1")))
