"""Pods whose machine waited for them: what they have of their own, and what a pool that fails may cost."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from bench import supervisor
from bench.netns import connect, namespace
from node.order import DIGITS
from shim import cgroup, phases
from shim.paths import CLAIM, SPARES
from tests.vm.faults import comm, kill_and_wait
from tests.vm.node import Node
from tests.vm.operator import casemate
from tests.vm.pods import Pods
from tests.vm.test_forkserver import nature
from tests.vm.test_restore import facts

FILLED_S = 90.0
"""Machines are made one after the other, at a lower priority, on a machine that is busy with others."""
DIAL = """\
import os, socket
print(os.strerror(socket.socket().connect_ex(("10.77.0.1", 8000))))
"""
HELD = 'import sys; held = sys.argv[1].encode() * 1000000; print("held", flush=True); input()'


class Pool:
    """A casemated that keeps machines, and what can be seen of them from outside."""

    def __init__(self, pods: Pods, node: Node) -> None:
        self.pods = pods
        self.node = node
        self.instance = pods.ctr.instance

    @property
    def home(self) -> Path:
        return self.instance.path(f"/run/casemate/{SPARES}")

    def start(self, count: int = 1, more: str = "", learn: bool = True) -> None:
        """Returns when it is full of machines for pods as the tests' containerd starts them."""
        self.instance.configure(f"{more}\n[node]\npool = {{ default = {count} }}\n")
        self.node.start()
        if learn:
            self.pods.run("true").ok()  # whose nature casemated learns
        self.wait_full(count)

    def ready(self) -> set[str]:
        return {path.parent.name for path in self.home.glob(f"*/{CLAIM}")}

    def wait_full(
        self, count: int = 1, but: AbstractSet[str] = frozenset(), but_like: AbstractSet[str] = frozenset()
    ) -> set[str]:
        """but, but_like: some that do not count, and others of their kind. Nobody tells who is no child of
        casemated's: hence a bounded poll."""
        kinds = {name[:DIGITS] for name in but_like}
        deadline = time.monotonic() + FILLED_S
        while len(found := {each for each in self.ready() - but if each[:DIGITS] not in kinds}) < count:
            assert time.monotonic() < deadline, self.instance.log_tail()
            time.sleep(0.05)
        return found

    def wait_gone(self) -> None:
        deadline = time.monotonic() + FILLED_S
        while left := list(self.home.iterdir()):
            assert time.monotonic() < deadline, left
            time.sleep(0.05)

    def records(self) -> list[dict[str, Any]]:
        return [json.loads((self.home / name / "state.json").read_text()) for name in sorted(self.ready())]

    def qemu(self, spare: dict[str, Any]) -> int:
        """The pid of a spare's QEMU."""
        return next(
            pid for pid in supervisor.descendants(spare["pid"]) if comm(pid).startswith("qemu-system")
        )

    def source(self, *options: str) -> str:
        """How a pod came to run that does what it should."""
        with self.pods.detached("sleep", "1000", options=options) as name:
            assert self.pods.exec(name, "echo", "works").ok().out == "works\n"
            return str(self.pods.state(name)["source"])

    def log(self, name: str) -> str:
        return (self.pods.paths(name).directory / "shim.log").read_text()


@pytest.fixture
def pool(pods: Pods) -> Iterator[Pool]:
    node = Node(pods.ctr.instance)
    pool = Pool(pods, node)
    yield pool
    node.close()
    pool.wait_gone()


# --- a machine that is taken ---


