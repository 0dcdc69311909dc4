"""Takes samples in turns, A B C A B C, and says whether samples did take turns: only those are compared.

It knows no runtime and no container: what is measured is a callable.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rpc.errors import FailedPrecondition

FEWEST_ROUNDS = 2
"""A B is one thing after another; A B A B is the least that is interleaved."""


@dataclass(frozen=True, slots=True)
class Value:
    """What one action measured. source: where the pod's machine came from, empty if that is not known."""

    measure: str
    value: float
    source: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A value with its place in the run. round counts A B C; turn counts every A, B and C. Both from 0.

    One turn gives several samples of a measure where several clients run at once.
    """

    way: str
    measure: str
    value: float
    round: int
    turn: int
    source: str = ""


Action = Callable[[], Iterable[Value]]


def take_turns(
    actions: Mapping[str, Action],
    rounds: int,
    *,
    first_turn: int = 0,
    on_round: Callable[[int], None] | None = None,
) -> list[Sample]:
    """Every action once per round, always in the same order. Whatever the machine does, it does to all.

    first_turn: how many turns the run had before. on_round hears each round's number before it begins.
    """
    samples: list[Sample] = []
    turn = first_turn
    for number in range(rounds):
        if on_round is not None:
            on_round(number)
        for way, action in actions.items():
            found = [Sample(way, v.measure, v.value, number, turn, v.source) for v in action()]
            samples += found
            turn += 1
    return samples


def by_round(samples: Iterable[Sample], way: str, measure: str) -> dict[int, list[float]]:
    """The values of one way's measure, round by round."""
    rounds: dict[int, list[float]] = {}
    for sample in samples:
        if sample.way == way and sample.measure == measure:
            rounds.setdefault(sample.round, []).append(sample.value)
    return rounds


def check_interleaved(samples: Sequence[Sample], one: str, other: str, measure: str) -> None:
    """Raises FailedPrecondition if the turns of two ways do not alternate in every round.

    It is the turns that are looked at, so that samples of two runs in one list are found out.
    """
    brief = f"{one} and {other} were not interleaved, so their {measure} is not compared"
    turns: dict[str, dict[int, set[int]]] = {one: {}, other: {}}
    for sample in samples:
        if sample.way in turns and sample.measure == measure:
            turns[sample.way].setdefault(sample.round, set()).add(sample.turn)
    if turns[one].keys() != turns[other].keys():
        raise FailedPrecondition(brief, details="they were not measured in the same rounds")
    if len(turns[one]) < FEWEST_ROUNDS:
        raise FailedPrecondition(brief, details=f"that takes at least {FEWEST_ROUNDS} rounds of both")
    last = -1
    for number in sorted(turns[one]):
        first, second = turns[one][number], turns[other][number]
        if len(first) != 1 or len(second) != 1:
            raise FailedPrecondition(brief, details=f"round {number} has more than one turn of one of them")
        if first == second or min(first | second) <= last:
            raise FailedPrecondition(brief, details=f"their turns do not alternate in round {number}")
        last = max(first | second)
