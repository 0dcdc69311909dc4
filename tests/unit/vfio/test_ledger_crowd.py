"""Fifty processes at once, each with a connection of its own, want the same eight GPUs."""

import itertools
import os
import random
import signal
import sys
import traceback
from pathlib import Path

from tests.unit.vfio.claimers import any_wish, check, is_alive, myself, reset, whole_way
from tests.unit.vfio.hosts import dgx
from vfio.ledger.ledger import Ledger
from vfio.ledger.records import Cause, Pod, State

CLAIMERS = 50
ROUNDS = 4


def claimer(number: int, directory: Path, locks: Path, gate: int) -> int:
    """How many of its rounds got something. Opens the ledger, or makes it, once all are there."""
    os.read(gate, 1)
    wishes = random.Random(number)  # noqa: S311 - the same in every run
    got = 0
    with Ledger(directory) as ledger:
        for turn in range(ROUNDS):
            pod = Pod("k8s.io", f"pod-{number}-{turn}", f"tenant-{number % 3}")
            got += whole_way(ledger, pod, any_wish(wishes), dgx(), locks)
    return got


def crowd(directory: Path, locks: Path) -> tuple[list[int], int]:
    """The pids of children that all begin when the file descriptor is closed."""
    waiting, gate = os.pipe()
    pids = []
    for number in range(CLAIMERS):
        pid = os.fork()
        if pid == 0:
            os.close(gate)
            status = 255
            try:
                status = claimer(number, directory, locks, waiting)
            except BaseException:  # noqa: BLE001 - told by the status, and to who reads the test's output
                traceback.print_exc(file=sys.stderr)
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(waiting)
    return pids, gate


def test_no_two_ever_have_the_same(in_memory: Path) -> None:
    directory, locks = in_memory / "ledger", in_memory / "locks"
    locks.mkdir()
    pids, gate = crowd(directory, locks)
    os.close(gate)
    got = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert all(0 <= count <= ROUNDS for count in got)
    with Ledger(directory) as ledger:
        check(ledger)
        assert {device.state for device in ledger.devices()} == {State.FREE}
        assert ledger.claims() == []
        uses = ledger.usage()
        claims = [entry for entry in ledger.log(most=1_000_000) if entry.cause is Cause.CLAIM]
        assert len(claims) == sum(got)
        with_devices = {use.pod for use in uses}
        assert 0 < len(with_devices) < sum(got)  # others had CPUs alone
    assert sum(got) >= CLAIMERS  # or this shows nothing
    # They were at it at the same time.
    ordered = sorted(uses, key=lambda use: use.from_s)
    assert any(
        a.to_s is not None and a.to_s > b.from_s and a.pod != b.pod for a, b in itertools.pairwise(ordered)
    )


def test_a_crowd_that_is_killed_at_any_moment_leaves_what_can_be_put_right(in_memory: Path) -> None:
    directory, locks = in_memory / "ledger", in_memory / "locks"
    locks.mkdir()
    pids, gate = crowd(directory, locks)
    os.close(gate)
    order = random.Random(7)  # noqa: S311
    left = list(pids)
    with Ledger(directory) as ledger:
        seen = 0
        while left:
            # One is killed for each few transactions of the others: at no particular step.
            now = max((entry.number for entry in ledger.log(most=1)), default=0)
            if now < seen + order.randrange(1, 12) and any(map(_runs, left)):
                continue
            seen = now
            victim = left.pop(order.randrange(len(left)))
            os.kill(victim, signal.SIGKILL)
            os.waitpid(victim, 0)
        check(ledger)
        reset(ledger, ledger.collect(is_alive, myself()).devices)
        check(ledger)
        assert {device.state for device in ledger.devices()} == {State.FREE}
        assert whole_way(ledger, Pod("k8s.io", "last"), any_wish(order), dgx(), locks)


def _runs(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
