"""A pod as a whole: what is asked of it while it runs, its records, its end."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.codec import Message
from rpc.errors import (
    CasemateError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Unimplemented,
)
from shim.container import Container
from shim.trace import Trace
from shim.vm import sources
from shim.vm.guest import Machine
from shim.vm.setting import MachineRequest
from tests.unit.rpc.wires import run
from tests.unit.shim.guests import CALL_S
from tests.unit.shim.pods import POD, Recorder, Sleepers, close, config, empty_pod, host, running_pod


def test_only_a_terminal_that_lives_is_resized(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run("plain")
            await tested.run("tty", terminal=True)
            await tested.pod.resize("plain", "", 80, 25)
            assert "Resize" not in tested.agent.calls
            await tested.pod.resize("tty", "", 132, 50)
            assert tested.agent.process("tty").size == (132, 50)
            tested.add_exec("shell", "tty", terminal=True)
            await tested.pod.resize("tty", "shell", 1, 1)  # not started yet
            await tested.exit("tty")
            await tested.pod.resize("tty", "", 1, 1)
            assert tested.agent.calls.count("Resize") == 1

    run(life())


def test_resources_are_handed_to_the_guest(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.pod.update(POD, b'{"memory": {"limit": 1}}')
            assert tested.agent.process(POD).resources == [b'{"memory":{"limit":1}}']

    run(life())


def test_what_a_later_container_asks_of_the_machine_is_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            asked = {"dev.casemate.vcpus": "3"}
            await tested.pod.create(tested.new(document=config(annotations=asked)))
            await tested.pod.create(tested.new("alike", document=config(annotations=asked)))
            assert not caplog.records
            asked = {"dev.casemate.vcpus": "4", "org.example": "x"}
            await tested.pod.create(tested.new("other", document=config(annotations=asked)))

    run(life())
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("container other: dev.casemate.vcpus=4: the VM is as the pod's first container")


def test_resources_that_the_guest_cannot_give_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a kubelet with static CPUs sets them, while the container runs."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.pod.update(POD, b'{"cpu": {"cpus": "2-3", "quota": 400000, "shares": 9}}')
            (given,) = tested.agent.process(POD).resources
            assert json.loads(given) == {"cpu": {"quota": 400000, "shares": 9}}
            with pytest.raises(Unimplemented, match=r"linux\.resources\.rdma: not possible in a VM"):
                await tested.pod.update(POD, b'{"rdma": {"mlx5_0": {}}}')
            with pytest.raises(InvalidArgument, match=r"linux\.resources"):
                await tested.pod.update(POD, b"nonsense")
            assert len(tested.agent.process(POD).resources) == 1

    run(life())
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("cpu.cpus is left out" in line for line in warnings)
    assert any("cpu.quota is 4 CPUs" in line and "dev.casemate.vcpus" in line for line in warnings)


def test_statistics_are_the_guests(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            assert Metrics.decode(await tested.pod.stats(POD)) == tested.agent.metrics()

    run(life())


def test_an_agent_that_is_silent_is_named_with_the_consoles_words(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.guest.write_console("BUG: workqueue lockup\n")
            tested.agent.hold(api.UPDATE)
            with (
                tested.guest.hurried(api.UPDATE),
                pytest.raises(DeadlineExceeded, match="did not answer Update within") as caught,
            ):
                await tested.pod.update(POD, b"{}")
            assert "workqueue lockup" in (caught.value.details or "")

    run(life())


# --- the pod itself ---


def test_a_pod_that_is_refused_says_why_as_often_as_it_is_asked(tmp_path: Path) -> None:
    async def life() -> None:
        with host(tmp_path):
            pod = empty_pod(tmp_path, Recorder(), Sleepers())
            with pytest.raises(FailedPrecondition, match="was not started"):
                await pod.machine()
            pod.refuse(Unimplemented("host network: not possible in a VM", hint="use CNI"))
            for _ in range(2):
                with pytest.raises(Unimplemented, match=r"host network.*use CNI"):
                    await pod.machine()
            assert "host network" in json.loads(pod.paths.state.read_text())["error"]
            await close(pod)

    run(life())


def test_a_pod_whose_machine_does_not_boot_says_why(tmp_path: Path) -> None:
    async def life() -> None:
        with host(tmp_path):
            pod = empty_pod(tmp_path, Recorder(), Sleepers())
            pod.begin(config(annotations={"dev.casemate.vcpus": "64"}), 0.0)
            with pytest.raises(CasemateError, match=r"dev\.casemate\.vcpus is not allowed"):
                await pod.machine()
            await close(pod)

    run(life())


def test_the_state_of_a_pod_is_on_disk_at_every_step(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path, begun=False) as tested:
            tested.pod.begin(config(), 0.0)
            assert tested.state()["state"] == "starting"
            container = await tested.create()
            state = tested.state()
            assert state["state"] == "running"
            assert state["qemu_pid"] == tested.guest.qemu.pid
            assert state["virtiofsd_pid"] == tested.guest.files.pid
            assert (state["pid"], state["key"]) == (os.getpid(), tested.pod.paths.key)
            created = {"id": POD, "state": "created", "pid": container.pid, "exit_status": None}
            assert state["containers"] == [created]
            await tested.pod.start(POD)
            assert tested.state()["containers"] == [created | {"state": "running"}]
            await tested.exit(status=9)
            assert tested.state()["containers"] == [created | {"state": "stopped", "exit_status": 9}]
            assert json.loads(tested.pod.paths.trace.read_text())["spans"]

    run(life())


def test_records_that_cannot_be_written_do_not_fail_a_pod(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk; here the directory is away for a while."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            directory = tested.pod.paths.directory
            directory.rename(tmp_path / "away")
            await tested.pod.start(POD)
            await tested.exit()
            (tmp_path / "away").rename(directory)
            assert tested.told == ["create web", "start web", "exit web 0"]

    run(life())
    assert "state not written" in caplog.text


def test_a_pod_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM to the shim, with containers in every state."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            await tested.run("ended")
            await tested.exit("ended")
            await tested.create("created")
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            await tested.pod.stop()
            assert tested.guest.qemu.exited.is_set()
            assert tested.guest.files.exited.is_set()
            assert tested.pod.containers == {}
            assert list(tested.guest.machine.share.iterdir()) == []

    run(life())


def test_a_pod_can_be_stopped_while_a_container_is_being_created(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.hold(api.CREATE_CONTAINER)
            creating = asyncio.create_task(tested.create())
            await tested.agent.reached(api.CREATE_CONTAINER)
            async with asyncio.timeout(CALL_S / 2):
                await tested.pod.stop()
                with pytest.raises(CasemateError):
                    await creating
            assert list(tested.guest.machine.share.iterdir()) == []

    run(life())


def test_a_pod_that_has_no_machine_can_be_stopped(tmp_path: Path) -> None:
    async def life() -> None:
        with host(tmp_path):
            await close(empty_pod(tmp_path, Recorder(), Sleepers()))

    run(life())


def test_a_pod_can_be_stopped_while_its_machine_boots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits for the machine is not left waiting."""
    undone: list[str] = []

    async def obtain(_: MachineRequest, __: Trace, ___: sources.Wanted) -> Machine:
        try:
            await asyncio.Event().wait()
        finally:
            undone.append("machine")
        raise AssertionError

    async def life() -> None:
        with host(tmp_path):
            monkeypatch.setattr(sources, "obtain", obtain)
            pod = empty_pod(tmp_path, Recorder(), Sleepers())
            pod.begin(config(), 0.0)
            waiting = asyncio.create_task(pod.machine())
            await asyncio.sleep(0)
            await close(pod)
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert undone == ["machine"]

    run(life())


