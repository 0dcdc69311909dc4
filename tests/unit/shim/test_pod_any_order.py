"""Whatever is asked of a pod, in whatever order and at whatever time: the story that containerd is told
makes sense, only errors of ours are raised, and nothing is left behind.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rpc.api import agent as api
from rpc.errors import CasemateError, NotFound
from tests.unit.rpc.wires import run
from tests.unit.shim.pods import POD, PodOfTest, running_pod

NAMES = (POD, "second")
EXECS = ("", "shell", "probe")

WHAT = (
    *("create", "add exec", "start", "delete", "finish", "finish", "exit", "kill -9", "kill -15"),
    *("pause", "resume", "stats", "kill anchor", "oom", "lie"),
)
STEPS = st.tuples(
    st.sampled_from(WHAT), st.sampled_from(NAMES), st.sampled_from(EXECS), st.sampled_from((0, 1, 5, 30))
)


class Story:
    """What containerd was told, checked line by line."""

    def __init__(self) -> None:
        self.containers: dict[str, dict[str, str]] = {}
        """container: process (an exec's id, or "" for init): created, running or ended."""

    def read(self, line: str) -> None:
        topic, about, *_ = line.split()
        name, _, exec_id = about.partition("/")
        if topic == "create":
            assert name not in self.containers, line
            self.containers[name] = {"": "created"}
            return
        processes = self.containers[name]
        if topic == "exec-added":
            assert processes[""] == "running", line
            assert processes.get(exec_id) in (None, "ended", "created"), line
            processes[exec_id] = "created"
        elif topic in ("start", "exec-started"):
            assert processes[exec_id] == "created", line
            assert processes[""] != "ended", line
            processes[exec_id] = "running"
        elif topic == "exit":
            assert processes[exec_id] == "running" or not exec_id, line
            assert processes[exec_id] != "ended", line
            processes[exec_id] = "ended"
            if not exec_id:
                assert "running" not in processes.values(), f"{line}: {processes}"
        elif topic == "delete":
            assert "running" not in processes.values(), f"{line}: {processes}"
            del self.containers[name]


def ask(tested: PodOfTest, what: str, name: str, exec_id: str) -> Coroutine[Any, Any, object]:
    pod, agent = tested.pod, tested.agent
    if what == "create":
        return tested.create(name)
    if what == "start":
        return pod.start(name, exec_id)
    if what == "delete":
        return pod.delete(name, exec_id)
    if what.startswith("kill -"):
        return pod.kill(name, exec_id, int(what.removeprefix("kill -")))
    if what == "pause":
        return pod.pause(name)
    if what == "resume":
        return pod.resume(name)
    if what == "finish":
        return finish(tested, name, exec_id)
    if what == "stats":
        return pod.stats(name)
    return _now(tested, agent, what, name, exec_id)


async def finish(tested: PodOfTest, name: str, exec_id: str) -> None:
    """As a client does: kill, wait, delete."""
    process = tested.pod.container(name).process(exec_id)
    await tested.pod.kill(name, exec_id, 9)
    await process.exited.wait()
    await tested.pod.delete(name, exec_id)


async def _now(tested: PodOfTest, agent: Any, what: str, name: str, exec_id: str) -> None:
    """What happens by itself: nobody is answered."""
    if what == "add exec":
        if exec_id:
            tested.add_exec(exec_id, name)
    elif what == "kill anchor":
        container = tested.pod.container(name)
        container.anchor.kill()
    elif what == "exit":
        if agent.containers.get(name, {}).get(exec_id) is None:
            raise NotFound("no such process in the guest")
        if agent.process(name, exec_id).state != "created":
            await agent.exit(name, exec_id, 3)
    elif what == "oom":
        agent.tell(api.EventKind.OOM, name)
    elif what == "lie":
        agent.tell(api.EventKind.EXIT, name, "nobody", status=9)


async def live(directory: Path, running: int, steps: list[tuple[str, str, str, int]]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with running_pod(directory) as tested:
        await tested.pod.machine()
        for name in NAMES[:running]:
            await tested.run(name)
            tested.add_exec("shell", name)
            await tested.pod.start(name, "shell")
        asked = []
        for what, name, exec_id, turns in steps:
            asked.append(asyncio.create_task(ask(tested, what, name, exec_id)))
            for _ in range(turns):
                await asyncio.sleep(0)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        for step, answer in zip(steps, answers, strict=True):
            if isinstance(answer, BaseException):
                assert isinstance(answer, CasemateError), f"{step}: {answer!r}"

        tested.guest.qemu.kill()
        await tested.guest.machine.lost
        for container in list(tested.pod.containers.values()):
            await container.init.exited.wait()
        story = Story()
        for line in tested.told:
            story.read(line)
        assert set(story.containers) == set(tested.pod.containers)
        for processes in story.containers.values():
            assert "running" not in processes.values(), f"lost, and not told: {processes}"

        for name, container in list(tested.pod.containers.items()):
            for exec_id in list(container.execs):
                await tested.pod.delete(name, exec_id)
            await tested.pod.delete(name)
        assert list(tested.guest.machine.share.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


# The pod's own container is deleted while another is made, which nobody told of its end.
MADE_TOO_LATE = [
    *(("oom", "second", "shell", 30), ("finish", "web", "", 0), ("create", "web", "", 5)),
    *(("kill -9", "web", "", 0), ("oom", "web", "", 5), ("resume", "second", "", 0)),
    *(("create", "second", "shell", 0), ("kill -15", "second", "", 0), ("create", "web", "", 30)),
    *(("create", "second", "shell", 0), ("finish", "web", "", 1)),
]


@example(running=1, steps=MADE_TOO_LATE)
@given(running=st.sampled_from((2, 1, 0)), steps=st.lists(STEPS, min_size=1, max_size=14))
def test_a_pods_story_makes_sense(
    tmp_path_factory: pytest.TempPathFactory, running: int, steps: list[tuple[str, str, str, int]]
) -> None:
    """running: so many containers run at first, each with an exec."""
    run(live(tmp_path_factory.mktemp("pod"), running, steps))