def test_a_pod_takes_a_machine_and_another_one_is_made(pool: Pool) -> None:
    pool.start()
    (first,) = pool.ready()
    with pool.pods.detached("sleep", "1000") as name:
        assert pool.pods.state(name)["source"] == "pool"
        assert pool.pods.state(name)["id"] == name
        assert pool.pods.exec(name, "hostname").ok().out.strip() == name[:12]
        spans = json.loads(pool.pods.paths(name).trace.read_text())["spans"]
        assert {phases.POOL_RESUME, phases.POOL_GREET} <= {span["name"] for span in spans}
        assert phases.LIBVIRT_CREATE not in {span["name"] for span in spans}
        pool.wait_full(1, but={first})
        listed = json.loads(casemate(pool.instance, "pool", "--json").stdout)
        assert listed["wanted"] == {"default": 1}
        assert [(one["profile"], one["state"]) for one in listed["spares"]] == [("default", "ready")]
        assert first not in {one["id"] for one in listed["spares"]}
    assert pool.pods.run("sh", "-c", "echo out; exit 7").code == 7


def test_a_machine_of_the_pool_gets_the_pods_network(pool: Pool) -> None:
    with namespace() as pod, namespace() as outside:
        connect(pod, "eth0", outside, "v0", ("10.77.0.2/24", "10.77.0.1/24"))
        pool.start()
        with pool.pods.detached("sleep", "1000", options=pod.options) as name:
            assert pool.pods.state(name)["source"] == "pool"
            assert "10.77.0.2/24" in pool.pods.exec(name, "ip", "address").ok().out
            refused = pool.pods.exec(name, "python3", "-c", DIAL).ok().out
            assert refused == "Connection refused\n"


def test_what_waits_goes_first_where_memory_runs_out_and_is_seen_by_no_other_pod(pool: Pool) -> None:
    pool.start()
    (spare,) = pool.records()
    for pid in (spare["pid"], pool.qemu(spare)):
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
        assert os.stat(f"/proc/{pid}/root/run/casemate/{SPARES}").st_mode & 0o777 == 0o711
        assert os.listdir(f"/proc/{pid}/root/run/casemate/{SPARES}") == [spare["id"]]
    assert (pool.home / spare["id"] / CLAIM).stat().st_mode & 0o777 == 0o600
    with pool.pods.detached("sleep", "1000", options=("--annotation", "dev.casemate.profile=small")) as name:
        assert os.listdir(f"/proc/{pool.pods.state(name)['pid']}/root/run/casemate/{SPARES}") == []


def test_pods_of_the_pool_differ_in_all_that_must_differ(pool: Pool) -> None:
    pool.start(2)
    found = []
    for _ in range(3):
        found.append(facts(pool.pods))
        pool.wait_full(2)
    for name in found[0]["differ"]:
        assert len({one["differ"][name] for one in found}) == 3, name
    assert len({one["hostname"] for one in found}) == 3


def test_nothing_of_one_pod_is_found_by_the_next(pool: Pool) -> None:
    pool.start()
    marker = f"secret-of-{os.urandom(8).hex()}"
    look = "grep -rls --exclude-dir=proc --exclude-dir=sys --exclude-dir=usr -e $0 / | sort"
    script = (
        f"for place in /dev/shm /root /run /tmp; do echo $0 > $place/left; done; exec python3 -c '{HELD}' $0"
    )
    name = pool.pods.ctr.new_id()
    with pool.pods.start("sh", "-c", script, marker, name=name) as running:
        running.read_until(b"held\n", 60)
        assert pool.pods.state(name)["source"] == "pool"
        pool.wait_full()
        running.write(b"\n")
        assert running.finish(30).code == 0
    assert pool.pods.run("sh", "-c", look, marker).ok().out == ""


def test_a_shim_of_the_pool_is_what_start_would_have_made_of_it(pool: Pool) -> None:
    score = Path(f"/proc/{pool.instance.containerd_pid}/oom_score_adj")
    before = score.read_text()
    score.write_text("77")
    try:
        with pool.pods.detached("sleep", "1000") as name:
            expected = nature(pool.pods, name)
        pool.start()
        with pool.pods.detached("sleep", "1000") as name:
            assert pool.pods.state(name)["source"] == "pool"
            found = nature(pool.pods, name)
            qemu = pool.pods.state(name)["qemu_pid"]
            assert Path(f"/proc/{qemu}/oom_score_adj").read_text() == "78\n"
            assert os.getpriority(os.PRIO_PROCESS, qemu) == os.getpriority(os.PRIO_PROCESS, 0)
            limits = Path(f"/proc/{pool.pods.state(name)['pid']}/environ").read_bytes()
            assert b"casemated" not in limits
    finally:
        score.write_text(before)
    assert found == expected


