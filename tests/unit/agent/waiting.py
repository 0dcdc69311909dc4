"""Waiting in tests for what has no event of its own."""

import asyncio
import os
from collections.abc import Callable


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.002)


async def reaped(pid: int) -> None:
    await until(lambda: not os.path.exists(f"/proc/{pid}"))
