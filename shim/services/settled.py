"""Calls that are finished even if their caller leaves: containerd restarts, a deadline passes."""

import asyncio
import logging

log = logging.getLogger("casemate")


class Settled:
    """What changes a pod is not left half done. It must not know what is called."""

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[object]] = set()

    async def __call__(self, coroutine: "Coroutine[object, object, T]") -> "T":
        """What it returns or raises; where the caller is cancelled, it goes on, and a failure is logged."""
        task = asyncio.create_task(coroutine)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Nobody else will ask how it went.
            task.add_done_callback(lambda done: _log_failure(None if done.cancelled() else done.exception()))
            raise


def _log_failure(error: BaseException | None) -> None:
    if error is not None:
        log.warning("a call whose caller had left failed: %s", error)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import TypeVar

    T = TypeVar("T")
