"""What may be said of samples: median, p95, p99, and the ratio of two ways with its confidence interval.

Standard library only, and repeatable: the same samples and seed give the same interval.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.turns import Sample, by_round, check_interleaved
from rpc.errors import FailedPrecondition, NotFound

RESAMPLES = 2000
CONFIDENCE = 0.95
FEW = 20
"""Below this many samples a 95th percentile is little more than the largest of them."""


@dataclass(frozen=True, slots=True)
class Summary:
    """In the unit of the values. 95 and 99 of 100 of them are no worse than p95 and p99."""

    count: int
    median: float
    p95: float
    p99: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of medians; low and high are the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def quantile(values: Sequence[float], percent: int) -> float:
    """The percent-th percentile, interpolated between neighbours (R's type 7). values must not be empty."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def summary(values: Sequence[float], *, most_is_best: bool = False) -> Summary:
    """values must not be empty. most_is_best: a rate, whose bad end is its low one."""
    return Summary(
        len(values),
        statistics.median(values),
        quantile(values, 5 if most_is_best else 95),
        quantile(values, 1 if most_is_best else 99),
        min(values),
        max(values),
    )


def ratio(samples: Sequence[Sample], measure: str, way: str, reference: str, *, seed: int = 0) -> Ratio:
    """How many times the reference's median a way's is, with a percentile bootstrap over rounds.

    Rounds are drawn, not samples: what happened to the machine in one happened to both ways, and the clients
    of one turn ran beside each other. Raises FailedPrecondition for ways that were not interleaved, NotFound
    for a way without samples.
    """
    ours, theirs = by_round(samples, way, measure), by_round(samples, reference, measure)
    for name, found in ((way, ours), (reference, theirs)):
        if not found:
            raise NotFound(f"there are no samples of {measure} for {name}")
    check_interleaved(samples, way, reference, measure)
    if any(value <= 0 for values in theirs.values() for value in values):
        raise FailedPrecondition(f"nothing is a multiple of nothing: {measure} of {reference} has a 0")
    rounds = sorted(ours)
    draw = random.Random(f"{seed} {measure} {way} {reference}")  # noqa: S311 - no secret, but repeatable
    drawn = sorted(_quotient(ours, theirs, draw.choices(rounds, k=len(rounds))) for _ in range(RESAMPLES))
    tail = (1 - CONFIDENCE) / 2
    return Ratio(
        _quotient(ours, theirs, rounds),
        drawn[int(tail * RESAMPLES)],
        drawn[int((1 - tail) * RESAMPLES) - 1],
        len(rounds),
    )


def _quotient(ours: dict[int, list[float]], theirs: dict[int, list[float]], rounds: Sequence[int]) -> float:
    def median(of: dict[int, list[float]]) -> float:
        return statistics.median([value for number in rounds for value in of[number]])

    return median(ours) / median(theirs)
