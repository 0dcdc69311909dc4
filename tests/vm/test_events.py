"""What containerd's other clients hear: each event once, in order."""

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from bench.ctr import Ctr, CtrTimeout, read_until
from rpc.api import task
from rpc.errors import Unimplemented
from tests.vm import faults, taskapi
from tests.vm.pods import Pods, every_version


class Events:
    """`ctr events`, as it goes."""

    def __init__(self, ctr: Ctr, process: subprocess.Popen[bytes]) -> None:
        self.ctr = ctr
        self.process = process
        self.seen = b""

    def until(self, topic: str, name: str, timeout_s: float = 20.0) -> list[tuple[str, dict[str, object]]]:
        """Everything about this container, up to and including the first event of this topic."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while topic not in [found for found, _ in self.of(name)]:
            left = deadline - time.monotonic()
            self.seen += read_until(self.process.stdout.fileno(), b"\n", left, f"{topic} of {name}")
        return self.of(name)

    def of(self, name: str) -> list[tuple[str, dict[str, object]]]:
        """Topic and fields of each event of this container. A line: time, namespace, topic, JSON."""
        found = []
        for line in self.seen.decode().split("\n")[:-1]:
            before, brace, after = line.partition("{")
            fields = json.loads(brace + after)
            if name in (fields.get("container_id"), fields.get("id")) and "/tasks/" in before:
                found.append((before.split()[-1].removeprefix("/tasks/"), fields))
        return found


@contextlib.contextmanager
def listening(ctr: Ctr) -> Iterator[Events]:
    with ctr.start("events") as running:
        events = Events(ctr, running.process)
        # ctr does not say when it has subscribed: provoke events of our own until one is heard
        deadline = time.monotonic() + 60
        while not events.seen:
            assert time.monotonic() < deadline, "ctr events says nothing"
            ctr("namespaces", "label", ctr.namespace, "heard=yes").ok()
            with contextlib.suppress(CtrTimeout):
                assert running.process.stdout is not None
                events.seen += read_until(running.process.stdout.fileno(), b"\n", 0.2, "events")
        yield events


@every_version
def test_a_run_is_told_once_and_in_order(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with listening(pods.ctr) as events:
        assert pods.run("sh", "-c", "exit 9", name=name).code == 9
        told = events.until("delete", name)
    assert [topic for topic, _ in told] == ["create", "start", "exit", "delete"]
    assert told[2][1]["exit_status"] == 9
    assert told[2][1]["id"] == name
    assert told[3][1]["exit_status"] == 9


def test_an_exec_is_told_and_its_exit_comes_first(pods: Pods) -> None:
    with listening(pods.ctr) as events:
        with pods.detached("sleep", "1000") as name:
            pods.ctr("task", "exec", "--detach", "--exec-id", "helper", name, "sleep", "1000").ok()
            pods.kill(name).ok()
            pods.wait_status(name, "STOPPED")
        told = events.until("delete", name)
    topics = [topic for topic, _ in told]
    assert topics[:4] == ["create", "start", "exec-added", "exec-started"]
    exits = [fields["id"] for topic, fields in told if topic == "exit"]
    assert exits == ["helper", name]


def test_pause_and_resume_are_told(pods: Pods) -> None:
    with listening(pods.ctr) as events, pods.detached("sleep", "1000") as name:
        pods.ctr("task", "pause", name).ok()
        pods.ctr("task", "resume", name).ok()
        told = events.until("resumed", name)
        assert [topic for topic, _ in told] == ["create", "start", "paused", "resumed"]


def test_running_out_of_memory_is_told(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with listening(pods.ctr) as events:
        options = ("--memory-limit", str(64 << 20))
        assert pods.run("python3", "-c", "b = bytearray(200 << 20)", options=options, name=name).code == 137
        told = [topic for topic, _ in events.until("exit", name)]
    assert told[:4] == ["create", "start", "oom", "exit"]
    assert told.count("oom") == 1


def test_the_end_of_a_machine_is_told_once(pods: Pods) -> None:
    with listening(pods.ctr) as events:
        with pods.detached("sleep", "1000") as name:
            faults.kill_and_wait(faults.find_process(pods.ctr.instance, "qemu-system"))
            pods.wait_status(name, "STOPPED")
        told = [topic for topic, _ in events.until("delete", name)]
    assert told == ["create", "start", "exit", "delete"]


def test_checkpoint_is_unimplemented(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        result = pods.ctr("task", "checkpoint", name, timeout_s=20)
        assert result.code != 0
        assert "checkpoint" in result.err
        with pytest.raises(Unimplemented):
            taskapi.ask(pods, name, task.CHECKPOINT, task.CheckpointTaskRequest(id=name))
        assert pods.exec(name, "echo", "fine").ok().out == "fine\n"


def test_ctr_finds_the_shim_by_its_address(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        result = pods.ctr("shim", "--id", name, "state").ok()
        assert name in result.out
