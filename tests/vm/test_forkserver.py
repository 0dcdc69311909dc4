"""Pods whose shim is forked by casemated: what it has of `start`, and what casemated's end costs."""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shim import phases
from tests.vm.faults import kill_and_wait
from tests.vm.node import Node
from tests.vm.operator import casemate
from tests.vm.pods import Pods

CONTAINERD, CASEMATED = "start", "casemated"


@pytest.fixture
def node(pods: Pods) -> Iterator[Node]:
    node = Node(pods.ctr.instance)
    yield node
    node.close()


def forked_by(pods: Pods, name: str) -> str:
    """Who forked a running pod's shim, as its trace says."""
    spans = json.loads(pods.paths(name).trace.read_text())["spans"]
    (detach,) = [span for span in spans if span["name"] == phases.DETACH]
    return str(detach["detail"])


def log_of(pods: Pods, name: str) -> str:
    return (pods.paths(name).directory / "shim.log").read_text()


def nature(pods: Pods, name: str) -> dict[str, Any]:
    """What the kernel says of a pod's shim that must not depend on who forked it. Its threads and descriptors
    are not among that: libvirt's own come and go."""
    pid = pods.state(name)["pid"]
    proc = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    same = (
        *("Umask", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Cpus_allowed"),
        *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "SigBlk", "SigIgn", "SigCgt", "Name"),
    )
    key = pods.paths(name).key
    return {
        **{each: status[each] for each in same},
        "limits": (proc / "limits").read_text(),
        "oom": (proc / "oom_score_adj").read_text(),
        "nice": os.getpriority(os.PRIO_PROCESS, pid),
        "cgroup": (proc / "cgroup").read_text().replace(key, "KEY"),
        "namespaces": {
            kind: os.readlink(proc / "ns" / kind) for kind in ("uts", "ipc", "cgroup", "user", "time")
        },
        "root": os.readlink(proc / "root"),
        "parent": status["PPid"],
        "command": (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode().split()[2:3],
    }


def test_a_pods_shim_is_forked_by_casemated_and_without_it_by_start(pods: Pods, node: Node) -> None:
    node.start()
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CASEMATED
        assert pods.exec(name, "echo", "works").ok().out == "works\n"
        assert "fork server" not in log_of(pods, name)
    assert pods.run("sh", "-c", "echo out; exit 7").code == 7
    node.kill()
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CONTAINERD
        assert "fork server" not in log_of(pods, name)


def test_a_shim_is_what_start_would_have_made_of_it(pods: Pods, node: Node) -> None:
    """casemated has a limit, a priority, an OOM score and an environment of its own; containerd's count."""
    score = Path(f"/proc/{pods.ctr.instance.containerd_pid}/oom_score_adj")
    before = score.read_text()
    score.write_text("77")
    try:
        compare_natures(pods, node)
    finally:
        score.write_text(before)


def compare_natures(pods: Pods, node: Node) -> None:
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CONTAINERD
        expected = nature(pods, name)
    # A hard limit could only be raised again with CAP_SYS_RESOURCE, which a test's root need not have.
    node.start({"OF_CASEMATED": "secret"}, "nice", "-n", "5", "prlimit", "--nofile=900:")
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CASEMATED
        found = nature(pods, name)
        pid = pods.state(name)["pid"]
        assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
        # What QEMU was executed with is what the shim has as its own.
        assert b"secret" not in Path(f"/proc/{pods.state(name)['qemu_pid']}/environ").read_bytes()
    assert found == expected
    assert found["oom"] == "78\n"


def test_casemated_that_is_in_another_namespace_is_not_used(pods: Pods, node: Node) -> None:
    node.start(None, "unshare", "--uts")
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CONTAINERD
        assert "was not used: casemated is in another uts namespace" in log_of(pods, name)


def test_an_operator_can_do_without(pods: Pods, node: Node) -> None:
    node.start()
    pods.ctr.instance.configure("[node]\nfork_server = false\n")
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CONTAINERD


def test_casemate_check_says_whether_it_runs(pods: Pods, node: Node) -> None:
    def level() -> str:
        rows = json.loads(casemate(pods.ctr.instance, "check", "--json").stdout)["results"]
        return str(next(row["level"] for row in rows if row["name"] == "casemated"))

    assert level() == "warning"
    node.start()
    assert level() == "ok"


def test_pods_go_on_when_casemated_is_killed_and_are_ended_as_ever(pods: Pods, node: Node) -> None:
    node.start()
    with pods.detached("sleep", "1000") as first:
        zygote = node.wait_serving()
        shim = pods.state(first)["pid"]
        node.kill()
        node.wait_gone(zygote)
        assert pods.exec(first, "echo", "works").ok().out == "works\n"
        node.start()
        with pods.detached("sleep", "1000") as second:
            assert (forked_by(pods, first), forked_by(pods, second)) == (CASEMATED, CASEMATED)
            assert pods.exec(first, "echo", "works").ok().out == "works\n"
        assert pods.state(first)["pid"] == shim
        node.kill(signal.SIGTERM)
        assert pods.exec(first, "echo", "works").ok().out == "works\n"


def test_a_fork_server_that_hangs_costs_a_second(pods: Pods, node: Node) -> None:
    node.start()
    zygote = node.wait_serving()
    os.kill(zygote, signal.SIGSTOP)
    try:
        with pods.detached("sleep", "1000") as name:
            assert forked_by(pods, name) == CONTAINERD
            assert "was not used: timed out" in log_of(pods, name)
    finally:
        os.kill(zygote, signal.SIGCONT)
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CASEMATED


def test_a_shim_that_is_killed_takes_its_pod_with_it(pods: Pods, node: Node) -> None:
    node.start()
    with pods.detached("sleep", "1000") as name:
        assert forked_by(pods, name) == CASEMATED
        kill_and_wait(pods.state(name)["pid"])
        pods.wait_status(name, "")


@pytest.mark.timeout(600)
def test_whenever_casemated_is_killed_every_pod_starts_once(pods: Pods, node: Node) -> None:
    """Sixteen pods, four at a time, while the fork server is killed at every moment of their starts."""
    node.start()
    done = threading.Event()
    kills = 0

    def killer() -> None:
        nonlocal kills
        while not done.wait(0.05):
            for pid in node.children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1

    # It is put in its place after half a second, and after longer each time: ended and begun anew instead.
    def reviver() -> None:
        while not done.wait(0.4):
            os.kill(node.pid, signal.SIGHUP)

    threads = [threading.Thread(target=target) for target in (killer, reviver)]
    for thread in threads:
        thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            results = list(
                pool.map(lambda n: pods.run("sh", "-c", f"echo {n}; exit {n}", timeout_s=300), range(16))
            )
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert [(result.code, result.out) for result in results] == [(n, f"{n}\n") for n in range(16)]
    assert kills >= 3


def test_ten_at_once_are_all_forked_by_casemated_and_nothing_is_left(pods: Pods, node: Node) -> None:
    node.start()
    zygote = node.wait_serving()
    before = sorted(os.listdir(f"/proc/{zygote}/fd"))
    with ThreadPoolExecutor(10) as pool:
        results = list(pool.map(lambda n: pods.run("echo", str(n), timeout_s=300), range(10)))
    assert [result.out for result in results] == [f"{n}\n" for n in range(10)]
    assert "was not used" not in pods.ctr.instance.log_tail(200)
    assert node.children() == [zygote]
    assert Path(f"/proc/{zygote}/task/{zygote}/children").read_text() == ""
    assert sorted(os.listdir(f"/proc/{zygote}/fd")) == before
