"""The life of a pod's containers as containerd sees it: order of events, refusals, what is left behind."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from rpc.api import agent as api
from rpc.api.cgroups import Metrics
from rpc.api.types import Empty
from rpc.errors import (
    AlreadyExists,
    CasemateError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
)
from rpc.method import Method
from tests.unit.rpc.wires import run, until
from tests.unit.shim.pods import POD, Recorder, Sleepers, close, config, empty_pod, host, running_pod


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
            async with asyncio.timeout(2):
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


def test_oom_is_told_at_most_once_a_second(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            for _ in range(50):
                tested.agent.tell(api.EventKind.OOM, POD)
            await tested.exit(status=137)
            assert tested.told == ["create web", "start web", "oom web", "exit web 137"]

    run(life())


# --- create ---


def test_a_second_create_of_the_same_id_is_refused(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            with pytest.raises(AlreadyExists, match="container web exists already"):
                await tested.create()
            assert tested.told == ["create web"]

    run(life())


def test_of_two_creates_at_once_one_is_refused(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            answers = await asyncio.gather(tested.create(), tested.create(), return_exceptions=True)
            assert sorted(type(answer).__name__ for answer in answers) == ["AlreadyExists", "Container"]

    run(life())


def test_a_create_that_the_guest_refuses_leaves_nothing_and_can_be_tried_again(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            tested.agent.fails["CreateContainer"] = NotFound("exec: nosuch: not found in $PATH")
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(NotFound, match="nosuch"):
                await tested.create()
            assert list(tested.guest.machine.share.iterdir()) == []
            assert tested.pod.containers == {}
            assert len(os.listdir("/proc/self/fd")) == before
            assert tested.told == []
            del tested.agent.fails["CreateContainer"]
            await tested.create()

    run(life())


def test_what_the_guest_is_given_is_a_spec_of_its_own_paths(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            document = json.loads(tested.agent.process(POD).document)
            assert document["root"] == {"path": "/run/casemate/shared/web/rootfs", "readonly": False}
            root = tested.guest.machine.share / "web/rootfs"
            assert tested.anchors.roots == [str(root)]
            assert root.is_dir()

    run(life())


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        ({"linux": {"namespaces": []}}, Unimplemented, "host network"),
        ({"process": {"args": "sh"}}, InvalidArgument, "process.args"),
    ],
)
def test_a_spec_that_cannot_be_honoured_is_refused_before_anything_is_made(
    tmp_path: Path, document: dict[str, object], error: type[CasemateError], words: str
) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            with pytest.raises(error, match=words):
                await tested.create(document=config(**document))
            assert list(tested.guest.machine.share.iterdir()) == []
            assert tested.agent.calls in ([], ["Events"])

    run(life())


def test_a_bundle_without_a_config_is_named(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            new = tested.new()
            (Path(new.bundle) / "config.json").unlink()
            with pytest.raises(NotFound, match=r"bundles/web/config\.json does not exist"):
                await tested.pod.create(new)

    run(life())


def test_a_guest_that_fills_its_share_cannot_keep_a_container_from_being_deleted(tmp_path: Path) -> None:
    """The share belongs to the guest: it may write what it wants there."""

    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            (tested.guest.machine.share / "web/left-behind").write_text("by the guest")
            await tested.exit()
            await tested.pod.delete(POD)
            assert tested.pod.containers == {}

    run(life())


def test_a_guest_that_took_a_containers_place_in_its_share_is_told_of(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            (tested.guest.machine.share / "web").symlink_to("/")
            with pytest.raises(CasemateError, match="web"):
                await tested.create()

    run(life())


# --- start, kill, pause, delete ---


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
        async with running_pod(tmp_path, call_timeout_s=0.2) as tested:
            container = await tested.run()
            tested.add_exec("shell")
            await tested.pod.start(POD, "shell")
            tested.agent.obeys = False
            tested.agent.hold(api.SIGNAL)
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
            assert tested.guest.qemu.exited.is_set()
            assert tested.guest.files.exited.is_set()
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
            async with asyncio.timeout(2):
                await other.init.exited.wait()
            assert "exit second 137" in tested.told

    run(life())


# --- exec ---


def test_an_exec_has_a_life_of_its_own(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            container = await tested.run()
            process = tested.add_exec("shell")
            assert process.state.name == "created"
            await tested.pod.start(POD, "shell")
            assert tested.agent.process(POD, "shell").document == b'{"args": ["true"]}'
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


# --- what is asked of a running container ---


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
            assert tested.agent.process(POD).resources == [b'{"memory": {"limit": 1}}']

    run(life())


def test_statistics_are_the_guests(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.run()
            assert Metrics.decode(await tested.pod.stats(POD)) == tested.agent.metrics()

    run(life())


def test_an_agent_that_is_silent_is_named_with_the_consoles_words(tmp_path: Path) -> None:
    async def life() -> None:
        async with running_pod(tmp_path, call_timeout_s=0.2) as tested:
            await tested.run()
            await tested.guest.write_console("BUG: workqueue lockup\n")
            tested.agent.hold(api.UPDATE)
            with pytest.raises(DeadlineExceeded, match="did not answer Update within") as caught:
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
        async with running_pod(tmp_path) as tested:
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


def test_a_full_disk_does_not_fail_a_pod(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def life() -> None:
        async with running_pod(tmp_path) as tested:
            await tested.create()
            tested.pod.paths.state.unlink()
            tested.pod.paths.state.with_name("state.json.new").symlink_to("/dev/full")
            await tested.pod.start(POD)
            await tested.exit()

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
            async with asyncio.timeout(3):
                await tested.pod.stop()
                with pytest.raises(CasemateError):
                    await creating
            assert list(tested.guest.machine.share.iterdir()) == []

    run(life())
