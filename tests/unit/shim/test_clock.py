"""A running guest's clock: compared with the host's, and moved by what it is off."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import Unavailable
from shim import clock, system
from tests.unit.rpc.wires import run, until
from tests.unit.shim.guests import Guest, running_guest

SECOND_NS = 10**9
NOW_S = -1.0  # a time that is up: the guest is asked again and again
NEVER_S = 3600.0


class GuestsClock:
    """A guest's, which is off by so much. answer_s: how long it takes to answer, after it has looked."""

    def __init__(self, off_ns: int, answer_s: float = 0.0) -> None:
        self.off_ns = off_ns
        self.asked = 0
        self.moved_ns: list[int] = []
        self._answer_s = answer_s

    async def handle(self, request: api.ClockRequest) -> api.ClockResponse:
        self.asked += 1
        found_ns = time.time_ns() + self.off_ns
        if request.adjust_ns:
            self.moved_ns.append(request.adjust_ns)
            self.off_ns += request.adjust_ns
        await asyncio.sleep(self._answer_s)
        return api.ClockResponse(realtime_ns=max(-(1 << 63), min(found_ns, (1 << 63) - 1)))


@asynccontextmanager
async def followed(path: Path, guests: GuestsClock, check_s: float = NOW_S) -> AsyncIterator[Guest]:
    async with running_guest(path) as guest:
        guest.agent.answer(api.CLOCK, guests.handle)
        following = asyncio.create_task(clock.follow(guest.machine, check_s))
        try:
            yield guest
            assert not following.done()
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


@pytest.mark.parametrize("off_s", [-7200, 60])
def test_a_clock_that_is_off_is_moved(tmp_path: Path, off_s: int) -> None:
    """As precisely as the answers are quick."""

    async def life() -> None:
        guests = GuestsClock(off_s * SECOND_NS)
        async with followed(tmp_path, guests):
            await until(lambda: len(guests.moved_ns) > 0)
            asked = guests.asked
            await until(lambda: guests.asked >= asked + 5)
        assert abs(guests.off_ns) < 10 * SECOND_NS

    run(life())


def test_what_may_be_the_way_alone_is_left(tmp_path: Path) -> None:
    """An answer that comes late says little of when it was written."""

    async def life() -> None:
        guests = GuestsClock(SECOND_NS // 50, answer_s=1.0)
        async with followed(tmp_path, guests):
            await until(lambda: guests.asked >= 2)
        assert guests.moved_ns == []

    run(life())


@pytest.mark.parametrize("off_ns", [1 << 66, -(1 << 66)])
def test_a_guest_may_say_anything(tmp_path: Path, off_ns: int) -> None:
    async def life() -> None:
        guests = GuestsClock(off_ns)
        async with followed(tmp_path, guests) as guest:
            await until(lambda: len(guests.moved_ns) > 2)
            assert not guest.machine.lost.done()

    run(life())


def test_nobody_is_asked_before_the_time_is_up_or_the_clock_set(tmp_path: Path) -> None:
    async def life() -> None:
        guests = GuestsClock(SECOND_NS)
        async with followed(tmp_path, guests, NEVER_S) as guest:
            await guest.machine.flush()  # an answer of the agent's that was asked for later
        assert guests.asked == 0

    run(life())


def test_one_that_cannot_be_asked_is_asked_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        guests = GuestsClock(3 * SECOND_NS)
        async with followed(tmp_path, guests) as guest:
            guest.agent.fails["Clock"] = Unavailable("not now")
            await until(lambda: "not now" in caplog.text)
            del guest.agent.fails["Clock"]
            await until(lambda: len(guests.moved_ns) > 0)

    run(life())


def test_the_end_of_the_machine_is_the_end_of_it(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_guest(tmp_path) as guest:
            before = set(os.listdir("/proc/self/fd"))
            following = asyncio.create_task(clock.follow(guest.machine, NEVER_S))
            await until(lambda: set(os.listdir("/proc/self/fd")) > before)
            guest.machine.qemu.kill()
            await following
            await guest.machine.end()

    run(life())


def test_a_watch_is_over_when_its_time_is(tmp_path: Path) -> None:
    watch = system.clock_watch()
    try:
        system.watch_clock(watch, NEVER_S)
        with pytest.raises(BlockingIOError):
            os.read(watch, 8)
        system.watch_clock(watch, NOW_S)
        assert int.from_bytes(os.read(watch, 8), "little") == 1
    finally:
        os.close(watch)
