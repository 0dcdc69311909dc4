"""How many machines are made, of which kind, and when: a real Pool, whose machines are a test's sockets."""

import copy
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from node.pool import LONGEST_PAUSE_S, MOST_MAKING_S, Pool, memory
from shim import forkserver

MIB = 1 << 20
GIB = 1 << 30
ORDER: dict[str, Any] = {
    "settings": {"node": {"pool": {"default": 2}, "pool_memory_bytes": 4 * GIB, "pool_refill_s": 7.0}},
    "profile": {"name": "default", "memory_bytes": 256 * MIB},
}


def order(count: int = 2, kind: str = "plain", **node: int) -> dict[str, Any]:
    made = copy.deepcopy(ORDER)
    made["settings"]["node"] |= {"pool": {"default": count}, **node}
    made["kind"] = kind
    return made


class Machines:
    """What a fork server would have made, in order; the other end of each lifeline is the process's."""

    def __init__(self) -> None:
        self.made: list[tuple[dict[str, Any], socket.socket, socket.socket]] = []
        self.said: list[str] = []
        self.memory = (8 * GIB, 16 * GIB)
        self.serves = True
        self.pool = Pool(self._make, self.said.append, lambda: self.memory)

    def _make(self, order: dict[str, Any]) -> socket.socket | None:
        if not self.serves:
            return None
        ours, theirs = socket.socketpair()
        self.made.append((order, ours, theirs))
        return ours

    @property
    def kinds(self) -> list[str]:
        return [made["kind"] for made, *_ in self.made]

    def tell(self, number: int, **words: object) -> None:
        """A machine's process says something, or ends without words, and casemated hears it."""
        _, ours, theirs = self.made[number]
        if words:
            forkserver.send(theirs, dict(words), time.monotonic() + 1)
        else:
            theirs.close()
        self.pool.hear(ours)

    def ready(self, number: int) -> None:
        self.tell(number, ready=self.made[number][0]["kind"].ljust(8, "0") + f"{number:08}")

    def ask(self, kind: str, count: int = 2) -> None:
        self.pool.note({"order": order(count, kind), "digest": kind.ljust(8, "0"), "why": ""})

    def fill(self) -> None:
        """Every machine that is wanted is made and ready."""
        while True:
            before = len(self.made)
            self.pool.tend()
            if len(self.made) == before:
                return
            self.ready(before)

    def do_not_wait(self) -> None:
        for kinds in self.pool._asked.values():
            for kind in kinds:
                kind.not_before_s = 0.0

    def alive(self) -> list[str]:
        """The kinds of those whose lifeline casemated holds."""
        return sorted(made["kind"] for made, ours, _ in self.made if ours.fileno() >= 0)


@pytest.fixture
def machines() -> Iterator[Machines]:
    machines = Machines()
    yield machines
    machines.pool.drain()
    for *_, theirs in machines.made:
        theirs.close()


def test_as_many_are_made_as_are_wanted_one_after_the_other(machines: Machines) -> None:
    machines.pool.expect(order())
    machines.pool.tend()
    machines.pool.tend()
    assert len(machines.made) == 1  # until it is ready
    machines.ready(0)
    machines.fill()
    assert machines.alive() == ["plain", "plain"]
    assert machines.pool.tend() is None


def test_one_that_is_taken_is_replaced_and_lives_on(machines: Machines) -> None:
    machines.ask("plain")
    machines.fill()
    before_s = time.monotonic()
    machines.tell(0, taken="it")
    again_s = machines.pool.tend()
    assert again_s is not None
    assert before_s + 7 <= again_s <= time.monotonic() + 7
    assert len(machines.made) == 2
    machines.tell(1, taken="it")
    assert machines.pool.tend() == again_s  # not later for the second one
    machines.do_not_wait()
    machines.fill()
    assert len(machines.made) == 4
    assert machines.alive() == ["plain", "plain"]


def test_kinds_are_kept_as_they_were_asked_for_of_late(machines: Machines) -> None:
    machines.pool.expect(order())
    machines.fill()
    machines.ask("other")
    machines.fill()
    assert machines.alive() == ["other", "plain"]
    machines.ask("other")
    machines.fill()
    assert machines.alive() == ["other", "other"]
    machines.ask("third")
    machines.fill()
    assert machines.alive() == ["other", "third"]


