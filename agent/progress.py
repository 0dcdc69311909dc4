"""Time limits that move with what a driver gets done, where several devices wait for it in turn.

Must not know which driver, nor what it does.
"""

from __future__ import annotations

import asyncio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


async def while_moving(waiting: asyncio.Future[T], steps: Callable[[], int], limit_s: float) -> T:
    """What it comes to, or raises; as long as steps(), which counts what the driver has done, changes within
    each limit_s. Raises TimeoutError once it has not; `waiting` goes on then.
    """
    done: int | None = None
    while not waiting.done():
        before, done = done, steps()
        if before == done:
            raise TimeoutError
        await asyncio.wait([waiting], timeout=limit_s)
    return waiting.result()
