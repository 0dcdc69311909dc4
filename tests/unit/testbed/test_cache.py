"""What the bed is made of: finished or not there, built once, forgotten when it was not used for long."""

import time
from pathlib import Path

import pytest

from tests.testbed import cache


def fill(target: Path) -> None:
    (target / "content").write_text("whole")


def test_the_same_recipe_is_built_once(tmp_path: Path) -> None:
    first = cache.entry("thing", ["a", 1], fill, tmp_path)
    assert (first / "content").read_text() == "whole"

    def again(_: Path) -> None:
        pytest.fail("it was there")

    assert cache.entry("thing", ["a", 1], again, tmp_path) == first


def test_another_recipe_is_another_thing(tmp_path: Path) -> None:
    assert cache.entry("thing", ["a"], fill, tmp_path) != cache.entry("thing", ["b"], fill, tmp_path)


def test_what_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        fill(target)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cache.entry("thing", ["a"], fail, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_what_a_killed_build_left_is_swept_away(tmp_path: Path) -> None:
    left = tmp_path / ".thing-x1/made"
    left.mkdir(parents=True)
    cache.entry("thing", ["a"], fill, tmp_path)
    assert not left.exists()


def test_those_used_last_are_kept(tmp_path: Path) -> None:
    names = []
    for recipe in ("a", "b", "a", "c"):
        names.append(cache.entry("thing", [recipe], fill, tmp_path))
        time.sleep(0.01)  # of one clock tick, by which the file system tells their age
    assert set(tmp_path.glob("thing-*")) == {names[0], names[3]}
