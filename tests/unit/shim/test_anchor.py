"""How anchors are made. What they are, as root: tests/vm/test_shim_process.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpc.errors import Internal
from shim import anchor, anchor_program, helper
from shim.anchor import Anchors
from shim.helper import Helper
from tests.unit.rpc.wires import run


def anchors_in(directory: Path) -> Anchors:
    return Anchors(os.open("/proc", os.O_RDONLY | os.O_DIRECTORY), directory / "users", directory)


def test_what_it_cannot_do_is_said_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No right is needed to be told that a directory is not there."""
    started: list[Helper] = []

    def spawn(*arguments: Any, **options: Any) -> Helper:
        started.append(helper.spawn(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(anchor, "spawn", spawn)

    async def life() -> None:
        with pytest.raises(Internal, match="the container's anchor process failed") as caught:
            await anchors_in(tmp_path).make(f"{tmp_path}/n\udcffwhere")
        assert caught.value.details == "chroot: No such file or directory"
        await started[0].exited.wait()

    run(life())
    assert started[0].status is not None


def test_of_the_program_there_is_no_file(tmp_path: Path) -> None:
    anchors_in(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def kept() -> Iterator[list[socket.socket]]:
    connections: list[socket.socket] = []
    yield connections
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ((), "it ended"),
        ((b"half",), "it ended"),
        ((anchor_program.ANSWER.pack(6, -1),), "setresuid: Operation not permitted"),
        (None, "it said nothing for 0 s"),
    ],
)
def test_one_that_does_not_become_an_anchor_is_ended(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: list[socket.socket],
    answers: tuple[bytes, ...] | None,
    words: str,
) -> None:
    """A process that sleeps is started in its place, and the test speaks for it."""
    started: list[Helper] = []

    def instead(name: str, argv: list[str], *, program: int, fds: dict[int, int]) -> Helper:
        assert argv == ["casemate-anchor"]
        assert os.path.basename(os.readlink(f"/proc/self/fd/{program}")).startswith("casemate-anchor")
        kept.append(socket.socket(fileno=os.dup(fds[anchor_program.SOCKET_FD])))
        for said in answers or ():
            kept[-1].send(said)
        if answers is not None:
            kept[-1].shutdown(socket.SHUT_WR)
        started.append(helper.spawn(name, ["/bin/sleep", "1000"]))
        return started[-1]

    monkeypatch.setattr(anchor, "spawn", instead)
    monkeypatch.setattr(anchor, "ANSWER_S", 0.05)

    async def life() -> None:
        with pytest.raises(Internal, match="the container's anchor process failed") as caught:
            await anchors_in(tmp_path).make("/")
        assert caught.value.details == words
        await started[0].exited.wait()

    run(life())
    assert started[0].how() == "killed by signal 9"


# --- the program ---


def told(directory: Path, said: bytes | None) -> tuple[str, str]:
    """Which step the program could not do after it was told something, None being nothing, and why."""
    program = directory / "program"
    program.write_bytes(anchor_program.program())
    program.chmod(0o500)
    ours, theirs = socket.socketpair()
    if said is not None:
        ours.send(said)
    ours.shutdown(socket.SHUT_WR)

    async def life() -> None:
        process = helper.spawn("test", [str(program)], fds={anchor_program.SOCKET_FD: theirs.fileno()})
        await process.exited.wait()
        assert process.status == 1

    with ours, theirs:
        run(life())
        step, result = anchor_program.ANSWER.unpack(ours.recv(100))
    return anchor_program.STEPS[step - 1][0], os.strerror(-result)


def test_a_step_that_fails_is_the_last_and_named(tmp_path: Path) -> None:
    assert told(tmp_path, anchor_program.UID.pack(1) + b"/no/where\0") == (
        "chroot",
        "No such file or directory",
    )


def test_who_is_told_nothing_goes_nowhere(tmp_path: Path) -> None:
    """Whoever was to say a path has ended; an empty one is no directory."""
    assert told(tmp_path, None)[0] == "chroot"


def test_a_path_may_be_as_long_as_paths_are(tmp_path: Path) -> None:
    long = b"/" + b"/".join(b"a" * 200 for _ in range(20))
    assert 4000 < len(long) < 4096
    assert told(tmp_path, anchor_program.UID.pack(1) + long + b"\0") == (
        "chroot",
        "No such file or directory",
    )
