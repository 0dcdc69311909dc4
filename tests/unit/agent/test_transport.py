"""The agent's way to the shim where the host turns it away at first. Loopback stands for vsock."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from agent.transport import dial
from rpc.errors import Unavailable


def reserved() -> socket.socket:
    """A port that is ours, on which nobody listens yet: to connect is refused."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    return listener


def test_the_agent_dials_again_until_the_host_takes_it() -> None:
    with reserved() as listener:
        refused = threading.Event()

        def later() -> None:
            refused.wait(10)
            listener.listen()

        thread = threading.Thread(target=later)
        thread.start()
        threading.Timer(0.1, refused.set).start()
        connection = dial(socket.AF_INET, listener.getsockname(), 10)
        assert connection is not None
        thread.join()
        with connection, listener.accept()[0] as accepted:
            accepted.sendall(b"hello")
            connection.setblocking(True)
            assert connection.recv(5) == b"hello"


def test_a_host_that_never_takes_it_is_told_in_the_end() -> None:
    with reserved() as listener:
        begun = time.monotonic()
        with pytest.raises(Unavailable, match=r"does not accept the agent") as caught:
            dial(socket.AF_INET, listener.getsockname(), 0.2)
        assert 0.1 < time.monotonic() - begun < 5
        assert caught.value.details == "Connection refused"


def test_no_device_is_not_a_refusal() -> None:
    """ENETUNREACH, as TCP says of a broadcast address and vsock before its device is there."""
    assert dial(socket.AF_INET, ("255.255.255.255", 1), 5) is None
