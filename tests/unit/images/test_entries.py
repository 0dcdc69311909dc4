"""What takes long to make: finished or not there, built once, forgotten when it was not used for long."""

from collections.abc import Callable
from pathlib import Path

import pytest

from images.entries import entry
from tests.unit.ticks import next_tick


def made(home: Path, recipe: list[object], make: Callable[[Path], None]) -> Path:
    return entry(home, "thing", recipe, make, print)


def fill(target: Path) -> None:
    (target / "content").write_text("whole")


def test_the_same_recipe_is_built_once(tmp_path: Path) -> None:
    first = made(tmp_path, ["a", 1], fill)
    assert (first / "content").read_text() == "whole"

    def again(_: Path) -> None:
        pytest.fail("it was there")

    assert made(tmp_path, ["a", 1], again) == first


def test_another_recipe_is_another_thing(tmp_path: Path) -> None:
    assert made(tmp_path, ["a"], fill) != made(tmp_path, ["b"], fill)


def test_what_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        fill(target)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        made(tmp_path, ["a"], fail)
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_what_a_killed_build_left_is_swept_away(tmp_path: Path) -> None:
    left = tmp_path / ".thing-x1/made"
    left.mkdir(parents=True)
    made(tmp_path, ["a"], fill)
    assert not left.exists()


def test_those_used_last_are_kept(tmp_path: Path) -> None:
    names = []
    for recipe in ("a", "b", "a", "c"):
        names.append(made(tmp_path, [recipe], fill))
        next_tick()  # by which the file system tells their age
    assert set(tmp_path.glob("thing-*")) == {names[0], names[3]}
