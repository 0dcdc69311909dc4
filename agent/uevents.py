"""Waiting for a device by the kernel's own word that one has come or changed, never by polling."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import contextmanager, nullcontext

from rpc.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import TypeVar

    T = TypeVar("T")

DEVICE_WAIT_S = 30.0
_KOBJECT_UEVENT = 15  # NETLINK_KOBJECT_UEVENT
_where: Callable[[], AbstractContextManager[None]] = nullcontext


def told_in(where: Callable[[], AbstractContextManager[None]]) -> None:
    """where: as long as it lasts, the agent is in the machine's first network namespace. The kernel tells of
    devices in no other but those of the first user namespace (uevent_net_init in lib/kobject_uevent.c)."""
    global _where
    _where = where


@contextmanager
def _events(flags: int = 0) -> Iterator[socket.socket]:
    with _where():
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | flags, _KOBJECT_UEVENT)
    with events:
        events.bind((0, 1))
        yield events


async def appearance(look: Callable[[], T | None], what: str, limit_s: float) -> T:
    """As when_there(), while others go on."""
    loop = asyncio.get_running_loop()
    with _events(socket.SOCK_NONBLOCK) as events:
        try:
            async with asyncio.timeout(limit_s):
                while (found := look()) is None:
                    await loop.sock_recv(events, 65536)
        except TimeoutError:
            raise Unavailable(f"no {what} appeared within {limit_s:g} s") from None
        return found


def when_there(look: Callable[[], T | None], what: str, limit_s: float = DEVICE_WAIT_S) -> T:
    """look() as soon as it finds something, asked again after each of the kernel's device events.

    It blocks: who calls it has nothing else to do. Raises Unavailable after limit_s.
    """
    with _events() as events:
        deadline = time.monotonic() + limit_s
        while (found := look()) is None:
            events.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                events.recv(65536)
            except TimeoutError:
                raise Unavailable(f"no {what} appeared within {limit_s:g} s") from None
        return found
