"""What `start` says to a fork server, and that both sides always agree on who has the pod."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shim import forkserver
from shim.forkserver import Offer, ask, receive, send

Serve = Callable[[Callable[[socket.socket], Any]], "Future[Any]"]
LONG_S = 30.0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gives up because this machine is slow; who is to give up is told so by the test."""
    for name in ("READY_S", "MINE_S"):
        monkeypatch.setattr(forkserver, name, LONG_S)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def serve(run_dir: Path) -> Iterator[Serve]:
    """Answers one client with a function, in a thread; its result."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(forkserver.server_path())
    listener.listen()

    def once(function: Callable[[socket.socket], Any]) -> Any:
        connection, _ = listener.accept()
        with connection:
            return function(connection)

    with ThreadPoolExecutor(1) as pool, listener:
        yield lambda function: pool.submit(once, function)


def until() -> float:
    return time.monotonic() + LONG_S


def hear(connection: socket.socket) -> dict[str, Any]:
    words, fds = receive(connection, until())
    assert fds == []
    return words


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)
    os.close(writing)


# --- a server that answers ---


def test_what_start_has_is_handed_over(serve: Serve, pipe: tuple[int, int]) -> None:
    def server(connection: socket.socket) -> tuple[dict[str, Any], dict[str, Any]]:
        hello = hear(connection)
        send(connection, {"ready": 1}, until())
        words, fds = receive(connection, until())
        send(connection, {"mine": 1}, until())
        for number, fd in enumerate(fds):
            assert not os.get_inheritable(fd)
            if number == 1:
                os.write(fd, b"written by the other side")
            os.close(fd)
        return hello, words

    served = serve(server)
    offer = ask(4711, {})
    large = {"spec": "x" * 1_000_000, "odd": "\udcff"}
    assert offer.take(large, pipe)
    assert offer.remark == ""
    hello, words = served.result(LONG_S)
    assert words == large
    assert os.read(pipe[0], 100) == b"written by the other side"
    assert (hello["pid"], hello["started"], hello["environment"]) == (os.getpid(), 4711, dict(os.environ))
    assert {name: hello[name] for name in forkserver.code()} == forkserver.code()


def test_who_is_declined_does_it_alone_and_says_why(serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        hear(connection)
        send(connection, {"declined": "another installation"}, until())
        with pytest.raises(ConnectionResetError):
            receive(connection, until())

    served = serve(server)
    offer = ask(1, {})
    assert not offer.take({}, ())
    assert offer.remark == "another installation"
    served.result(LONG_S)


def test_a_start_that_fails_lets_go(serve: Serve) -> None:
    def server(connection: socket.socket) -> None:
        hear(connection)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send(connection, {"ready": 1}, until())
            receive(connection, until())

    served = serve(server)
    offer = ask(1, {})
    offer.close()
    served.result(LONG_S)
    assert not offer.take({}, ())


# --- a server that does not ---


def test_without_a_server_there_is_nothing_to_remark(run_dir: Path) -> None:
    offer = ask(1, {})
    assert (offer.take({}, ()), offer.remark) == (False, "")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(forkserver.server_path())
    offer = ask(1, {})
    assert (offer.take({}, ()), offer.remark) == (False, "")


def test_what_is_no_socket_is_no_server(run_dir: Path) -> None:
    os.mkdir(forkserver.server_path())
    assert not ask(1, {}).take({}, ())


def test_a_long_path_is_no_error(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASEMATE_RUN_DIR", str(run_dir / ("d" * 120)))
    assert not ask(1, {}).take({}, ())


def test_a_server_whose_backlog_is_full_is_not_waited_for(run_dir: Path) -> None:
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(forkserver.server_path())
        listener.listen(0)
        begun_s = time.monotonic()
        offers = [ask(1, {}) for _ in range(3)]
        assert time.monotonic() - begun_s < LONG_S
        assert offers[-1].remark
        assert not offers[-1].take({}, ())
        for offer in offers:
            offer.close()


@pytest.mark.parametrize("moment", ["at once", "after hello", "after ready", "after go"])
def test_a_server_that_is_killed_has_not_taken_it(serve: Serve, moment: str, pipe: tuple[int, int]) -> None:
    def server(connection: socket.socket) -> None:
        if moment == "at once":
            return
        hear(connection)
        if moment == "after hello":
            return
        send(connection, {"ready": 1}, until())
        if moment == "after ready":
            return
        _, fds = receive(connection, until())
        for fd in fds:
            os.close(fd)

    serve(server)
    offer = ask(1, {})
    assert not offer.take({}, pipe)
    assert offer.remark


@pytest.mark.parametrize("answer", [b"\xff\xff\xff\xff", b"\0\0\0\2[]", b"\0\0\0\1{", b"\0\0"])
def test_nonsense_is_no_daemon(serve: Serve, answer: bytes) -> None:
    def server(connection: socket.socket) -> None:
        hear(connection)
        connection.sendall(answer)

    serve(server)
    offer = ask(1, {})
    assert not offer.take({}, ())
    assert offer.remark


def test_a_server_that_is_silent_costs_a_bounded_time(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "READY_S", 0.2)
    done = threading.Event()

    def server(connection: socket.socket) -> None:
        hear(connection)
        done.wait(LONG_S)

    serve(server)
    begun_s = time.monotonic()
    offer = ask(1, {})
    assert not offer.take({}, ())
    assert 0.2 <= time.monotonic() - begun_s < LONG_S
    assert offer.remark == "timed out"
    done.set()


# --- the one moment that counts ---


def test_what_was_said_before_start_gave_up_counts(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mine` lies unread when `start` gives up: the child is the daemon, and `start` has to know."""
    real, said = forkserver.receive, threading.Event()

    def late(connection: socket.socket, until_s: float | None) -> Any:
        if threading.current_thread() is threading.main_thread() and not said.is_set():
            words = real(connection, until_s)  # ready
            monkeypatch.setattr(forkserver, "receive", gives_up)
            return words
        return real(connection, until_s)

    def gives_up(connection: socket.socket, until_s: float | None) -> Any:
        monkeypatch.setattr(forkserver, "receive", real)
        assert said.wait(LONG_S)
        raise TimeoutError("timed out")

    def server(connection: socket.socket) -> None:
        real(connection, until())
        send(connection, {"ready": 1}, until())
        real(connection, until())
        send(connection, {"mine": 1}, until())
        said.set()

    monkeypatch.setattr(forkserver, "receive", late)
    served = serve(server)
    assert ask(1, {}).take({}, ())
    served.result(LONG_S)


def test_both_sides_agree_however_late_the_answer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred answers at about the time when `start` gives up, one long before, one long after: never two
    daemons, never none.
    """
    outcomes = set()
    given_up = threading.Event()

    def server(connection: socket.socket, wait_s: float) -> bool:
        with connection:
            send(connection, {"ready": 1}, until())
            receive(connection, until())
            given_up.wait(wait_s)
            try:
                send(connection, {"mine": 1}, until())
            except BrokenPipeError:
                return False
            return True

    with ThreadPoolExecutor(1) as pool:
        near = [(0.002, 0.001 + 0.003 * number / 200) for number in range(200)]
        for patience_s, wait_s in [(LONG_S, 0.0), *near, (0.002, LONG_S)]:
            monkeypatch.setattr(forkserver, "MINE_S", patience_s)
            ours, theirs = socket.socketpair()
            served = pool.submit(server, theirs, wait_s)
            taken = Offer(ours).take({}, ())
            if wait_s == LONG_S:
                given_up.set()
            assert served.result(LONG_S) == taken
            outcomes.add(taken)
    assert outcomes == {True, False}
