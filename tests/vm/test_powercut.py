"""The next start of a host that lost its power, or all of its processes: nothing stale confuses it."""

import json
import os
from contextlib import ExitStack

import pytest

from bench.instance import Instance
from tests.vm import census, powercut
from tests.vm.cri import BOOT_ID, FOREVER, Cri
from tests.vm.node import Node
from tests.vm.operator import casemate
from tests.vm.pods import Pods
from tests.vm.powercut import NETWORK, PEER
from tests.vm.test_pool import Pool

IN_NETWORK = ("--with-ns", f"network:{NETWORK}")
DIAL = f"""\
import os, socket
print(os.strerror(socket.socket().connect_ex(("{PEER}", 8000))))
"""
REACHED = "Connection refused\n"


def start_again(pods: Pods, name: str) -> None:
    """Another task of the container, as its metadata has it."""
    pods.ctr("task", "start", "--detach", name).ok()


def known(pods: Pods) -> dict[str, str]:
    """The states that `casemate ps` shows, by id."""
    done = casemate(pods.ctr.instance, "ps", "--json")
    assert done.returncode == 0, done.stderr
    return {pod["id"]: pod["state"] for pod in json.loads(done.stdout)}


@pytest.mark.parametrize("instance", ["v1.6", "v2"], indirect=True)  # 1.7 has Docker's (test_docker.py)
@pytest.mark.client(
    "ctr task start (after the host lost its power)", "works", "in a new VM, with the files that it had"
)
def test_the_same_containers_begin_again_after_a_power_cut(pods: Pods) -> None:
    instance = pods.ctr.instance
    with ExitStack() as undo:
        undo.enter_context(powercut.network(instance))
        plain = undo.enter_context(pods.detached(*FOREVER))
        connected = undo.enter_context(pods.detached(*FOREVER, options=IN_NETWORK))
        pods.exec(plain, "sh", "-c", "echo kept > /root/kept; sync").ok()
        assert pods.exec(connected, "python3", "-c", DIAL).ok().out == REACHED
        boots = {pods.exec(name, *BOOT_ID).ok().out for name in (plain, connected)}

        powercut.cut_power(pods.ctr)
        instance.start()
        assert pods.tasks() == []
        assert {plain, connected} <= set(pods.ctr("container", "list", "--quiet").ok().out.split())
        undo.enter_context(powercut.network(instance))
        for name in (plain, connected):
            start_again(pods, name)
            assert pods.state(name)["source"] == "restore", pods.paths(name).log.read_text()
        assert pods.exec(plain, "cat", "/root/kept").ok().out == "kept\n"
        assert pods.exec(connected, "python3", "-c", DIAL).ok().out == REACHED
        assert not boots & {pods.exec(name, *BOOT_ID).ok().out for name in (plain, connected)}
        assert known(pods) == {plain: "running", connected: "running"}
        assert "nothing to clean up" in casemate(instance, "gc").stderr


def test_what_a_crash_of_everything_left_is_taken_away_by_gc_and_by_the_next_start(pods: Pods) -> None:
    """Its kernel runs on, so there are the pods' directories, sockets, cgroups and network; but nobody knows
    of the pods, who would call the shim's `delete`."""
    instance = pods.ctr.instance
    with ExitStack() as undo:
        undo.enter_context(powercut.network(instance))
        again = undo.enter_context(pods.detached(*FOREVER, options=IN_NETWORK))
        forgotten = undo.enter_context(pods.detached(*FOREVER))
        cgroups = [path for path in census.cgroups(pods.ctr) if pods.paths(forgotten).key in path]
        assert cgroups

        powercut.kill_everything(instance)
        powercut.forget_tasks(instance)
        assert known(pods) == {again: "stale", forgotten: "stale"}
        assert len(sockets(instance)) == 2
        instance.start()
        start_again(pods, again)
        assert pods.exec(again, "python3", "-c", DIAL).ok().out == REACHED
        assert known(pods) == {again: "running", forgotten: "stale"}
        collected = casemate(instance, "gc")
        assert collected.returncode == 0, collected.stderr
        assert forgotten in collected.stdout
        assert again not in collected.stdout
        assert known(pods) == {again: "running"}
        assert len(sockets(instance)) == 1
        assert not set(cgroups) & set(census.cgroups(pods.ctr))
        assert pods.exec(again, "python3", "-c", DIAL).ok().out == REACHED
        start_again(pods, forgotten)
        assert pods.exec(forgotten, "echo", "works").ok().out == "works\n"


def sockets(instance: Instance) -> list[str]:
    """Those of shims."""
    return [path.name for path in instance.path("/run/containerd/s").iterdir() if path.is_socket()]


def test_a_machine_that_waited_for_a_pod_is_forgotten_too(pods: Pods) -> None:
    """casemated begins anew beside what its machines left."""
    instance = pods.ctr.instance
    node = Node(instance)
    pool = Pool(pods, node)
    try:
        pool.start()
        ready = pool.ready()
        powercut.kill_everything(instance)
        node.pid = 0
        assert pool.ready() == ready
        old = {path.name for path in pool.home.iterdir()}
        for name in old:
            os.utime(pool.home / name, (0, 0))  # of another that was just being begun, gc would not be sure
        instance.start()
        node.start()
        pool.wait_full(1, but=old)
        assert pool.source() == "pool"
        collected = casemate(instance, "gc")
        assert collected.returncode == 0, collected.stderr
        assert not old & {path.name for path in pool.home.iterdir()}
    finally:
        node.close()
        pool.wait_gone()


@pytest.mark.client(
    "crictl (after the host lost its power)", "works", "the pod is not ready, and can be removed"
)
def test_a_pod_of_cri_is_over_after_a_power_cut_and_another_one_runs(cri: Cri) -> None:
    instance = cri.instance
    with cri.pod() as pod:
        container = pod.run("sh", "-c", "echo said; exec sleep 1000")
        cri.wait(lambda: pod.log(container) == "said\n", "it is logged")
        powercut.cut_power(cri.ctr)
        instance.start()
        cri.wait_ready()
        assert not pod.is_ready
        assert pod.has_ended(container)
        assert pod.log(container) == "said\n"
        with cri.pod() as next_one:
            running = next_one.run(*FOREVER)
            assert next_one.exec(running, "hostname").ok().out == f"{next_one.config['hostname']}\n"
