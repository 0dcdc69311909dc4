"""Processes of a pod that are killed: the client is told in time, and all of the pod goes."""

import json
import time

import pytest

from tests.unit.shim.pods import config
from tests.vm import faults
from tests.vm.pods import Pods, every_version

TOLD_S = 30.0
"""From the kill to the end of `ctr run`."""


@pytest.mark.parametrize("process", ["qemu-system", "virtiofsd"])
def test_a_process_of_a_running_pod_is_killed(pods: Pods, process: str) -> None:
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", "echo up; exec sleep 1000", name=name) as running:
        running.read_until(b"up\n", 60)
        faults.kill_and_wait(faults.wait_process(pods.ctr.instance, process))
        result = running.finish(TOLD_S)
    assert result.code != 0
    # ctr is told an exit status only: the words are in what is kept of the pod
    words = "QEMU" if process == "qemu-system" else "virtiofsd"
    assert words in (pods.ended_directory(name) / "shim.log").read_text()
    assert words in (pods.ended_directory(name) / "state.json").read_text()


@pytest.mark.parametrize("process", ["qemu-system", "virtiofsd"])
def test_a_process_of_a_booting_pod_is_killed(pods: Pods, process: str) -> None:
    with pods.start("true") as running:
        faults.kill_and_wait(faults.wait_process(pods.ctr.instance, process))
        result = running.finish(TOLD_S)
    faults.refused(result, "QEMU" if process == "qemu-system" else "virtiofsd", within_s=40)


def test_calls_after_qemu_was_killed_say_so(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        faults.kill_and_wait(faults.find_process(pods.ctr.instance, "qemu-system"))
        pods.wait_status(name, "STOPPED", timeout_s=TOLD_S)
        result = pods.exec(name, "true")
        assert result.code != 0
        assert result.seconds < faults.AT_ONCE_S


@every_version
def test_the_shim_of_a_running_pod_is_killed(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", "echo up; exec sleep 1000", name=name) as running:
        running.read_until(b"up\n", 60)
        faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
        # ctr hears that the connection is gone and says so, with runc as well: what counts is that all goes
        assert running.finish(TOLD_S).code != 0


def test_the_shim_of_a_detached_pod_is_killed(pods: Pods) -> None:
    """containerd itself notices, calls the shim's `delete`, and tells the exit."""
    with pods.detached("sleep", "1000") as name:
        faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
        deadline = time.monotonic() + TOLD_S
        while pods.status(name) == "RUNNING":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert pods.exec(name, "true").code != 0


def test_the_shim_of_a_booting_pod_is_killed(pods: Pods) -> None:
    with pods.start("true") as running:
        faults.wait_process(pods.ctr.instance, "qemu-system")
        faults.kill_and_wait(faults.shim_pid(pods.ctr.instance))
        result = running.finish(TOLD_S)
    assert result.code != 0


def test_the_client_of_a_booting_pod_is_killed(pods: Pods) -> None:
    """Nobody will start or delete it: what ctr made must be removable, and then all is gone."""
    name = pods.ctr.new_id()
    argv = pods.argv(name, ("true",), ())
    with pods.ctr.start(*argv) as running:
        faults.wait_process(pods.ctr.instance, "qemu-system")
        running.process.kill()
        running.process.wait(10)
    pods.ctr("task", "delete", "--force", name, timeout_s=40)
    pods.ctr("container", "delete", name, timeout_s=10).ok()


def test_containerd_and_the_shim_are_killed_at_once(pods: Pods) -> None:
    """A node that lost both: the next containerd's `delete` cleans up."""
    instance = pods.ctr.instance
    with pods.detached("sleep", "1000") as name:
        shim = faults.shim_pid(instance)
        instance.signal(9)
        instance.wait_exit(instance.containerd_pid, 60)
        faults.kill_and_wait(shim)
        instance.start()
        assert pods.status(name) in ("", "STOPPED")


@pytest.mark.parametrize("empty_s", [0.2, 4.0], ids=["booting", "booted"])
def test_a_pod_whose_containerd_never_comes_back_ends_itself(pods: Pods, empty_s: float) -> None:
    """containerd was killed after `start` and lost its state: nobody asks for a container, nobody deletes."""
    instance, name = pods.ctr.instance, pods.ctr.new_id()
    instance.configure(f"[timeouts]\nempty_s = {empty_s}\n")
    bundle = instance.work / name
    bundle.mkdir()
    (bundle / "config.json").write_text(json.dumps(config()))
    program = instance.base / "bin" / "containerd-shim-casemate-v2"
    flags = f"-namespace {pods.ctr.namespace} -address /run/containerd/containerd.sock -id {name}"
    start = instance.spawn(["sh", "-c", f"cd {bundle} && exec {program} {flags} start </dev/null"])
    assert instance.wait_exit(start, 60) == 0
    deadline = time.monotonic() + 60
    while pods.paths(name).directory.exists():
        assert time.monotonic() < deadline, "it goes on"
        time.sleep(0.05)
    assert "timeouts.empty_s" in (pods.ended_directory(name) / "shim.log").read_text()
    for path in bundle.iterdir():
        path.unlink()
    bundle.rmdir()
