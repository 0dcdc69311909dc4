"""What happened in the guest, in order, until the shim has taken it.

One subscriber; must not know what an event means.
"""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import contextmanager

from rpc.errors import FailedPrecondition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from rpc.api.agent import Event


class EventQueue:
    """An event leaves the queue only when the subscriber comes back for the next one: a connection
    that breaks while it is being sent loses nothing."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._subscribed = False

    @contextmanager
    def subscribe(self) -> Iterator[EventQueue]:
        if self._subscribed:
            raise FailedPrecondition("somebody listens to the guest's events already")
        self._subscribed = True
        try:
            yield self
        finally:
            self._subscribed = False

    def put(self, event: Event) -> None:
        self._events.append(event)
        self._arrived.set()

    async def first(self) -> Event:
        while not self._events:
            self._arrived.clear()
            await self._arrived.wait()
        return self._events[0]

    def forget(self) -> None:
        self._events.clear()

    def drop_first(self) -> None:
        self._events.popleft()