def test_every_process_of_the_pod_is_in_its_cgroup(pool: Pool) -> None:
    pool.start()
    group = f"/casemate-test-{os.getpid()}"
    with pool.pods.detached("sleep", "1000", options=("--cgroup", f"{group}/web")) as name:
        assert pool.pods.state(name)["source"] == "pool"
        state, key = pool.pods.state(name), pool.pods.paths(name).key
        for pid in (state["pid"], state["qemu_pid"], state["virtiofsd_pid"], state["containers"][0]["pid"]):
            lines = Path(f"/proc/{pid}/cgroup").read_text()
            assert f"{group}/casemate-{key}" in lines, f"process {pid}: {lines}"
    for one in cgroup.hierarchies():
        if (directory := one.mounted / group[1:]).is_dir():
            directory.rmdir()


def test_a_pod_of_the_pool_is_in_the_network_that_it_names(pool: Pool) -> None:
    pool.start()
    held = pool.instance.spawn(["unshare", "--net", "sleep", "1000"])
    try:
        deadline = time.monotonic() + 60
        own = os.readlink(f"/proc/{pool.instance.containerd_pid}/ns/net")
        while (inside := os.readlink(f"/proc/{held}/ns/net")) == own:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        options = ("--with-ns", f"network:/proc/{held}/ns/net")
        with pool.pods.detached("sleep", "1000", options=options) as name:
            state = pool.pods.state(name)
            assert state["source"] == "pool"
            assert os.readlink(f"/proc/{state['containers'][0]['pid']}/ns/net") == inside
            assert os.readlink(f"/proc/{state['pid']}/ns/net") == inside
            assert os.readlink(f"/proc/{state['qemu_pid']}/ns/net") != own
    finally:
        os.kill(held, signal.SIGKILL)
        pool.instance.wait_exit(held, 60)


# --- when there is none to be had ---


def test_who_finds_none_is_restored(pool: Pool) -> None:
    pool.start()
    with ThreadPoolExecutor(3) as threads, ExitStack() as running:
        names = [pool.pods.ctr.new_id() for _ in range(3)]
        for name in names:
            running.callback(pool.pods.remove, name)
        argvs = [pool.pods.argv(name, ("sleep", "1000"), ("--detach",)) for name in names]
        started = list(threads.map(lambda argv: pool.pods.ctr(*argv, timeout_s=120), argvs))
        assert [result.code for result in started] == [0, 0, 0], started
        sources = [pool.pods.state(name)["source"] for name in names]
        logs = [pool.pods.paths(name).log.read_text() for name in names]
        # A busy host's machine may not answer in the half second that it has.
        assert "pool" in sources or any("does not answer: timed out" in log for log in logs), logs
        assert set(sources) <= {"pool", "restore"}
        assert len({pool.pods.exec(name, "hostname").ok().out for name in names}) == 3


def test_what_a_machine_was_not_made_for_it_does_not_get(pool: Pool) -> None:
    pool.start()
    waiting = pool.ready()
    assert pool.source("--annotation", "dev.casemate.profile=small") != "pool"
    mount = ("--mount", f"type=bind,src={pool.instance.work},dst=/work,options=rbind:ro")
    with pool.pods.detached("sleep", "1000", options=mount) as name:
        assert pool.pods.state(name)["source"] == "restore"
        assert "not from the pool: the pool is empty" in pool.log(name)
    # It was asked for last, so that one is made of that kind, and then the other one goes.
    pool.wait_full(1, but_like=waiting)
    assert pool.source(*mount) == "pool"


def test_a_change_of_the_configuration_counts_at_once(pool: Pool) -> None:
    pool.start()
    waiting = pool.ready()
    pool.instance.configure('log_level = "debug"\n[node]\npool = { default = 1 }\n')
    assert pool.source() == "restore"
    pool.wait_full(1, but_like=waiting)
    assert pool.source() == "pool"
    pool.instance.configure("[node]\npool = { default = 0 }\n")
    assert pool.source() == "restore"


