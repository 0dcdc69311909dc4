"""A running guest's clock, kept at the host's: when that is set, and now and then.

A guest goes on from the time that it was told when it came to run. It hears neither that the host's clock was
set (by hand, by a step of NTP's, when the host wakes from a suspend) nor what NTP makes it gain or lose.
"""

import asyncio
import logging
import os
import time

from rpc.api import agent as api
from rpc.errors import CasemateError
from shim import system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from shim.vm.guest import Machine

# What a quartz of a server's gains or loses in that time, 50 millionths of it, is 30 ms.
CHECK_S = 600
TOLERANCE_NS = 2_000_000
MOST_NS = (1 << 63) - 1  # of a sint64: a guest may answer anything
log = logging.getLogger("casemate")


async def follow(machine: "Machine", check_s: float = CHECK_S) -> None:
    """Until the machine is lost. A wake-up in ten minutes, and one each time that the host's clock is set."""
    watch = system.clock_watch()
    try:
        while not machine.lost.done():
            system.watch_clock(watch, check_s)
            waits: list[asyncio.Future[Any]] = [_readable(watch), machine.lost]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not machine.lost.done():
                await _set_right(machine)
    finally:
        asyncio.get_running_loop().remove_reader(watch)
        os.close(watch)


def _readable(fd: int) -> "asyncio.Future[None]":
    loop = asyncio.get_running_loop()
    readable = loop.create_future()

    def settle() -> None:
        loop.remove_reader(fd)
        if not readable.done():
            readable.set_result(None)

    loop.add_reader(fd, settle)
    return readable


async def _set_right(machine: "Machine") -> None:
    """The guest is asked for its time, and told by how much it is off, so that it does not matter how long
    that takes. Where it differs by less than that could be, it is left alone."""
    try:
        asked_ns = time.time_ns()
        answer = await machine.call(api.CLOCK, api.ClockRequest())
        doubt_ns = (time.time_ns() - asked_ns) // 2
        ahead_ns = answer.realtime_ns - asked_ns - doubt_ns
        if abs(ahead_ns) <= abs(doubt_ns) + TOLERANCE_NS:
            return
        by_ns = max(-MOST_NS, min(-ahead_ns, MOST_NS))
        await machine.call(api.CLOCK, api.ClockRequest(adjust_ns=by_ns))
    except CasemateError as error:
        log.warning("the guest's clock cannot be compared with the host's: %s", error)
    else:
        log.info("the guest's clock is moved by %.3f s, to be the host's", by_ns / 1e9)
