"""Waiting in tests for what has no event of its own, and for processes that are others'."""

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PR_SET_CHILD_SUBREAPER, PR_GET_CHILD_SUBREAPER = 36, 37


@contextmanager
def as_subreaper() -> Iterator[None]:
    """Processes whose parents are gone become ours; afterwards it is as before."""
    prctl = ctypes.CDLL(None).prctl
    before = ctypes.c_int()
    assert prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) == 0
    assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


async def until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.002)


async def reaped(pid: int) -> None:
    await until(lambda: not os.path.exists(f"/proc/{pid}"))
