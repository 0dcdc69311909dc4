"""Samples and what may be said of them. Two things may be compared only if they took turns in one run.

It knows no runtime and no container: what is measured is a callable.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Action = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Series:
    """Seconds of one thing, in the order measured. turns: which run of take_turns() it is of."""

    name: str
    seconds: tuple[float, ...]
    turns: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def most(self) -> float:
        return max(self.seconds)


_turns_taken = 0


def take_turns(actions: Mapping[str, Action], rounds: int) -> dict[str, Series]:
    """Each action once per round, in an order that is turned round every time; an action returns its seconds.

    Whatever the machine does meanwhile, it does to all of them.
    """
    global _turns_taken
    _turns_taken += 1
    names = list(actions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            samples[name].append(actions[name]())
    return {name: Series(name, tuple(values), _turns_taken) for name, values in samples.items()}


def ratio(one: Series, other: Series) -> float:
    """How many times longer `one` takes. Raises ValueError if they did not take turns."""
    if one.turns != other.turns or len(one.seconds) != len(other.seconds):
        raise ValueError(f"{one.name} and {other.name} were not measured in turns: they cannot be compared")
    return one.median / other.median
