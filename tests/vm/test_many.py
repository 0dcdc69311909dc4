"""Many pods: fifty one after another, ten at once, and nothing left behind (the census of the `ctr`
fixture).
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.vm import census
from tests.vm.pods import Pods


@pytest.mark.timeout(900)
def test_fifty_runs_one_after_another(pods: Pods) -> None:
    before = census.take(pods.ctr)
    for number in range(50):
        result = pods.run("sh", "-c", f"echo run {number}; exit {number}")
        assert (result.code, result.out) == (number, f"run {number}\n"), result
        if number == 4:
            # What leaks once per run shows here already, in a tenth of the time.
            assert census.left_after(pods.ctr, before) == []


@pytest.mark.timeout(600)
def test_ten_at_once(pods: Pods) -> None:
    with ThreadPoolExecutor(10) as pool:
        results = list(
            pool.map(lambda n: pods.run("sh", "-c", f"echo {n}; exit {n}", timeout_s=300), range(10))
        )
    assert [(result.code, result.out) for result in results] == [(n, f"{n}\n") for n in range(10)]
