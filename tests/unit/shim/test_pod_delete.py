"""Delete: what is taken away with a container, once, and what goes with the pod's own."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.errors import (
    FailedPrecondition,
    NotFound,
)
from rpc.method import Method
from shim.process import SIGKILL
from tests.unit.rpc.wires import run, until
from tests.unit.shim.pods import POD, running_pod


def test_what_runs_cannot_be_deleted(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            for exec_id in ("shell", ""):
                with pytest.raises(FailedPrecondition, match="cannot delete a process that is running"):
                    await tested.pod.delete(POD, exec_id)

    run(life())


@pytest.mark.parametrize(("name", "method"), [("second", api.DELETE), (POD, api.SYNC)])
def test_two_deletes_at_once_delete_once(
    tmp_path: Path, name: str, method: Method[api.DeleteRequest, Empty] | Method[Empty, Empty]
) -> None:
    """containerd asks again when its own client gave up waiting."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run(name)
            await tested.exit(name, status=5)
            gate = tested.agent.hold(method)
            deletes = [asyncio.create_task(tested.pod.delete(name)) for _ in range(2)]
            await tested.agent.reached(method)
            await tested.agent.calls_settle()
            gate.set()
            for answer in await asyncio.gather(*deletes, return_exceptions=True):
                assert isinstance(answer, tuple | NotFound), repr(answer)
            assert tested.told.count(f"delete {name} 5") == 1

    run(life())


def test_a_container_that_never_ran_is_told_to_be_deleted(tmp_path: Path) -> None:
    """As containerd's own shim does: its clients wait for /tasks/delete."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create("second")
            _, end = await tested.pod.delete("second")
            assert end.exit_status == 137
            assert tested.told == ["create second", "delete second 137"]

    run(life())


def test_a_deleted_container_leaves_nothing_on_the_host(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            before = len(os.listdir("/proc/self/fd"))
            await tested.run("second")
            await tested.exit("second")
            await tested.pod.delete("second")
            assert list(tested.guest.machine.share.iterdir()) == []
            await until(lambda: len(os.listdir("/proc/self/fd")) == before)
            assert tested.anchors.ended(0)
            assert tested.agent.containers == {}
            await tested.run("second")

    run(life())


def test_the_machine_goes_with_the_container_that_the_pod_is_named_after(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run("second")
            await tested.exit("second")
            await tested.pod.delete("second")
            assert not tested.guest.qemu.exited.is_set()
            await tested.run()
            await tested.exit()
            await tested.pod.delete(POD)
            assert tested.guest.files.exited.is_set()
            await tested.guest.qemu.exited.wait()
            assert tested.agent.calls[-1] == "Sync"
            assert tested.state()["state"] == "stopping"

    run(life())


def test_with_the_machine_every_other_container_of_the_pod_ends(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            other = await tested.run("second")
            await tested.exit()
            await tested.pod.delete(POD)
            await other.init.exited.wait()
            assert "exit second 137" in tested.told

    run(life())


def test_a_guest_that_does_not_delete_keeps_nothing_on_the_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run("second")
            tested.add_exec("shell", "second")
            await tested.pod.start("second", "shell")
            await tested.exit("second", status=5)
            tested.agent.fails["Delete"] = FailedPrecondition("device or resource busy")
            assert (await tested.pod.delete("second", "shell"))[1].exit_status == 137
            assert container.execs == {}
            assert (await tested.pod.delete("second"))[1].exit_status == 5
            assert tested.pod.containers == {}
            assert list(tested.guest.machine.share.iterdir()) == []

    run(life())
    assert "exec shell: the guest did not delete it: device or resource busy" in caplog.text
    assert "container second: the guest did not delete it: device or resource busy" in caplog.text


def test_what_was_written_is_flushed_when_the_pods_own_container_ends(tmp_path: Path) -> None:
    """Its client will want it deleted, and finds that done."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.run("second")
            await tested.exit()
            await tested.agent.calls_settle()
            assert "Sync" not in tested.agent.calls, "something runs yet"
            assert not tested.pod.ending.is_set()
            await tested.exit("second")
            await tested.agent.reached(api.SYNC)
            assert tested.pod.ending.is_set()
            await tested.pod.delete(POD)
            assert tested.agent.calls.count("Sync") == 1

    run(life())


def test_what_is_written_after_an_early_flush_is_flushed_too(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create("second")
            await tested.run()
            await tested.pod.kill("second", "", SIGKILL)
            await tested.exit()
            await tested.agent.reached(api.SYNC)
            await tested.run("third")
            await tested.pod.delete(POD)
            assert tested.agent.calls.count("Sync") == 2

    run(life())


def test_a_delete_waits_for_the_flush_that_is_under_way(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            answer = tested.agent.hold(api.SYNC)
            await tested.run()
            await tested.exit()
            await tested.agent.reached(api.SYNC)
            deleting = asyncio.create_task(tested.pod.delete(POD))
            await tested.agent.calls_settle()
            assert not deleting.done()
            assert not tested.guest.qemu.exited.is_set()
            answer.set()
            await deleting

    run(life())
