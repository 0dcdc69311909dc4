"""casemated's side of the pool: how many machines wait, of which kind, and when another one is made.

What a kind is it is told by the fork server's children, which know; here it is a digest and a few numbers. A
machine is a connection whose other end is held by the process that has it (node/spare.py): that process ends
when the connection does, so none outlives casemated. One is made at a time.
"""

import socket
import time
from collections.abc import Callable, Iterable
from typing import Any

from config.settings import Settings, to_mapping
from shim import forkserver

# What lies between a failure to make a machine and the next try: twice as long each time.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
# A machine that takes longer is given up: another one is only begun when it is ready.
MOST_MAKING_S = 600.0
# No machine is made when less of the host's memory than this would be left.
KEPT_FREE = 1 / 8


class Kind:
    """What pods that are alike ask for. order: for who makes one (node/order.py). digest: empty until one is
    made or asked for."""

    def __init__(self, order: dict[str, Any], digest: str = "") -> None:
        self.order = order
        self.digest = digest
        self.pause_s = FIRST_PAUSE_S
        self.not_before_s = 0.0
        self.said = ""  # of what went wrong last: it is told once

    @property
    def profile(self) -> str:
        return str(self.order["profile"]["name"])

    @property
    def wanted(self) -> int:
        """How many the operator wants, of all of its profile's kinds."""
        return int(self.order["settings"]["node"]["pool"].get(self.profile, 0))

    @property
    def memory_bytes(self) -> int:
        return int(self.order["profile"]["memory_bytes"])

    @property
    def refill_s(self) -> float:
        """From a machine's being taken to the making of another."""
        return float(self.order["settings"]["node"]["pool_refill_s"])

    @property
    def most_memory_bytes(self) -> int:
        return int(self.order["settings"]["node"]["pool_memory_bytes"])


class Spare:
    """A machine that waits, or is being made."""

    def __init__(self, lifeline: socket.socket, kind: Kind) -> None:
        self.lifeline = lifeline
        self.kind = kind
        self.ready = False
        self.begun_s = time.monotonic()


