"""Every child is collected once, whenever it ends and whoever asks."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import pytest

from agent.reaper import Reaper
from tests.unit.agent.waiting import reaped


def with_reaper(scenario: Callable[[Reaper], Awaitable[None]]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        reaper = Reaper()
        reaper.install(loop)
        try:
            async with asyncio.timeout(20):
                await scenario(reaper)
        finally:
            reaper.close(loop)

    asyncio.run(main())


def shell(script: str) -> int:
    return os.posix_spawn("/bin/sh", ["sh", "-c", script], {})


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 42", 42), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)],
)
def test_status_counts_signals_as_a_shell_does(script: str, status: int) -> None:
    async def scenario(reaper: Reaper) -> None:
        ended = await reaper.watch(shell(script))
        assert ended.status == status
        assert ended.at_ns > 0

    with_reaper(scenario)


def test_many_at_once() -> None:
    async def scenario(reaper: Reaper) -> None:
        exits = [reaper.watch(shell(f"exit {number}")) for number in range(40)]
        assert [(await ended).status for ended in exits] == list(range(40))

    with_reaper(scenario)


def test_exit_before_watch_is_kept_while_expected() -> None:
    async def scenario(reaper: Reaper) -> None:
        with reaper.expecting():
            with reaper.expecting():
                pid = shell("exit 7")
                await reaped(pid)
            assert (await reaper.watch(pid)).status == 7

    with_reaper(scenario)


def test_nobodys_exit_is_forgotten() -> None:
    async def scenario(reaper: Reaper) -> None:
        pid = shell("exit 7")
        await reaped(pid)
        assert not reaper.watch(pid).done()

    with_reaper(scenario)


def test_orphans_of_others_disturb_nobody() -> None:
    async def scenario(reaper: Reaper) -> None:
        ended = reaper.watch(shell("sleep 0.01 & sleep 0.02 & exit 3"))
        assert (await ended).status == 3

    with_reaper(scenario)


def test_cancelled_waiter_does_not_stop_the_reaping() -> None:
    async def scenario(reaper: Reaper) -> None:
        pid = shell("exit 1")
        reaper.watch(pid).cancel()
        assert (await reaper.watch(shell("exit 2"))).status == 2
        await reaped(pid)

    with_reaper(scenario)


def test_close_gives_the_signal_back() -> None:
    async def scenario(reaper: Reaper) -> None:
        assert callable(signal.getsignal(signal.SIGCHLD))

    with_reaper(scenario)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
