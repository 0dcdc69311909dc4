"""One socket at all ports of a network namespace: of one that is made for the test."""

from __future__ import annotations

import os
import socket

import pytest

from shim.catchall import catch_all
from tests.unit.shim.networks import in_a_network_of_its_own

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a network")


def test_every_port_is_the_listeners_until_it_is_let_go() -> None:
    def life() -> None:
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_server(("127.0.0.1", 8080)):
            listener.settimeout(10)
            link = catch_all(listener.fileno(), namespace)
            for port in (1, 8080, 65535):
                with socket.create_connection(("127.0.0.1", port), timeout=10):
                    connection, _ = listener.accept()
                    assert connection.getsockname() == ("127.0.0.1", port)
                    connection.close()
            assert os.get_inheritable(link) is False
            os.close(link)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", 1), timeout=10)
            socket.create_connection(("127.0.0.1", 8080), timeout=10).close()
        os.close(namespace)

    in_a_network_of_its_own(life)


def test_what_is_no_listening_socket_is_refused_and_nothing_stays_open() -> None:
    def life() -> None:
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="bpf: keep a socket"):
            catch_all(namespace, namespace)
        assert os.listdir("/proc/self/fd") == before
        os.close(namespace)

    in_a_network_of_its_own(life)
