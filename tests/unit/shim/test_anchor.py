"""How anchors are asked for. What they are, as root: tests/vm/test_shim_process.py."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rpc.errors import Internal
from shim.anchor import AnchorMaker
from shim.vm.users import FIRST_ANCHOR_UID

Wire = tuple[socket.socket, socket.socket]


@pytest.fixture
def wire() -> Iterator[Wire]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(0.2)
    yield ours, theirs
    ours.close()
    theirs.close()


def answer(theirs: socket.socket, *answers: bytes) -> tuple[threading.Thread, list[bytes]]:
    """A maker that knows its answers beforehand."""
    asked: list[bytes] = []

    def serve() -> None:
        with suppress(ConnectionError):  # nobody asks any more
            for said in answers:
                asked.append(theirs.recv(4096))
                theirs.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread, asked


def test_an_anchor_has_two_pids(tmp_path: Path, wire: Wire) -> None:
    ours, theirs = wire
    thread, asked = answer(theirs, b"17 4711")
    assert AnchorMaker(ours, 1, tmp_path).make("/run/rö\udcff") == (17, 4711)
    thread.join()
    assert asked == [b"%d /run/r\xc3\xb6\xff" % FIRST_ANCHOR_UID]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"PermissionError: [Errno 1] Operation not permitted", "Operation not permitted"),
        (b"FileNotFoundError: \xff", "FileNotFoundError"),
        (b"17", "17"),
        (b"17 -4", "17 -4"),
        (b"it ended", "it ended"),
    ],
)
def test_why_there_is_none_is_said(tmp_path: Path, wire: Wire, said: bytes, words: str) -> None:
    ours, theirs = wire
    thread, _ = answer(theirs, said)
    with pytest.raises(Internal, match="the container's anchor process failed") as caught:
        AnchorMaker(ours, 1, tmp_path).make("/")
    assert words in (caught.value.details or "")
    thread.join()


def test_a_maker_that_ended_is_named(tmp_path: Path, wire: Wire) -> None:
    ours, theirs = wire
    theirs.close()
    for _ in range(2):
        with pytest.raises(Internal, match="anchor"):
            AnchorMaker(ours, 1, tmp_path).make("/")


def test_an_answer_that_came_too_late_is_nobody_elses(tmp_path: Path, wire: Wire) -> None:
    """The second container must not get the first one's anchor, with the first one's root."""
    ours, theirs = wire
    maker = AnchorMaker(ours, 1, tmp_path)
    with pytest.raises(Internal, match="does not answer"):
        maker.make("/first")
    assert theirs.recv(100).endswith(b" /first")
    with suppress(BrokenPipeError):
        theirs.sendall(b"17 1017")
    thread, _ = answer(theirs, b"18 1018")
    with suppress(Internal):  # a maker that lags may be given up altogether
        assert maker.make("/second") == (18, 1018)
    ours.close()
    thread.join()
