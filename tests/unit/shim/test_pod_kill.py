"""Start, signals, pause: what a container may be asked in each state, and what that does in the guest."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
)
from tests.unit.rpc.wires import pass_time, run, until
from tests.unit.shim.guests import CALL_S
from tests.unit.shim.pods import POD, running_pod


def test_a_container_starts_once(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            with pytest.raises(FailedPrecondition, match="cannot start a process that is running"):
                await tested.pod.start(POD)
            await tested.exit()
            with pytest.raises(FailedPrecondition, match="stopped"):
                await tested.pod.start(POD)

    run(life())


def test_a_start_that_fails_can_be_deleted(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            tested.agent.fails["StartContainer"] = FailedPrecondition("exec format error")
            with pytest.raises(FailedPrecondition, match="exec format error"):
                await tested.pod.start(POD)
            assert tested.pod.container(POD).init.state.name == "created"
            _, end = await tested.pod.delete(POD)
            assert end.exit_status == 137

    run(life())


def test_what_does_not_exist_is_not_found(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            pod = tested.pod
            await tested.run()
            for coroutine in (
                pod.start("other"),
                pod.kill("other", "", 9),
                pod.delete("other"),
                pod.pause("other"),
                pod.resume("other"),
                pod.resize("other", "", 80, 25),
                pod.update("other", b"{}"),
            ):
                with pytest.raises(NotFound, match="container other does not exist"):
                    await coroutine
            with pytest.raises(NotFound, match="container other"):
                await pod.stats("other")
            for coroutine in (pod.start(POD, "x"), pod.kill(POD, "x", 9), pod.delete(POD, "x")):
                with pytest.raises(NotFound, match="exec x of container web does not exist"):
                    await coroutine

    run(life())


def test_a_signal_reaches_the_program(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.agent.obeys = False
            await tested.pod.kill(POD, "", 15)
            tested.agent.obeys = True
            await tested.pod.kill(POD, "", 10, everything=True)
            await container.init.exited.wait()
            assert tested.agent.process(POD).signals == [15, 10]
            assert container.init.end.exit_status == 138

    run(life())


def test_what_has_ended_cannot_be_killed(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            await tested.exit(exec_id="shell")
            with pytest.raises(NotFound, match="process shell has ended already"):
                await tested.pod.kill(POD, "shell", 9)
            await tested.exit()
            with pytest.raises(NotFound, match="process web has ended already"):
                await tested.pod.kill(POD, "", 9)

    run(life())


def test_an_exec_that_was_not_started_cannot_be_killed(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            with pytest.raises(FailedPrecondition, match="exec shell has not been started"):
                await tested.pod.kill(POD, "shell", 9)

    run(life())


def test_a_container_that_was_only_created_can_be_killed(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.create()
            await tested.pod.kill(POD, "", 9)
            await container.init.exited.wait()
            assert container.init.end.exit_status == 137

    run(life())


def test_a_sigkill_that_a_silent_agent_does_not_carry_out_ends_the_machine(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            tested.agent.obeys = False
            tested.agent.hold(api.SIGNAL)
            tested.guest.machine.call_timeout_s = 0.1  # nothing is answered any more
            for exec_id, number in (("", 15), ("shell", 9)):
                with pytest.raises(DeadlineExceeded, match="did not answer Signal"):
                    await tested.pod.kill(POD, exec_id, number)
            await tested.pod.kill(POD, "", 9)
            await container.init.exited.wait()
            assert container.init.end.exit_status == 137
            assert tested.guest.qemu.exited.is_set()

    run(life())


def test_the_anchors_death_is_the_containers(tmp_path: Path) -> None:
    """Somebody on the host kills the pid that `ps` shows: they mean the container."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            os.kill(tested.anchors.pids[0], 9)
            await container.init.exited.wait()
            assert tested.agent.calls.count("Signal") == 1
            assert tested.told[-1] == "exit web 137"

    run(life())


def test_the_anchors_end_on_deletion_kills_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create("second")
            await tested.pod.delete("second")
            await tested.agent.calls_settle()
            assert "Signal" not in tested.agent.calls

    run(life())
    assert "a task of the pod failed" not in caplog.text


def test_pause_and_resume(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            with pytest.raises(FailedPrecondition, match="cannot resume"):
                await tested.pod.resume(POD)
            await tested.pod.pause(POD)
            assert container.init.state.name == "paused"
            assert tested.agent.process(POD).state == "paused"
            with pytest.raises(FailedPrecondition, match="cannot exec in a container that is paused"):
                tested.add_exec("shell")
            await tested.pod.resume(POD)
            assert container.init.state.name == "running"
            assert tested.told[2:] == ["paused web", "resumed web"]
            await tested.exit()
            with pytest.raises(FailedPrecondition, match="cannot pause a process that is stopped"):
                await tested.pod.pause(POD)

    run(life())


def test_a_pause_that_the_guest_refuses_changes_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.agent.fails["Pause"] = FailedPrecondition("no freezer")
            with pytest.raises(FailedPrecondition, match="no freezer"):
                await tested.pod.pause(POD)
            assert container.init.state.name == "running"
            assert tested.told == ["create web", "start web"]

    run(life())


def test_an_anchor_that_is_killed_under_a_silent_agent_ends_the_machine(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.agent.obeys = False
            tested.agent.hold(api.SIGNAL)
            tested.guest.machine.call_timeout_s = 0.1  # nothing is answered any more
            os.kill(tested.anchors.pids[0], 9)
            await container.init.exited.wait()
            assert tested.guest.qemu.exited.is_set()

    run(life())


def test_an_anchor_that_is_killed_when_its_container_has_ended_is_no_matter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.exit()
            os.kill(tested.anchors.pids[0], 9)
            await tested.pod.container(POD).anchor.exited.wait()
            await tested.agent.calls_settle()
            assert "Signal" not in tested.agent.calls
            await tested.pod.delete(POD)

    caplog.set_level("INFO")
    run(life())
    assert "its anchor was killed" in caplog.text


def test_a_sigkill_that_comes_after_the_end_leaves_the_machine_alone(tmp_path: Path) -> None:
    """The program has ended, and the news of it are on their way."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.agent.process(POD).state = "stopped"
            with pytest.raises(NotFound, match="has ended"):
                await tested.pod.kill(POD, "", 9)
            tested.agent.tell(api.EventKind.EXIT, POD, status=5)
            await container.init.exited.wait()
            await tested.agent.calls_settle()
            assert container.init.end.exit_status == 5
            assert not tested.guest.qemu.exited.is_set()
            assert tested.told == ["create web", "start web", "exit web 5"]

    run(life())


def test_a_sigkill_that_is_answered_and_not_carried_out_ends_the_machine(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.agent.obeys = False
            for _ in range(2):
                await tested.pod.kill(POD, "", 9)
            assert not container.init.exited.is_set()
            pass_time(CALL_S + 1)
            await container.init.exited.wait()
            assert container.init.end.exit_status == 137
            assert tested.guest.qemu.exited.is_set()

    run(life())


def test_a_sigkill_that_is_carried_out_ends_nothing_else(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            other = await tested.run("second")
            container = await tested.run()
            watching = len(tested.pod._tasks)
            await tested.pod.kill(POD, "", 9)
            await container.init.exited.wait()
            await until(lambda: len(tested.pod._tasks) == watching)  # nobody counts the time any more
            assert not tested.guest.qemu.exited.is_set()
            assert not other.init.exited.is_set()

    run(life())
