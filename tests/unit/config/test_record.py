"""Frozen records without dataclasses."""

import pytest

from config.record import Record


class Point(Record):
    x: int
    y: int


class Other(Record):
    x: int
    y: int


def test_every_field_is_needed_and_no_other() -> None:
    assert (Point(x=1, y=2).x, Point(x=1, y=2).y) == (1, 2)
    with pytest.raises(TypeError, match="Point: missing or unknown: y"):
        Point(x=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing or unknown: z"):
        Point(x=1, y=2, z=3)  # type: ignore[call-arg]


def test_a_record_cannot_be_changed_only_copied() -> None:
    point = Point(x=1, y=2)
    with pytest.raises(AttributeError, match="frozen"):
        point.x = 3  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del point.x
    assert point.replace(x=3) == Point(x=3, y=2)
    assert point == Point(x=1, y=2)
    with pytest.raises(TypeError, match="z"):
        point.replace(z=1)


def test_records_are_equal_by_value_and_kind() -> None:
    assert Point(x=1, y=2) == Point(y=2, x=1)
    assert hash(Point(x=1, y=2)) == hash(Point(y=2, x=1))
    assert Point(x=1, y=2) != Point(x=2, y=2)
    assert Point(x=1, y=2) != Other(x=1, y=2)
    assert repr(Point(y=2, x=1)) == "Point(x=1, y=2)"
