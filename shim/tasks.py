"""Coroutines that nobody waits for: each runs to its end, and what goes wrong in one is told in the log.

It must not know what they do.
"""

import asyncio
import logging

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

log = logging.getLogger("casemate")


class Tasks:
    """failure: the log's words for one that raises."""

    def __init__(self, failure: str) -> None:
        self._failure = failure
        self._running: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        """How many run."""
        return len(self._running)

    def start(self, coroutine: "Coroutine[Any, Any, None]") -> "asyncio.Task[None]":
        task = asyncio.create_task(coroutine)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: "asyncio.Task[None]") -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error(self._failure, exc_info=error)

    async def cancel(self) -> None:
        """Returns when none runs any more."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
