"""Many pods: one after another, every second one with a network, ten at once, and nothing left behind (the
census of the `ctr` fixture). CASEMATE_TEST_STARTS says how many one after another.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields

import pytest

from bench.netns import Namespace, connect, namespace
from tests.vm import census
from tests.vm.census import Census
from tests.vm.pods import Pods
from tests.vm.test_endurance import MOST_GROWTH, Held, held_by

STARTS = int(os.environ.get("CASEMATE_TEST_STARTS") or 50)
LIMIT_S = 300 + 15 * STARTS
SETTLED = 6
"""After so many a daemon has made what it makes once."""


def run(pods: Pods, number: int, script: str, options: tuple[str, ...] = ()) -> None:
    """A pod's whole life."""
    result = pods.run("sh", "-c", f"{script}echo run {number}; exit {number % 256}", options=options)
    assert (result.code, result.out) == (number % 256, f"run {number}\n"), result


def run_in_a_network(pods: Pods, number: int, outside: Namespace) -> None:
    """In a network namespace of its own, where nothing is left of it."""
    address, peer = (f"10.{77 + number // 250}.{number % 250}.{end}/24" for end in (2, 1))
    with namespace() as pod:
        connect(pod, "eth0", outside, f"v{number}", (address, peer))
        made = in_network(pod)
        run(pods, number, f"ip address show eth0 | grep -q ' {address} ' || exit 255; ", pod.options)
        assert in_network(pod) == made


def in_network(pod: Namespace) -> list[str]:
    """Interfaces, taps among them, and what is done to their packets."""
    names = [entry["ifname"] for entry in json.loads(pod.ip("-json", "link"))]
    return [*names, pod.run("tc", "qdisc"), pod.run("tc", "filter", "show", "dev", "eth0")]


def counts(found: Census, daemon: Held) -> dict[str, int]:
    return {field.name: len(getattr(found, field.name)) for field in fields(found)} | {
        "descriptors of containerd": daemon.descriptors,
        "MiB of containerd": daemon.resident_bytes >> 20,
    }


@pytest.mark.timeout(LIMIT_S)
def test_many_runs_one_after_another(pods: Pods) -> None:
    containerd = pods.ctr.instance.containerd_pid
    before = census.take(pods.ctr)
    settled = held_by(containerd)
    with namespace() as outside:
        for number in range(STARTS):
            if number % 2:
                run_in_a_network(pods, number, outside)
            else:
                run(pods, number, "")
            if number == SETTLED:
                # What leaks once per run shows here already, in a tenth of the time.
                assert census.left_after(pods.ctr, before) == []
                settled = held_by(containerd)
    assert census.left_after(pods.ctr, before) == []
    now = held_by(containerd)
    print(f"{STARTS} pods: {counts(before, settled)} -> {counts(census.take(pods.ctr), now)}")
    assert now.resident_bytes - settled.resident_bytes < MOST_GROWTH["containerd"]


@pytest.mark.timeout(600)
def test_ten_at_once(pods: Pods) -> None:
    with ThreadPoolExecutor(10) as pool:
        results = list(
            pool.map(lambda n: pods.run("sh", "-c", f"echo {n}; exit {n}", timeout_s=300), range(10))
        )
    assert [(result.code, result.out) for result in results] == [(n, f"{n}\n") for n in range(10)]
