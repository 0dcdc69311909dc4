"""Quantiles and ratios of samples whose answer is known."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import stats
from bench.turns import Sample
from rpc.errors import FailedPrecondition, NotFound
from tests.unit.bench.runs import samples


def test_quantiles_of_a_hundred_and_one() -> None:
    found = stats.summary([float(number) for number in range(101)])
    assert (found.count, found.median, found.p95, found.p99) == (101, 50.0, 95.0, 99.0)
    assert (found.least, found.most) == (0.0, 100.0)


def test_the_bad_end_of_a_rate_is_its_low_one() -> None:
    found = stats.summary([float(number) for number in range(101)], most_is_best=True)
    assert (found.p95, found.p99) == (5.0, 1.0)


def test_one_sample_is_its_own_quantile() -> None:
    found = stats.summary([3.0])
    assert (found.median, found.p95, found.p99) == (3.0, 3.0, 3.0)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_quantiles_are_in_order_and_within(values: list[float]) -> None:
    found = stats.summary(values)
    slack = 1e-9 * found.most
    assert found.least <= found.median <= found.p95 + slack
    assert found.p95 <= found.p99 + slack <= found.most + 2 * slack


def test_a_ratio_is_of_medians() -> None:
    found = stats.ratio(samples("run", {"a": [1, 9, 2], "b": [4, 6, 8]}), "run", "b", "a")
    assert found.value == 3.0
    assert found.low <= 3.0 <= found.high
    assert found.rounds == 3


def test_the_interval_is_repeatable_and_depends_on_the_seed() -> None:
    draw = random.Random(7)  # noqa: S311
    found = samples("run", {way: [draw.uniform(1, 9) for _ in range(9)] for way in "ab"})
    once = stats.ratio(found, "run", "b", "a", seed=1)
    assert once == stats.ratio(found, "run", "b", "a", seed=1)
    assert once != stats.ratio(found, "run", "b", "a", seed=2)


def test_what_slows_a_whole_round_down_does_not_widen_the_interval() -> None:
    """Rounds are drawn for both ways together, which is what taking turns is for."""
    slow = [1.0, 1.0, 5.0, 1.0, 7.0, 1.0, 1.0, 3.0]
    found = stats.ratio(samples("run", {"a": slow, "b": [2 * s for s in slow]}), "run", "b", "a")
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)


def test_the_interval_holds_what_it_says() -> None:
    """Of 100 runs whose true ratio is 2, about 95 say so: fewer than 85 would be another statistic."""
    draw = random.Random(1)  # noqa: S311
    hits = 0
    for seed in range(100):
        values = {"a": [draw.gauss(1, 0.1) for _ in range(15)], "b": [draw.gauss(2, 0.2) for _ in range(15)]}
        found = _quick_ratio(samples("run", values), seed)
        hits += found.low <= 2.0 <= found.high
    assert 85 <= hits <= 100


def _quick_ratio(found: list[Sample], seed: int) -> stats.Ratio:
    return stats.ratio(found, "run", "b", "a", seed=seed)


def test_clients_of_a_turn_are_drawn_together() -> None:
    """Ten clients of each turn that all say the same are no more than one."""
    one = samples("run", {"a": [1, 2, 3], "b": [2, 9, 4]})
    ten = [sample for sample in one for _ in range(10)]
    assert stats.ratio(ten, "run", "b", "a").low == stats.ratio(one, "run", "b", "a").low
    assert statistics.median([s.value for s in ten if s.way == "b"]) == 4


def test_no_ratio_of_what_did_not_take_turns() -> None:
    with pytest.raises(FailedPrecondition, match="b and a were not interleaved"):
        stats.ratio(samples("run", {"a": [1, 2]}) + samples("run", {"b": [1, 2]}), "run", "b", "a")


def test_no_ratio_to_what_was_not_measured() -> None:
    with pytest.raises(NotFound, match="no samples of run for a"):
        stats.ratio(samples("run", {"b": [1, 2]}), "run", "b", "a")


def test_no_ratio_to_nothing() -> None:
    with pytest.raises(FailedPrecondition, match="multiple of nothing"):
        stats.ratio(samples("pss", {"a": [0.0, 0.0], "b": [1.0, 2.0]}), "pss", "b", "a")
