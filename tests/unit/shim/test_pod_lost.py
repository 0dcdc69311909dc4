"""The machine of a pod is lost, in every way it can be: everything in it ends once, and is told why."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import FailedPrecondition, NotFound, Unavailable
from tests.unit.rpc.wires import run
from tests.unit.shim.pods import POD, PodOfTest, running_pod


async def lose(tested: PodOfTest, how: str) -> None:
    if how == "qemu":
        os.kill(tested.guest.qemu.pid, 9)
    elif how == "virtiofsd":
        os.kill(tested.guest.files.pid, 9)
    else:
        await tested.guest.write_console("Kernel panic - not syncing: out of luck\nreboot: too late\n")
        os.kill(tested.guest.qemu.pid, 9)
    await tested.guest.machine.lost


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("qemu", "QEMU ended unexpectedly"),
        ("virtiofsd", r"virtiofsd ended unexpectedly \(killed by signal 9\)"),
        ("panic", "the guest's kernel panicked"),
    ],
)
def test_every_process_ends_once_execs_first(tmp_path: Path, how: str, words: str) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.run("second")
            await tested.create("created")
            await tested.run("ended")
            await tested.exit("ended", status=5)
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            tested.add_exec("unused")
            told = len(tested.told)
            await lose(tested, how)
            for name in (POD, "second", "created"):
                await tested.pod.container(name).init.exited.wait()
            await tested.agent.calls_settle()
            assert tested.told[told:] == [
                "exit web/shell 137",
                "exit web 137",
                "exit second 137",
                "exit created 137",
            ]
            await tested.guest.qemu.exited.wait()
            with pytest.raises(Unavailable, match=words):
                await tested.pod.stats(POD)
            with pytest.raises(Unavailable, match=words):
                await tested.pod.start("created")
            with pytest.raises(FailedPrecondition, match="cannot start a process that is stopped"):
                await tested.pod.start("ended")
            assert tested.state()["error"]
            with pytest.raises(NotFound, match="ended already"):
                await tested.pod.kill(POD, "", 9)

    run(life())


def test_what_is_lost_can_be_deleted(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.run("second")
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            await lose(tested, "qemu")
            await tested.pod.container("second").init.exited.wait()
            assert (await tested.pod.delete(POD, "shell"))[1].exit_status == 137
            assert (await tested.pod.delete("second"))[1].exit_status == 137
            assert (await tested.pod.delete(POD))[1].exit_status == 137
            assert tested.pod.containers == {}
            assert list(tested.guest.machine.share.iterdir()) == []

    run(life())


def test_a_start_that_the_machine_does_not_survive_says_why(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            tested.agent.hold(api.START_CONTAINER)
            starting = asyncio.create_task(tested.pod.start(POD))
            await tested.agent.reached(api.START_CONTAINER)
            await lose(tested, "panic")
            with pytest.raises(Unavailable, match=r"(?s)kernel panicked.*out of luck"):
                await starting
            await tested.pod.container(POD).init.exited.wait()
            assert tested.told == ["create web", "exit web 137"]

    run(life())


def test_an_exec_that_never_ran_does_not_end(tmp_path: Path) -> None:
    """Its Start failed with the machine: an exit without a start would confuse who waits for it."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            tested.agent.hold(api.EXEC)
            starting = asyncio.create_task(tested.pod.start(POD, "shell"))
            await tested.agent.reached(api.EXEC)
            await lose(tested, "qemu")
            with pytest.raises(Unavailable):
                await starting
            await tested.pod.container(POD).init.exited.wait()
            assert tested.told[2:] == ["exec-added web/shell", "exit web 137"]

    run(life())


def test_a_create_that_the_machine_does_not_survive_leaves_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.hold(api.CREATE_CONTAINER)
            creating = asyncio.create_task(tested.create())
            await tested.agent.reached(api.CREATE_CONTAINER)
            await lose(tested, "qemu")
            with pytest.raises(Unavailable, match="QEMU ended unexpectedly"):
                await creating
            assert tested.told == []
            assert list(tested.guest.machine.share.iterdir()) == []

    run(life())


def test_an_exit_that_came_before_the_end_of_the_machine_counts(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            await tested.exit(status=5)
            await lose(tested, "qemu")
            await tested.agent.calls_settle()
            assert container.init.end.exit_status == 5
            assert [line for line in tested.told if line.startswith("exit")] == ["exit web 5"]

    run(life())


def test_a_pod_that_was_lost_can_be_stopped(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await lose(tested, "virtiofsd")
            await tested.pod.stop()
            assert tested.guest.qemu.exited.is_set()
            assert tested.pod.containers == {}

    run(life())
