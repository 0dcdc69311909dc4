"""Samples are taken in turns, and only what took turns is compared."""

from dataclasses import replace

import pytest

from bench.turns import Sample, Value, check_interleaved, take_turns
from rpc.errors import FailedPrecondition
from tests.unit.bench.runs import samples


def test_ways_take_turns_in_one_order() -> None:
    order: list[str] = []

    def action(name: str) -> list[Value]:
        order.append(name)
        return [Value("run", 1.0)]

    found = take_turns({name: lambda name=name: action(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(order) == "abcabcabc"
    assert [sample.turn for sample in found] == list(range(9))
    assert [sample.round for sample in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_run_that_goes_on_counts_its_turns_on() -> None:
    first = take_turns({"a": lambda: [Value("run", 1.0)]}, 2)
    second = take_turns({"a": lambda: [Value("exec", 1.0)]}, 2, first_turn=2)
    assert [sample.turn for sample in first + second] == [0, 1, 2, 3]


def test_what_took_turns_may_be_compared() -> None:
    check_interleaved(samples("run", {"a": [1, 2], "b": [3, 4], "c": [5, 6]}), "c", "a", "run")


def test_clients_of_one_turn_are_one_turn() -> None:
    actions = {name: lambda: [Value("run", 1.0), Value("run", 2.0)] for name in "ab"}
    check_interleaved(take_turns(actions, 2), "a", "b", "run")


def test_one_after_the_other_is_refused() -> None:
    """A A A B B B: the rounds are there, the turns do not alternate."""
    found = [Sample("a", "run", 1.0, number, number) for number in range(3)]
    found += [Sample("b", "run", 1.0, number, 3 + number) for number in range(3)]
    with pytest.raises(FailedPrecondition, match="not interleaved") as caught:
        check_interleaved(found, "b", "a", "run")
    assert "round 1" in str(caught.value.details)


def test_two_runs_in_one_list_are_refused() -> None:
    found = samples("run", {"a": [1, 2, 3]}) + samples("run", {"b": [1, 2, 3]})
    with pytest.raises(FailedPrecondition, match="not interleaved"):
        check_interleaved(found, "b", "a", "run")


def test_two_runs_of_the_same_ways_in_one_list_are_refused() -> None:
    once = samples("run", {"a": [1, 2], "b": [1, 2]})
    again = [replace(sample, turn=sample.turn + 10) for sample in once]
    with pytest.raises(FailedPrecondition, match="not interleaved"):
        check_interleaved(once + again, "b", "a", "run")


def test_different_rounds_are_refused() -> None:
    found = [s for s in samples("run", {"a": [1, 2, 3], "b": [1, 2, 3]}) if (s.way, s.round) != ("b", 1)]
    with pytest.raises(FailedPrecondition) as caught:
        check_interleaved(found, "b", "a", "run")
    assert "same rounds" in str(caught.value.details)


def test_one_round_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as caught:
        check_interleaved(samples("run", {"a": [1], "b": [1]}), "b", "a", "run")
    assert "at least 2 rounds" in str(caught.value.details)