def test_a_template_that_was_removed_serves_nobody(pool: Pool, tmp_path: Path) -> None:
    directory = pool.instance.work / f"templates-{pool.pods.ctr.new_id()}"
    directory.mkdir()
    pool.instance.configure(f'template_dir = "{directory}"\n')
    assert casemate(pool.instance, "template", "build").returncode == 0
    pool.start(1, f'template_dir = "{directory}"\nmake_templates = false')
    keys = (path.name for path in directory.iterdir() if path.name != "tmp")
    assert casemate(pool.instance, "template", "rm", *keys).returncode == 0
    with pool.pods.detached("sleep", "1000") as name:
        assert pool.pods.state(name)["source"] == "boot"
        assert "its template was removed or replaced" in pool.log(name)


def test_without_a_template_pods_are_booted(pool: Pool) -> None:
    directory = pool.instance.work / f"templates-{pool.pods.ctr.new_id()}"
    directory.mkdir()
    settings = f'template_dir = "{directory}"\nmake_templates = false\n[node]\npool = {{ default = 1 }}\n'
    pool.instance.configure(settings)
    pool.node.start()
    assert pool.source() == "boot"
    deadline = time.monotonic() + FILLED_S
    while "no machine of profile default for the pool" not in pool.instance.log.read_text(errors="replace"):
        assert time.monotonic() < deadline, pool.instance.log_tail()
        time.sleep(0.05)


def test_what_is_mounted_on_the_host_later_and_seen_by_none_is_not_lost(pool: Pool) -> None:
    """Where the host's mounts are private they do not reach a machine that waits: it is given up."""
    pool.start()
    place = pool.instance.work / "later"
    place.mkdir()
    within = ["nsenter", f"--mount=/proc/{pool.instance.containerd_pid}/ns/mnt"]
    assert (
        os.waitstatus_to_exitcode(
            os.spawnvp(os.P_WAIT, within[0], [*within, "mount", "-t", "tmpfs", "later", str(place)])
        )
        == 0
    )
    try:
        (place / "file").write_text("")
        with pool.pods.detached("sleep", "1000") as name:
            source, log = pool.pods.state(name)["source"], pool.log(name)
        assert source == "pool" or f"{place} was mounted on the host since" in log
    finally:
        os.spawnvp(os.P_WAIT, within[0], [*within, "umount", str(place)])


# --- what dies ---


def test_a_machine_that_has_died_is_replaced(pool: Pool) -> None:
    pool.start()
    (spare,) = pool.records()
    kill_and_wait(pool.qemu(spare))
    pool.wait_full(1, but={spare["id"]})
    assert pool.source() == "pool"


def test_a_machine_that_hangs_when_it_is_taken_costs_a_restore(pool: Pool) -> None:
    pool.start()
    (spare,) = pool.records()
    os.kill(pool.qemu(spare), signal.SIGSTOP)
    with pool.pods.detached("sleep", "1000", timeout_s=120) as name:
        assert pool.pods.state(name)["source"] == "restore"
        assert "the pod's machine is not the one of the pool" in pool.log(name)
        assert pool.pods.exec(name, "echo", "works").ok().out == "works\n"


def test_a_process_of_the_pool_that_is_killed_leaves_what_gc_removes(pool: Pool) -> None:
    pool.start()
    (spare,) = pool.records()
    kill_and_wait(spare["pid"])
    pool.wait_full(1, but={spare["id"]})
    assert (pool.home / spare["id"]).exists()
    listed = json.loads(casemate(pool.instance, "pool", "--json").stdout)["spares"]
    assert {one["id"]: one["state"] for one in listed}[spare["id"]] == "stale"
    assert casemate(pool.instance, "gc").returncode == 0
    assert not (pool.home / spare["id"]).exists()
    assert pool.source() == "pool"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_pool_ends_with_casemated_and_its_pods_go_on(pool: Pool, number: int) -> None:
    pool.start(2)
    with pool.pods.detached("sleep", "1000") as name:
        assert pool.pods.state(name)["source"] == "pool"
        pool.node.kill(number)
        pool.wait_gone()
        assert pool.pods.exec(name, "echo", "works").ok().out == "works\n"
        assert pool.source() == "restore"


