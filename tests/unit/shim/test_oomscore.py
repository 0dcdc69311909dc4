"""shim/oomscore.py: on processes of the test's own."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.errors import InvalidArgument
from shim import oci
from shim.helper import Watched
from shim.oomscore import OomScores


@asynccontextmanager
async def sleeper() -> AsyncIterator[Watched]:
    process = await asyncio.create_subprocess_exec("sleep", "60")
    watched = Watched("sleep", process.pid)
    try:
        yield watched
    finally:
        process.kill()
        await process.wait()
        await watched.exited.wait()


def score_of(process: Watched) -> int:
    return int(Path(f"/proc/{process.pid}/oom_score_adj").read_text())


def test_the_most_precious_container_decides() -> None:
    async def life() -> None:
        scores = OomScores()
        async with sleeper() as qemu, sleeper() as files:
            machine = (qemu, files)
            before = score_of(qemu)
            with scores.asked("says-nothing", None, machine):
                assert score_of(qemu) == before
                with scores.asked("one", 900, machine):
                    assert {score_of(process) for process in machine} == {900}
                    with scores.asked("other", 700, machine):
                        assert score_of(qemu) == 700
                    assert score_of(qemu) == 900

    asyncio.run(life())


def test_a_machine_that_has_ended_has_no_score(caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        async with sleeper() as qemu:
            pass
        with caplog.at_level(logging.WARNING), OomScores().asked("one", 900, (qemu,)):
            assert not caplog.records

    asyncio.run(life())


def test_a_score_that_no_kernel_takes_is_refused() -> None:
    assert oci.oom_score(oci.parse({"process": {}})) is None
    assert oci.oom_score(oci.parse({"process": {"oomScoreAdj": -997}})) == -997
    with pytest.raises(InvalidArgument, match="oomScoreAdj 1001"):
        oci.oom_score(oci.parse({"process": {"oomScoreAdj": 1001}}))