def test_a_mistake_of_ours_in_what_follows_an_event_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(container: Container, event: Message) -> None:
        raise ZeroDivisionError

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            monkeypatch.setattr(tested.pod._listener, "_publish", fail)
            await tested.agent.exit(POD)
            await container.init.exited.wait()
            await tested.agent.calls_settle()

    run(life())
    assert "a task of the pod failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_a_pod_that_never_gets_a_container_is_abandoned(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.pod.occupancy.abandoned(0.05)

    run(life())


def test_a_pod_with_a_container_or_one_in_the_making_is_not_abandoned(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            held = tested.agent.hold(api.CREATE_CONTAINER)
            creating = asyncio.create_task(tested.create())
            await tested.agent.reached(api.CREATE_CONTAINER)
            abandoned = asyncio.create_task(tested.pod.occupancy.abandoned(0.05))
            await asyncio.wait([abandoned], timeout=0.2)
            assert not abandoned.done()
            held.set()
            await creating
            await tested.pod.start(POD)
            await tested.exit()
            await asyncio.wait([abandoned], timeout=0.2)
            assert not abandoned.done()
            await tested.pod.delete(POD)
            await abandoned

    run(life())


def test_a_pod_whose_only_create_failed_is_abandoned(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.fails["CreateContainer"] = InvalidArgument("no")
            abandoned = asyncio.create_task(tested.pod.occupancy.abandoned(0.05))
            with pytest.raises(InvalidArgument):
                await tested.create()
            await abandoned

    run(life())