def test_a_shim_that_is_killed_takes_its_pod_with_it(pool: Pool) -> None:
    pool.start()
    with pool.pods.detached("sleep", "1000") as name:
        assert pool.pods.state(name)["source"] == "pool"
        kill_and_wait(pool.pods.state(name)["pid"])
        pool.pods.wait_status(name, "")


@pytest.mark.timeout(900)
def test_whenever_a_machine_or_casemated_is_killed_every_pod_starts_once(pool: Pool) -> None:
    """Sixteen pods or more, three at a time, while waiting machines and casemated are killed all the time."""
    pool.start(2)
    done = threading.Event()
    kills = 0

    def killer() -> None:
        nonlocal kills
        while not done.wait(0.4):
            if kills % 3:
                kills += any(kill_if_it_waits(home, pid) for home, pid in waiting(pool))
            else:
                os.kill(pool.node.pid, signal.SIGHUP)
                kills += 1

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        with ThreadPoolExecutor(3) as threads:
            results = list(threads.map(lambda _: pool.pods.run("echo", "once", timeout_s=120), range(16)))
            while kills <= 3:
                results.append(pool.pods.run("echo", "once", timeout_s=120))
    finally:
        done.set()
        thread.join()
    assert [result for result in results if (result.code, result.out) != (0, "once\n")] == []
    pool.node.kill(signal.SIGTERM)
    casemate(pool.instance, "gc")


def waiting(pool: Pool) -> Iterator[tuple[Path, int]]:
    """The directories and pids of those that wait, as far as they have said so."""
    for path in pool.home.glob("*/state.json"):
        with suppress(OSError, ValueError, KeyError):
            record = json.loads(path.read_text())
            if "namespace" not in record:
                yield path.parent, record["pid"]


def kill_if_it_waits(home: Path, pid: int) -> bool:
    """Whether it was killed. One that a pod has taken meanwhile is that pod's shim: while it is stopped, it
    does not become so."""
    with suppress(FileNotFoundError, ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        while Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "TZX":
            time.sleep(0.001)  # a signal is on its way until it is there, of which nobody tells
        waits = (home / CLAIM).exists()
        os.kill(pid, signal.SIGKILL if waits else signal.SIGCONT)
        return waits
    return False


IDLE_S = 5.0
OTHERS = ("containerd", "qemu-system-x86", "python")
"""Go's, a guest's own clock, and what holds the test's namespaces."""


def switches(pool: Pool) -> dict[tuple[int, str], int]:
    """Of every thread that is neither containerd's nor QEMU's: how often it has had a processor (proc(5))."""
    found = {}
    for pid in pool.instance.descendants():
        with suppress(FileNotFoundError, ProcessLookupError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            for task in Path(f"/proc/{pid}/task").iterdir() if name not in OTHERS else ():
                lines = (task / "status").read_text().splitlines()
                found[int(task.name), name] = sum(int(line.split()[1]) for line in lines if "ctxt" in line)
    return found


def test_what_is_idle_wakes_for_nothing(pods: Pods, pool: Pool) -> None:
    """Neither a pod's processes nor a waiting machine's nor casemated; what they do first ends by itself."""
    pool.start()
    with pods.detached("sleep", "1000000"):
        pool.wait_full(1)
        deadline = time.monotonic() + FILLED_S
        before: dict[tuple[int, str], int] = {}
        while (after := switches(pool)) != before:
            assert time.monotonic() < deadline, {
                key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key)
            }
            before = after
            time.sleep(IDLE_S)  # nothing tells that nothing happens
    assert {name for _, name in after} >= {"casemated", "casemate-shim", "casemate-spare", "casemate-anchor"}
