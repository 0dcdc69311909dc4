"""Which network namespaces a pod cannot have, and how that is said. Entering one needs root: tests/vm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rpc.errors import InvalidArgument, Unimplemented
from shim.network import open_pod_network
from tests.unit.shim.pods import NAMESPACES, config


def with_network(path: str) -> dict[str, Any]:
    rest = [entry for entry in NAMESPACES if entry["type"] != "network"]
    return config(linux={"namespaces": [*rest, {"type": "network", "path": path}]})


@pytest.mark.parametrize("document", [None, {}, config(linux={"namespaces": NAMESPACES[:2]})])
def test_the_hosts_network_is_refused(document: object) -> None:
    with pytest.raises(Unimplemented, match=r"host network|host .* namespace"):
        open_pod_network(document)


def test_the_hosts_network_is_refused_by_its_path_too() -> None:
    with pytest.raises(InvalidArgument, match="/proc/self/ns/net is the host's own") as caught:
        open_pod_network(with_network("/proc/self/ns/net"))
    assert caught.value.hint


def test_a_namespace_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidArgument, match="network namespace /nowhere/ns: No such file"):
        open_pod_network(with_network("/nowhere/ns"))


@pytest.mark.parametrize("path", ["/dev/null", "/proc/self/ns/uts", "/"])
def test_what_is_no_network_namespace_is_named(path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"network namespace {path}: "):
        open_pod_network(with_network(path))


def test_a_path_that_cannot_be_one_is_named() -> None:
    with pytest.raises(InvalidArgument, match="network namespace"):
        open_pod_network(with_network("/run/\0"))


def test_a_fifo_in_the_namespaces_place_does_not_hang_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ns")
    writer = os.open(tmp_path / "ns", os.O_RDWR)  # lest a failure hang the test
    with pytest.raises(InvalidArgument, match="network namespace"):
        open_pod_network(with_network(str(tmp_path / "ns")))
    os.close(writer)


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for path in ("/proc/self/ns/net", "/dev/null"):
        with pytest.raises(InvalidArgument):
            open_pod_network(with_network(path))
    assert len(os.listdir("/proc/self/fd")) == before
