"""Waiting for a device by the kernel's own word that one has come or changed, never by polling."""

from __future__ import annotations

import asyncio
import socket
import time

from rpc.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")

DEVICE_WAIT_S = 30.0
_KOBJECT_UEVENT = 15  # NETLINK_KOBJECT_UEVENT


async def appearance(look: Callable[[], T | None], what: str, limit_s: float) -> T:
    """As when_there(), while others go on."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _KOBJECT_UEVENT) as events:
        events.bind((0, 1))
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
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _KOBJECT_UEVENT) as events:
        events.bind((0, 1))
        deadline = time.monotonic() + limit_s
        while (found := look()) is None:
            events.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                events.recv(65536)
            except TimeoutError:
                raise Unavailable(f"no {what} appeared within {limit_s:g} s") from None
        return found
