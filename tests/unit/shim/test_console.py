"""A guest's console: kept within bounds, cleaned before a person reads it, a panic told by what led to it."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shim.vm import console as module
from shim.vm.console import Console, listen
from tests.unit.rpc.wires import run, until

EMPTY = "the guest's console is empty"


@asynccontextmanager
async def console_of(directory: Path, most: int = 1 << 20) -> AsyncIterator[tuple[Console, socket.socket]]:
    """A console, and QEMU's end of it."""
    console = Console(directory / "console.sock", directory / "console.log", most, os.getuid())
    reading = asyncio.create_task(console.read())
    qemu = socket.socket(socket.AF_UNIX)
    qemu.setblocking(False)
    await asyncio.get_running_loop().sock_connect(qemu, str(directory / "console.sock"))
    try:
        yield console, qemu
    finally:
        qemu.close()
        await reading
        console.close()


async def say(console: Console, qemu: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(qemu, data)
    await until(lambda: console._tail.endswith(data[-100:]))


def test_what_a_guest_says_is_in_its_file_and_in_its_last_words(tmp_path: Path) -> None:
    async def life() -> None:
        async with console_of(tmp_path) as (console, qemu):
            assert console.words() == EMPTY
            await say(console, qemu, b"Linux boots\r\nagent: ready\r\n")
            assert console.words() == "the guest's console ends with:\nLinux boots\nagent: ready"
            assert (tmp_path / "console.log").read_bytes() == b"Linux boots\r\nagent: ready\r\n"
            assert not console.panicked
            assert not console.ended.is_set()
        assert console.ended.is_set()

    run(life())


def test_only_root_and_qemu_reach_the_console(tmp_path: Path) -> None:
    with listen(tmp_path / "s", os.getuid()):
        status = (tmp_path / "s").stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_uid == os.getuid()


def test_a_socket_that_cannot_be_made_leaves_nothing_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    mask = os.umask(0o22)
    os.umask(mask)
    with pytest.raises(OSError, match="No such file"):
        listen(tmp_path / "none/s", os.getuid())
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.umask(mask) == mask


def test_a_flood_keeps_its_newest_lines_within_bounds(tmp_path: Path) -> None:
    most = 100_000

    async def life() -> None:
        async with console_of(tmp_path, most) as (console, qemu):
            for number in range(400):
                await say(console, qemu, b"line %06d\n" % number * 100)
                assert (tmp_path / "console.log").stat().st_size <= most
            kept = (tmp_path / "console.log").read_text().splitlines()
            assert kept[-1] == "line 000399"
            assert len(kept) > 1000
            assert console.words(2).splitlines()[1:] == ["line 000399"] * 2

    run(life())


@pytest.mark.parametrize("most", [4096, 20_000])
def test_a_small_bound_is_a_bound_too(tmp_path: Path, most: int) -> None:
    """4096 is the least that console_size in the configuration may be."""

    async def life() -> None:
        async with console_of(tmp_path, most) as (console, qemu):
            for _ in range(10):
                await say(console, qemu, b"x" * 5000 + b"\n")
                assert (tmp_path / "console.log").stat().st_size <= most
            assert (tmp_path / "console.log").stat().st_size > 0

    run(life())


def test_a_full_disk_costs_the_file_and_not_the_words(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to("/dev/full")

    async def life() -> None:
        async with console_of(tmp_path) as (console, qemu):
            await say(console, qemu, b"first\n")
            await say(console, qemu, b"second\n")
            assert console.words().endswith("first\nsecond")

    run(life())


def test_a_panic_is_told_by_what_led_to_it(tmp_path: Path) -> None:
    dump = b"".join(b"[    1.0] RIP: 0x%04x\n" % number for number in range(40))

    async def life() -> None:
        async with console_of(tmp_path) as (console, qemu):
            for number in range(20):
                await say(console, qemu, b"[    0.9] step %d\n" % number)
            await say(console, qemu, b"[    1.0] Kernel panic - not syncing: no init\n" + dump)
            assert console.panicked
            lines = console.words(3).splitlines()
            assert lines[1:] == [
                "[    0.9] step 18",
                "[    0.9] step 19",
                "[    1.0] Kernel panic - not syncing: no init",
            ]

    run(life())


def test_escape_sequences_are_taken_out(tmp_path: Path) -> None:
    async def life() -> None:
        async with console_of(tmp_path) as (console, qemu):
            await say(console, qemu, b"\x1b[1;31mred\x1b[0m \x1b]0;title\x07 \x1b(B\x1b[?25l\x9b31m\x00end\n")
            words = console.words()
            assert "red" in words
            assert "end" in words
            assert "[1;31m" not in words
            assert all(character.isprintable() or character == "\n" for character in words)

    run(life())


@given(data=st.binary(max_size=4000))
def test_whatever_a_guest_says_is_safe_for_a_terminal(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    directory = tmp_path_factory.mktemp("console")
    console = Console(directory / "console.sock", directory / "console.log", 4096, os.getuid())
    console._keep(data)
    words = console.words()
    assert all(character.isprintable() or character == "\n" for character in words)
    assert len(words.splitlines()) <= 13
    assert max(map(len, words.splitlines())) <= 200
    console.close()


def test_long_lines_are_cut(tmp_path: Path) -> None:
    async def life() -> None:
        async with console_of(tmp_path) as (console, qemu):
            await say(console, qemu, b"y" * 10_000 + b"\n")
            assert console.words().splitlines()[1] == "y" * 200
            assert len(console._tail) <= module.TAIL_BYTES

    run(life())
