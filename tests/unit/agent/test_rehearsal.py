"""Before a guest is saved: its free memory is emptied, within bounds, and its maker has hung up."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from agent.rehearsal import CHUNK_BYTES, MOST_TO_EMPTY_BYTES, empty_free_memory

ROOT = Path(__file__).parents[3]


class Chunk:
    """Counts what is mapped instead of mapping it; the last one that is to be had is the limit-th."""

    taken = 0
    most = 0
    limit = 1 << 30

    def __init__(self, _: int, size: int, flags: int) -> None:
        assert (size, flags) == (CHUNK_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
        if Chunk.taken == Chunk.limit:
            raise OSError(12, "Cannot allocate memory")
        Chunk.taken += 1
        Chunk.most = max(Chunk.most, Chunk.taken)

    def close(self) -> None:
        Chunk.taken -= 1


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Chunk.taken, Chunk.most, Chunk.limit = 0, 0, 1 << 30
    monkeypatch.setattr(mmap, "mmap", Chunk)


def test_most_of_what_is_free_is_emptied_and_given_back() -> None:
    empty_free_memory(200 << 20)
    assert 0.8 * (200 << 20) < Chunk.most * CHUNK_BYTES < 0.9 * (200 << 20)
    assert Chunk.taken == 0


def test_a_large_guest_does_not_take_all_of_the_hosts_memory() -> None:
    empty_free_memory(64 << 30)
    assert Chunk.most * CHUNK_BYTES == MOST_TO_EMPTY_BYTES


def test_what_was_taken_is_given_back_after_a_failure_too() -> None:
    Chunk.limit = 5
    with pytest.raises(OSError, match="Cannot allocate"):
        empty_free_memory(200 << 20)
    assert (Chunk.most, Chunk.taken) == (5, 0)


# The agent's own module is for a process that is nothing else.
CONNECTIONS = """
import asyncio, socket
from types import SimpleNamespace
import agent.__main__ as main
from agent import rehearsal
from agent.spans import Spans
from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.client import Client

async def nothing(_):
    pass

rehearsal.rehearse, rehearsal.empty_free_memory = nothing, lambda _: None

class Line:
    kind = "serial"

    async def connect(self):
        here, self.there = socket.socketpair()
        return await asyncio.open_connection(sock=here)

async def serve(tasks):
    line = Line()
    guest = SimpleNamespace(any_container=lambda: False)
    serving = tasks.create_task(main.serve_connection(guest, Spans(0), line, tasks))
    await asyncio.sleep(0)
    while not hasattr(line, "there"):
        await asyncio.sleep(0)
    return serving, Client(*await asyncio.open_connection(sock=line.there))

async def life():
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        serving, client = await serve(tasks)
        await client.call(api.PREPARE, Empty())
        for _ in range(1000):
            await asyncio.sleep(0)
        assert not serving.done() and not client.is_closed, "it does not wait for its maker to hang up"
        await client.close()
        assert await serving is True
        serving, client = await serve(tasks)
        await client.close()
        assert await serving is False
    print("fine")

asyncio.run(life())
"""


def test_the_next_connection_is_looked_for_when_the_maker_has_hung_up() -> None:
    """A port whose other end is still the maker's would be taken for the next shim's."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECTIONS],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
