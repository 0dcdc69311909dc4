"""Samples are taken in turns, and only what took turns is compared."""

import pytest

from bench.measure import Series, ratio, take_turns


def test_actions_take_turns_and_the_order_is_turned_round() -> None:
    order: list[str] = []

    def action(name: str, seconds: float) -> float:
        order.append(name)
        return seconds

    series = take_turns({"a": lambda: action("a", 1.0), "b": lambda: action("b", 2.0)}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert series["b"].seconds == (2.0, 2.0, 2.0)


def test_a_ratio_is_of_medians() -> None:
    times = {"a": iter((1.0, 9.0, 2.0)), "b": iter((4.0, 6.0, 8.0))}
    series = take_turns({name: lambda name=name: next(times[name]) for name in times}, 3)  # type: ignore[misc]
    assert ratio(series["b"], series["a"]) == 3.0


def test_what_did_not_take_turns_is_not_compared() -> None:
    first = take_turns({"a": lambda: 1.0}, 2)["a"]
    second = take_turns({"a": lambda: 1.0}, 2)["a"]
    with pytest.raises(ValueError, match="turns"):
        ratio(first, second)


def test_series_of_different_length_are_not_compared() -> None:
    with pytest.raises(ValueError, match="turns"):
        ratio(Series("a", (1.0,), 1), Series("b", (1.0, 2.0), 1))
