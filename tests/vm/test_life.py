"""A container's life: signals, pause, statistics, processes, limits changed, attach, containerd's restart."""

import json
import os
import signal
import time

import pytest

from rpc.api import task
from rpc.api.types import Any as AnyMessage
from rpc.errors import NotFound
from tests.vm import faults, taskapi
from tests.vm.pods import CGROUP_MOUNT, Pods, every_version

CATCHABLE = sorted(set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP})

CATCHER = """\
import os, signal
def note(number, frame):
    os.write(1, b'caught %d\\n' % number)
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, note)
os.write(1, b'ready\\n')
while True:
    signal.pause()
"""

HARMLESS = {signal.Signals[f"SIG{word}"] for word in ("CHLD", "CONT", "URG", "WINCH")}
STOPPING = {signal.Signals[f"SIG{word}"] for word in ("STOP", "TSTP", "TTIN", "TTOU")}
DEADLY = sorted({*range(1, 32), signal.SIGRTMIN, signal.SIGRTMAX} - HARMLESS - STOPPING)
"""Signals that end a process by default."""


@pytest.mark.client("ctr task kill --signal", "works", "")
def test_every_signal_arrives(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with pods.start("python3", "-c", CATCHER, name=name) as running:
        running.read_until(b"ready\n", 60)
        for number in CATCHABLE:
            pods.kill(name, str(int(number))).ok()
            running.read_until(b"caught %d\n" % number, 30)
        pods.kill(name).ok()
        assert running.finish(20).code == 137


def test_a_signal_ends_an_exec_with_128_and_its_number(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        for number in DEADLY:
            exec_id = f"s{int(number)}"
            argv = ("task", "exec", "--exec-id", exec_id, name, "sh", "-c", "echo up; exec sleep 1000")
            with pods.ctr.start(*argv) as running:
                running.read_until(b"up\n", 30)
                pods.kill(name, str(int(number)), "--exec-id", exec_id).ok()
                assert running.finish(20).code == 128 + number


@pytest.mark.client("ctr task kill --all", "works", "")
def test_kill_all_reaches_every_process(pods: Pods) -> None:
    loop = "while :; do sleep 0.1; done"
    script = f"trap 'wait; exit 4' USR1; sh -c 'trap \"echo child; exit 0\" USR1; echo up; {loop}' & {loop}"
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", script, name=name) as running:
        running.read_until(b"up\n", 60)
        pods.kill(name, "SIGUSR1", "--all").ok()
        running.read_until(b"child\n", 30)
        assert running.finish(20).code == 4


@every_version
def test_sigkill_ends_a_container_with_137(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", "echo up; exec sleep 1000", name=name) as running:
        running.read_until(b"up\n", 60)
        pods.kill(name).ok()
        assert running.finish(20).code == 137


def test_kill_after_the_end_is_not_found(pods: Pods) -> None:
    with pods.detached("true") as name:
        pods.wait_status(name, "STOPPED")
        with pytest.raises(NotFound):  # the code is what clients look at
            taskapi.ask(pods, name, task.KILL, task.KillRequest(id=name, signal=9))
        assert pods.kill(name).code != 0


@pytest.mark.client("ctr task pause, resume", "works", "")
def test_a_paused_container_stands_still(pods: Pods) -> None:
    """The program measures the longest gap between two of its steps; a second pod's whole life fits in the
    pause.
    """
    script = (
        "import signal, time\n"
        "longest, last = 0.0, time.monotonic()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print(longest, flush=True))\n"
        "print('up', flush=True)\n"
        "while True:\n"
        "    time.sleep(0.01); now = time.monotonic(); longest = max(longest, now - last); last = now\n"
    )
    name = pods.ctr.new_id()
    with pods.start("python3", "-c", script, name=name) as running:
        running.read_until(b"up\n", 60)
        pods.ctr("task", "pause", name).ok()
        paused_at = time.monotonic()
        assert pods.status(name) == "PAUSED"
        pods.run("true").ok()
        paused_s = time.monotonic() - paused_at
        pods.ctr("task", "resume", name).ok()
        assert pods.status(name) == "RUNNING"
        pods.kill(name, "SIGUSR1").ok()
        longest = float(running.read_until(b"\n", 20))
        assert longest > 0.95 * paused_s
        pods.kill(name).ok()
        assert running.finish(20).code == 137


@pytest.mark.client(
    "ctr task metrics",
    "works",
    "the container's cgroup in the guest; of the network nothing, as of runc's shim",
)
@every_version
def test_metrics_are_the_containers(pods: Pods) -> None:
    name = pods.ctr.new_id()
    with pods.start("sh", "-c", "sleep 1000 & echo up; exec sleep 1000", name=name) as running:
        running.read_until(b"up\n", 60)
        result = pods.ctr("task", "metrics", "--format", "json", name).ok()
        metrics = json.loads(result.out)
        assert metrics["pids"]["current"] == 2
        assert 0 < metrics["memory"]["usage"] < 64 << 20
        assert metrics["cpu"]["usage_usec"] > 0
        pods.kill(name).ok()
        running.finish(20)


@pytest.mark.client(
    "ctr task ps",
    "differs",
    "the one process that stands for the container on the host, once more for each exec",
)
def test_ps_names_a_live_process_of_the_host(pods: Pods) -> None:
    with pods.detached("sleep", "1000") as name:
        pids = [int(line.split()[0]) for line in pods.ctr("task", "ps", name).ok().out.splitlines()[1:]]
        assert pids
        assert set(pids) <= pods.ctr.instance.descendants()


def test_the_pid_of_a_task_is_harmless_and_not_qemus(pods: Pods) -> None:
    """nerdctl cp and stats go through /proc/PID/root and /proc/PID/ns/net of the pid that we report."""
    with pods.detached("sleep", "1000") as name:
        line = next(line for line in pods.tasks() if line.split()[0] == name)
        pid = int(line.split()[1])
        assert pid in pods.ctr.instance.descendants()
        assert "qemu" not in os.readlink(f"/proc/{pid}/exe")
        assert not os.path.exists(f"/proc/{pid}/root/proc/{os.getpid()}/environ"), (
            "the host's /proc is under its root"
        )
        assert not os.path.samefile(f"/proc/{pid}/root", pods.ctr.instance.path("/"))


def test_update_changes_the_limits_in_the_guest(pods: Pods) -> None:
    """ctr has no update: ask the shim as containerd would."""
    with pods.detached("sleep", "1000", options=("--memory-limit", str(128 << 20), *CGROUP_MOUNT)) as name:
        assert int(pods.exec(name, "cat", "/sys/fs/cgroup/memory.max").ok().out) == 128 << 20
        resources = {"memory": {"limit": 96 << 20}, "pids": {"limit": 77}}
        packed = AnyMessage(type_url=taskapi.RESOURCES, value=json.dumps(resources).encode())
        taskapi.ask(pods, name, task.UPDATE, task.UpdateTaskRequest(id=name, resources=packed))
        limits = (
            pods.exec(name, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max").ok().out.split()
        )
        assert limits == [str(96 << 20), "77"]


def test_the_guests_kernel_looks_for_no_work_when_it_is_idle(pods: Pods) -> None:
    """Twice a second it would compact memory, ahead of who might want large pieces of it."""
    assert pods.run("cat", "/proc/sys/vm/compaction_proactiveness").ok().out == "0\n"


def test_limits_beyond_the_vm_are_named_in_the_log_with_the_way_out(pods: Pods) -> None:
    """It runs all the same: to be smaller than the limits may be meant, and the host's CPUs are not in it."""
    pods.ctr.instance.configure('[profiles.default]\nmax_vcpus = 1\nmax_memory = "256MiB"\n')
    limits = ("--memory-limit", str(1 << 30), "--cpus", "4", "--cpuset-cpus", "2-3")
    with pods.detached("sleep", "1000", options=limits) as name:
        log = pods.paths(name).log.read_text()
    for words in (
        ("memory.limit is 1024 MiB", "the whole VM has 256 MiB", "dev.casemate.memory"),
        ("cpu.quota is 4 CPUs", "the whole VM has 1", "dev.casemate.vcpus"),
        ("cpu.cpus is left out", "not pinned"),
    ):
        assert any(all(word in line for word in words) for line in log.splitlines()), (words, log)


@pytest.mark.client("ctr run --detach, ctr task attach", "works", "")
@every_version
def test_detached_run_and_attach(pods: Pods) -> None:
    script = "read line; echo got $line; exit 9"
    with pods.detached("sh", "-c", script) as name, pods.ctr.start("task", "attach", name) as running:
        running.write(b"something\n")
        running.read_until(b"got something\n", 30)
        assert running.finish(20).code == 9


@every_version
def test_a_container_outlives_containerd(pods: Pods) -> None:
    """Its output meanwhile is kept for who attaches next, its input and its exit come through as before."""
    instance = pods.ctr.instance
    go, gone = (instance.work / pods.ctr.new_id(word) for word in ("go", "gone"))
    mount = f"type=bind,src={instance.work},dst={instance.work},options=rbind:rw"
    script = (
        f"while [ ! -e {go} ]; do sleep 0.1; done; echo meanwhile; touch {gone}; "
        "read line; echo got $line; exit 6"
    )
    with pods.detached("sh", "-c", script, options=("--mount", mount)) as name:
        pid = _pid(pods, name)
        instance.stop()
        go.touch()
        faults.wait_path(gone, 60)
        instance.start()
        assert pods.status(name) == "RUNNING"
        assert _pid(pods, name) == pid
        assert pods.exec(name, "cat", stdin=b"still here").ok().out == "still here"
        with pods.ctr.start("task", "attach", name) as running:
            running.read_until(b"meanwhile\n", 30)
            running.write(b"something\n")
            running.read_until(b"got something\n", 30)
            assert running.finish(20).code == 6


def test_a_container_that_ends_while_containerd_is_away(pods: Pods) -> None:
    instance = pods.ctr.instance
    go = instance.work / pods.ctr.new_id("go")
    mount = f"type=bind,src={instance.work},dst=/srv/work,options=rbind:rw"
    script = f"while [ ! -e /srv/work/{go.name} ]; do sleep 0.1; done; exit 11"
    with pods.detached("sh", "-c", script, options=("--mount", mount)) as name:
        instance.stop()
        go.touch()
        pods.wait_state(name, "stopped")
        instance.start()
        pods.wait_status(name, "STOPPED")
        result = pods.ctr("task", "delete", name)
        assert result.code == 11 or "11" in result.err, result


def _pid(pods: Pods, name: str) -> str:
    return next(line.split()[1] for line in pods.tasks() if line.split()[0] == name)
