"""Events on their way to containerd: in order, once, over restarts, and by its binary when all else fails."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rpc.api import events as api
from rpc.api.types import Any, Empty, Mount
from rpc.errors import FailedPrecondition
from rpc.server import Context, Server
from shim.services import events as module
from shim.services.events import Publisher
from tests.unit.rpc.wires import pass_time, run, until


class Containerd:
    """Takes events at an address, as containerd does; can go and come back."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[api.Envelope] = []
        self.namespaces: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.refuses = 0
        self._server: Server | None = None

    async def start(self) -> None:
        self._server = Server()
        self._server.add(api.FORWARD, self._forward)
        listener = socket.socket(socket.AF_UNIX)
        self.path.unlink(missing_ok=True)
        listener.bind(str(self.path))
        await self._server.listen_unix(listener)

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def _forward(self, request: api.ForwardRequest, context: Context) -> Empty:
        if self.refuses:
            self.refuses -= 1
            raise FailedPrecondition("not ready yet")
        await self.gate.wait()
        assert request.envelope is not None
        self.taken.append(request.envelope)
        self.namespaces.append(context.metadata["containerd-namespace-ttrpc"])
        return Empty()

    @property
    def ids(self) -> list[str]:
        return [_event(envelope).container_id for envelope in self.taken]


def _event(envelope: api.Envelope) -> api.TaskOOM:
    assert envelope.event is not None
    return api.TaskOOM.decode(envelope.event.value)


def oom(number: int) -> api.TaskOOM:
    return api.TaskOOM(container_id=str(number))


@asynccontextmanager
async def publishing(directory: Path, binary: str = "") -> AsyncIterator[tuple[Publisher, Containerd]]:
    containerd = Containerd(directory / "ttrpc.sock")
    await containerd.start()
    publisher = Publisher("default", f"unix://{containerd.path}", "/run/containerd.sock", binary)
    running = asyncio.create_task(publisher.run())
    try:
        yield publisher, containerd
        publisher.finish()
        await running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await containerd.stop()


def test_events_arrive_in_the_order_in_which_they_were_published(tmp_path: Path) -> None:
    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            for number in range(100):
                publisher.publish(oom(number))
        assert containerd.ids == [str(number) for number in range(100)]

    run(life())


def test_an_envelope_says_everything_that_containerd_needs(tmp_path: Path) -> None:
    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            publisher.publish(api.TaskExit(container_id="web", id="web", pid=7, exit_status=3))
        envelope = containerd.taken[0]
        assert (envelope.namespace, envelope.topic) == ("default", "/tasks/exit")
        assert envelope.event == Any(
            type_url="containerd.events.TaskExit",
            value=api.TaskExit(container_id="web", id="web", pid=7, exit_status=3).encode(),
        )
        assert envelope.timestamp is not None
        assert envelope.timestamp.seconds > 1_700_000_000
        assert containerd.namespaces == ["default"]

    run(life())


def test_nobody_waits_for_containerd_to_take_an_event(tmp_path: Path) -> None:
    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            containerd.gate.clear()
            for number in range(1000):
                publisher.publish(oom(number))
            await asyncio.sleep(0)
            assert containerd.taken == []
            containerd.gate.set()
        assert len(containerd.taken) == 1000

    run(life())


def test_a_containerd_that_comes_back_gets_what_it_missed_in_order(tmp_path: Path) -> None:
    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            publisher.publish(oom(0))
            await until(lambda: containerd.ids == ["0"])
            await containerd.stop()
            for number in range(1, 4):
                publisher.publish(oom(number))
            await asyncio.sleep(0)
            await containerd.start()
        assert containerd.ids == ["0", "1", "2", "3"]

    run(life())


def test_a_containerd_that_is_late_gets_everything(tmp_path: Path) -> None:
    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            containerd.refuses = 2
            publisher.publish(oom(0))
            publisher.publish(oom(1))
        assert containerd.ids == ["0", "1"]

    run(life())


def test_a_containerd_that_hangs_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORWARD_S", 0.1)

    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            containerd.gate.clear()
            publisher.publish(oom(0))
            await until(lambda: publisher._client is not None)
            await until(lambda: publisher._client is None)
            monkeypatch.setattr(module, "FORWARD_S", 20.0)
            containerd.gate.set()
        assert containerd.ids[-1] == "0"

    run(life())


def test_an_event_that_nobody_takes_is_given_up_and_the_next_one_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TRIES", 2)

    async def life() -> None:
        async with publishing(tmp_path) as (publisher, containerd):
            containerd.refuses = 2
            publisher.publish(oom(0))
            publisher.publish(oom(1))
        assert containerd.ids == ["1"]

    run(life())
    assert "event /tasks/oom was not taken by containerd: " in caplog.text
    assert "not ready yet" in caplog.text


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """A containerd that knows how to publish: keeps what it was told."""
    path = tmp_path / "containerd"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/arguments\ncat >> {tmp_path}/stdin\n')
    path.chmod(0o755)
    return path


def test_without_the_service_the_binary_publishes(tmp_path: Path, binary: Path) -> None:
    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with publishing(tmp_path, str(binary)) as (publisher, containerd):
            await containerd.stop()
            publisher.publish(oom(5))
        assert (tmp_path / "arguments").read_text() == (
            "--address /run/containerd.sock publish --topic /tasks/oom --namespace default\n"
        )
        assert Any.decode((tmp_path / "stdin").read_bytes()) == Any.pack(oom(5))
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())


@pytest.mark.parametrize("script", ["exit 1", "exec sleep 1000", None])
def test_a_binary_that_fails_is_tried_once_and_the_service_again(
    tmp_path: Path, binary: Path, script: str | None
) -> None:
    tried = tmp_path / "tried"
    if script is None:
        binary.unlink()
    else:
        binary.write_text(f"#!/bin/sh\necho x >> {tried}\n{script}\n")

    async def life() -> None:
        before = len(os.listdir("/proc/self/fd"))
        async with publishing(tmp_path, str(binary)) as (publisher, containerd):
            containerd.refuses = 1
            publisher.publish(oom(5))
            if script is not None and "sleep" in script:
                await until(lambda: tried.exists() and tried.read_text() == "x\n")
                pass_time(module.FORWARD_S)
        assert containerd.ids == ["5"]
        assert len(os.listdir("/proc/self/fd")) == before

    run(life())
    if script is not None:
        assert tried.read_text() == "x\n"


def test_an_event_that_is_larger_than_a_pipe_is_published_by_a_slow_binary_too(
    tmp_path: Path, binary: Path
) -> None:
    """A Create with many layers and long paths; the loop must not stand still meanwhile."""
    mounts = [Mount(type="overlay", source="overlay", options=["lowerdir=" + "/x" * 100_000])]
    event = api.TaskCreate(container_id="web", rootfs=mounts)

    async def life() -> None:
        async with publishing(tmp_path, str(binary)) as (publisher, containerd):
            await containerd.stop()
            publisher.publish(event)
        assert Any.decode((tmp_path / "stdin").read_bytes()) == Any.pack(event)

    run(life())


def test_every_event_of_ours_has_a_topic() -> None:
    assert len(set(api.TOPICS.values())) == len(api.TOPICS) == 9