class Pool:
    """Told of what happens by note() and hear(); acts in tend()."""

    def __init__(
        self,
        make: Callable[[dict[str, Any]], socket.socket | None],
        say: Callable[[str], None],
        memory: Callable[[], tuple[int, int]],
    ) -> None:
        """make: has a machine made to an order, and returns its lifeline, or None while that is not possible.
        memory: (what could be had, what there is) of the host, in bytes.
        """
        self._make = make
        self._say = say
        self._memory = memory
        self._asked: dict[str, list[Kind]] = {}
        self._spares: list[Spare] = []
        self._is_short = False

    # --- being told ---

    def expect(self, order: dict[str, Any]) -> None:
        """Pods of this kind may come, though none was asked for yet."""
        self._ask_for(Kind(order))

    def note(self, words: dict[str, Any]) -> None:
        """What a child of the fork server says of a `start`."""
        digest = str(words["digest"])
        known = [kind for kinds in self._asked.values() for kind in kinds if kind.digest == digest]
        self._ask_for(known[0] if known else Kind(words["order"], digest))

    def _ask_for(self, kind: Kind) -> None:
        """It is what its profile was asked for last. As many times as machines are wanted are remembered."""
        asked = self._asked.setdefault(kind.profile, [])
        asked.insert(0, kind)
        del asked[max(kind.wanted, 1) :]

    def _targets(self, profile: str) -> dict[Kind, int]:
        """How many of each kind there should be: as they were asked for of late, the last for the rest."""
        asked = self._asked[profile]
        targets = {kind: asked.count(kind) for kind in asked}
        newest = asked[0]
        targets[newest] += max(newest.wanted - len(asked), 0)
        return targets if newest.wanted else {}

    def lifelines(self) -> list[socket.socket]:
        """What hear() wants to be called for when it can be read."""
        return [spare.lifeline for spare in self._spares]

    def hear(self, lifeline: socket.socket) -> None:
        spare = next(spare for spare in self._spares if spare.lifeline is lifeline)
        try:
            words, _ = forkserver.receive(lifeline, time.monotonic())
        except (OSError, ValueError):
            self._forget(spare)
            self._put_off(spare.kind, "its process has ended")
            return
        if "ready" in words:
            spare.ready = True
            spare.kind.digest = spare.kind.digest or str(words["ready"])[:8]
            spare.kind.pause_s, spare.kind.said = FIRST_PAUSE_S, ""
            self._make_room(spare.kind.profile)
        elif "taken" in words:
            self._forget(spare)
            now_s = time.monotonic()
            if spare.kind.not_before_s < now_s:  # else many starts in a row would put it off for ever
                spare.kind.not_before_s = now_s + spare.kind.refill_s
        else:
            self._forget(spare)
            self._put_off(spare.kind, str(words.get("failed")))

    def _put_off(self, kind: Kind, why: str) -> None:
        if kind.said != why:
            self._say(
                f"no machine of profile {kind.profile} for the pool; again in {kind.pause_s:.0f} s: {why}"
            )
            kind.said = why
        kind.not_before_s = time.monotonic() + kind.pause_s
        kind.pause_s = min(2 * kind.pause_s, LONGEST_PAUSE_S)

    def _make_room(self, profile: str) -> None:
        """One more than is wanted may be there, so that none goes before another one has come."""
        targets = self._targets(profile)
        alike = [spare for spare in self._spares if spare.kind.profile == profile]
        for _ in range(len(alike) - sum(targets.values())):
            count = {spare.kind: sum(each.kind is spare.kind for each in alike) for spare in alike}
            needless = max(alike, key=lambda spare: count[spare.kind] - targets.get(spare.kind, 0))
            alike.remove(needless)
            self._forget(needless)

    def _forget(self, spare: Spare) -> None:
        """One that nobody has taken ends."""
        self._spares.remove(spare)
        spare.lifeline.close()

    # --- acting ---

    def tend(self) -> float | None:
        """Begins to make a machine if one is lacking. When to call again though nothing happens, as
        time.monotonic() tells."""
        now_s = time.monotonic()
        for spare in [spare for spare in self._spares if not spare.ready]:
            if now_s < (until_s := spare.begun_s + MOST_MAKING_S):
                return until_s  # unless its end, or that it is ready, is heard of before
            self._forget(spare)
            self._put_off(spare.kind, f"it was not ready within {MOST_MAKING_S:.0f} s")
        lacking = list(self._lacking())
        for kind in lacking:
            if kind.not_before_s <= now_s and self._has_memory(kind):
                lifeline = self._make(kind.order)
                if lifeline is not None:
                    self._spares.append(Spare(lifeline, kind))
                    return self._spares[-1].begun_s + MOST_MAKING_S
            if kind.not_before_s <= now_s:
                kind.not_before_s = now_s + LONGEST_PAUSE_S / 6
        return min((kind.not_before_s for kind in lacking), default=None)

    def _lacking(self) -> Iterable[Kind]:
        """The kinds of which one should be made."""
        for profile in self._asked:
            for kind, target in self._targets(profile).items():
                if sum(spare.kind is kind for spare in self._spares) < target:
                    yield kind

    def _has_memory(self, kind: Kind) -> bool:
        used = sum(spare.kind.memory_bytes for spare in self._spares)
        available, total = self._memory()
        short = ""
        if used + kind.memory_bytes > kind.most_memory_bytes:
            short = f"node.pool_memory is {kind.most_memory_bytes >> 20} MiB, and {used >> 20} of it are used"
        elif available - kind.memory_bytes < total * KEPT_FREE:
            short = f"the host has {available >> 20} MiB of memory left"
        if short and not self._is_short:
            self._say(f"no machine of profile {kind.profile} for the pool: {short}")
        self._is_short = bool(short)
        return not short

    def drain(self) -> None:
        """Ends all that nobody has taken."""
        for spare in list(self._spares):
            self._forget(spare)


def plain_orders(settings: Settings, nature: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """What pods would ask for that are given no directory, before any has asked. nature: of whoever asked
    last, if somebody ever did."""
    for name, count in settings.node.pool.items():
        profile = settings.profiles[name]
        if count and profile.template == "shared":
            yield {
                "settings": to_mapping(settings),
                "profile": vars(profile),
                "tenant": "",
                "own_files": True,
                "shares_directories": False,
                "nature": nature,
            }


def memory() -> tuple[int, int]:
    """(available, total) of /proc/meminfo, in bytes (proc(5))."""
    found = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) << 10
    return found["MemAvailable"], found["MemTotal"]
