"""What is told of a pod's processes, and in which order: a start before its exit, execs before their init."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rpc.api import agent as api
from shim import container
from tests.unit.rpc.wires import run
from tests.unit.shim.pods import POD, running_pod


def test_a_container_is_created_started_ends_and_is_deleted(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            pod = tested.pod
            container = await tested.create()
            assert container.pid == tested.anchors.pids[0] + 1_000_000
            assert container.init.state.name == "created"
            await pod.start(POD)
            assert container.init.state.name == "running"
            await tested.exit(status=42)
            assert container.init.end.exit_status == 42
            pid, end = await pod.delete(POD)
            assert (pid, end.exit_status) == (container.pid, 42)
            assert pod.containers == {}
            assert tested.told == ["create web", "start web", "exit web 42", "delete web 42"]

    run(life())


def test_an_exit_before_start_was_answered_is_told_after_the_start(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            answer = tested.agent.hold(api.START_CONTAINER)
            starting = asyncio.create_task(tested.pod.start(POD))
            await tested.agent.reached(api.START_CONTAINER)
            await tested.agent.exit(POD, status=1)
            await tested.agent.calls_settle()
            assert tested.told == ["create web"]
            answer.set()
            await starting
            await tested.pod.container(POD).init.exited.wait()
            assert tested.told == ["create web", "start web", "exit web 1"]

    run(life())


def test_an_exit_before_create_was_answered_is_told_after_the_create(tmp_path: Path) -> None:
    """Killed by the guest's kernel while the runtime was still at it: the exit must not be lost."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            answer = tested.agent.hold(api.CREATE_CONTAINER)
            creating = asyncio.create_task(tested.create())
            await tested.agent.reached(api.CREATE_CONTAINER)
            tested.agent.tell(api.EventKind.OOM, POD)
            await tested.agent.exit(POD, status=137)
            tested.agent.tell(api.EventKind.OOM, POD)
            await tested.agent.calls_settle()
            answer.set()
            container = await creating
            await container.init.exited.wait()
            assert [line for line in tested.told if line != "oom web"] == ["create web", "exit web 137"]

    run(life())


def test_execs_end_before_the_init_does(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            await tested.exit(status=3)
            assert tested.told == [
                "create web",
                "start web",
                "exec-added web/shell",
                "exec-started web/shell",
                "exit web/shell 137",
                "exit web 3",
            ]

    run(life())


def test_an_exec_whose_start_is_not_answered_yet_still_ends_before_the_init(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            answer = tested.agent.hold(api.EXEC)
            starting = asyncio.create_task(tested.pod.start(POD, "shell"))
            await tested.agent.reached(api.EXEC)
            await tested.agent.exit(POD, status=3)
            await tested.agent.calls_settle()
            answer.set()
            await starting
            await tested.pod.container(POD).init.exited.wait()
            await tested.pod.container(POD).process("shell").exited.wait()
            assert tested.told[-3:] == ["exec-started web/shell", "exit web/shell 137", "exit web 3"]

    run(life())


def test_an_end_is_told_once_however_often_the_guest_claims_it(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            await tested.exit(status=3)
            tested.agent.tell(api.EventKind.EXIT, POD, status=4)
            await tested.agent.calls_settle()
            assert container.init.end.exit_status == 3
            assert tested.told.count("exit web 3") == 1
            assert "exit web 4" not in tested.told

    run(life())


def test_events_of_what_nobody_knows_are_dropped(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.agent.tell(api.EventKind.EXIT, "stranger", status=4)
            tested.agent.tell(api.EventKind.EXIT, POD, "stranger", status=4)
            tested.agent.tell(api.EventKind.OOM, "stranger")
            await tested.exit(status=0)
            assert tested.told == ["create web", "start web", "exit web 0"]

    run(life())


def test_a_guest_cannot_place_an_exit_outside_the_life_of_its_pod(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            for name, claimed in (("web", 1), ("second", (1 << 63) - 1)):
                await tested.run(name)
                await tested.agent.exit(name, at_ns=claimed)
                init = tested.pod.container(name).init
                await init.exited.wait()
                assert 1_700_000_000 * 10**9 <= init.end.exited_at_ns < claimed or claimed == 1

    run(life())


def test_an_exit_status_is_a_byte(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            await tested.exit(status=0x1FF)
            assert container.init.end.exit_status == 255

    run(life())


def test_oom_is_told_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "OOM_EVERY_S", 60.0)  # a second may pass before the last one is told

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            for _ in range(50):
                tested.agent.tell(api.EventKind.OOM, POD)
            await tested.exit(status=137)
            assert tested.told == ["create web", "start web", "oom web", "exit web 137"]

    run(life())
