"""Execs: a life of their own within a container's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
)
from tests.unit.rpc.wires import run
from tests.unit.shim.pods import POD, running_pod


def test_an_exec_has_a_life_of_its_own(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            process = tested.add_exec("shell")
            assert process.state.name == "created"
            await tested.pod.start(POD, "shell")
            assert tested.agent.process(POD, "shell").document == b'{"args":["true"]}'
            await tested.exit(exec_id="shell", status=7)
            pid, end = await tested.pod.delete(POD, "shell")
            assert (pid, end.exit_status) == (container.pid, 7)
            assert container.execs == {}
            assert container.init.state.name == "running"
            assert "shell" not in tested.agent.containers[POD]
            assert tested.told[2:] == ["exec-added web/shell", "exec-started web/shell", "exit web/shell 7"]
            tested.add_exec("shell")

    run(life())


def test_a_second_exec_of_the_same_id_is_refused(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            with pytest.raises(AlreadyExists, match="exec shell of container web exists already"):
                tested.add_exec("shell")

    run(life())


def test_nothing_can_be_executed_in_a_container_that_has_ended(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("late")
            await tested.exit()
            with pytest.raises(FailedPrecondition, match="cannot exec in a container that is stopped"):
                tested.add_exec("shell")
            with pytest.raises(FailedPrecondition, match="cannot exec in a container that is stopped"):
                await tested.pod.start(POD, "late")

    run(life())


def test_an_exec_that_the_guest_refuses_never_ran(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            tested.agent.fails["Exec"] = NotFound("no such program")
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(NotFound, match="no such program"):
                await tested.pod.start(POD, "shell")
            assert len(os.listdir("/proc/self/fd")) == before
            assert tested.pod.container(POD).process("shell").state.name == "created"
            await tested.pod.delete(POD, "shell")
            assert tested.told == ["create web", "start web", "exec-added web/shell"]

    run(life())


def test_an_exec_that_was_never_started_can_be_deleted(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            tested.add_exec("shell")
            _, end = await tested.pod.delete(POD, "shell")
            assert end.exit_status == 137
            assert container.execs == {}

    run(life())


def test_an_exec_of_which_the_guest_said_nothing_does_not_run(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            held = tested.agent.hold(api.EXEC)
            before = len(os.listdir("/proc/self/fd"))
            with (
                tested.guest.hurried(api.EXEC),
                pytest.raises(DeadlineExceeded, match="did not answer Exec"),
            ):
                await tested.pod.start(POD, "shell")
            assert "shell" not in tested.agent.containers[POD]
            assert len(os.listdir("/proc/self/fd")) == before
            held.set()
            await tested.pod.start(POD, "shell")  # it can be tried again
            await tested.exit(exec_id="shell", status=7)
            _, end = await tested.pod.delete(POD, "shell")
            assert end.exit_status == 7
            assert tested.told[2:] == ["exec-added web/shell", "exec-started web/shell", "exit web/shell 7"]

    run(life())


@pytest.mark.parametrize("then", ["start", "delete"])
def test_an_exec_that_may_still_be_in_the_guest_is_taken_away_before_all_else(
    tmp_path: Path, then: str
) -> None:
    """The agent was silent for so long that it could not even be told to forget it."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            exec_held = tested.agent.hold(api.EXEC)
            tested.agent.fails["Delete"] = DeadlineExceeded("silence")
            with (
                tested.guest.hurried(api.EXEC),
                pytest.raises(DeadlineExceeded, match="did not answer Exec"),
            ):
                await tested.pod.start(POD, "shell")
            assert tested.agent.process(POD, "shell").state == "running"
            first = tested.agent.process(POD, "shell")
            exec_held.set()
            del tested.agent.fails["Delete"]
            if then == "start":
                await tested.pod.start(POD, "shell")
                assert tested.agent.process(POD, "shell") is not first
            else:
                await tested.pod.delete(POD, "shell")
                assert "shell" not in tested.agent.containers[POD]

    run(life())