def test_none_goes_before_the_other_kind_has_come(machines: Machines) -> None:
    machines.ask("plain", count=1)
    machines.fill()
    machines.ask("other", count=1)
    machines.pool.tend()
    assert machines.kinds == ["plain", "other"]
    assert "plain" in machines.alive()
    machines.ready(1)
    assert machines.alive() == ["other"]


def test_what_was_expected_is_known_when_it_is_asked_for(machines: Machines) -> None:
    machines.pool.expect(order())
    machines.fill()
    machines.ask("plain")
    machines.fill()
    assert len(machines.made) == 2


def test_an_operator_who_wants_none_has_none(machines: Machines) -> None:
    machines.ask("plain")
    machines.fill()
    machines.ask("plain-of-others", count=0)
    machines.fill()
    assert len(machines.made) == 2


def test_a_failure_is_told_once_and_tried_again_later_each_time(machines: Machines) -> None:
    machines.ask("plain", count=1)
    machines.pool.tend()
    before_s = time.monotonic()
    machines.tell(0, failed="there is no template")
    again_s = machines.pool.tend()
    assert again_s is not None
    assert before_s + 1 <= again_s <= time.monotonic() + 1
    machines.do_not_wait()
    machines.pool.tend()
    before_s = time.monotonic()
    machines.tell(1, failed="there is no template")
    again_s = machines.pool.tend()
    assert again_s is not None
    assert before_s + 2 <= again_s <= time.monotonic() + 2
    assert len(machines.said) == 1
    for _ in range(10):
        machines.pool._put_off(machines.pool._asked["default"][0], "there is no template")
    again_s = machines.pool.tend()
    assert again_s is not None
    assert again_s - time.monotonic() <= LONGEST_PAUSE_S


def test_one_that_ends_without_a_word_is_a_failure(machines: Machines) -> None:
    machines.ask("plain", count=1)
    machines.fill()
    machines.tell(0)
    assert machines.pool.tend() is not None
    assert machines.alive() == []
    assert "its process has ended" in machines.said[0]


def test_one_that_never_becomes_ready_is_given_up(machines: Machines) -> None:
    """Its process hangs: without a limit no other machine would ever be made."""
    machines.pool.expect(order())
    before_s = time.monotonic()
    again_s = machines.pool.tend()
    assert again_s is not None
    assert again_s == machines.pool.tend()
    assert before_s + MOST_MAKING_S <= again_s <= time.monotonic() + MOST_MAKING_S
    (spare,) = machines.pool._spares
    spare.begun_s -= MOST_MAKING_S
    machines.pool.tend()
    assert machines.alive() == []
    assert "it was not ready within 600 s" in machines.said[0]
    machines.do_not_wait()
    machines.fill()
    assert machines.alive() == ["plain", "plain"]


def test_no_more_memory_is_used_than_the_operator_gives(machines: Machines) -> None:
    limited = order(5, pool_memory_bytes=600 * MIB)
    machines.pool.note({"order": limited, "digest": "plain000", "why": ""})
    machines.fill()
    assert machines.alive() == ["plain", "plain"]
    assert machines.pool.tend() is not None
    assert machines.said == [
        "no machine of profile default for the pool: node.pool_memory is 600 MiB, and 512 of it are used"
    ]


def test_none_is_made_where_the_hosts_memory_is_short(machines: Machines) -> None:
    machines.memory = (2 * GIB, 16 * GIB)
    machines.ask("plain")
    assert machines.pool.tend() is not None
    assert machines.made == []
    machines.memory = (3 * GIB, 16 * GIB)
    machines.do_not_wait()
    machines.fill()
    assert len(machines.made) == 2


def test_without_a_fork_server_one_is_tried_again(machines: Machines) -> None:
    machines.serves = False
    machines.ask("plain")
    assert machines.pool.tend() is not None


def test_draining_ends_all(machines: Machines) -> None:
    machines.ask("plain")
    machines.fill()
    machines.pool.drain()
    assert machines.alive() == []


def test_the_hosts_memory_is_read() -> None:
    available, total = memory()
    assert 0 < available < total
    assert total % 1024 == 0
