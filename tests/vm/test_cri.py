"""Pods of several containers, through containerd's CRI with crictl: their lives, and what they share."""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.instance import RUNTIME
from tests.vm import builds
from tests.vm import cri as support
from tests.vm.cri import BOOT_ID, FOREVER, OWN_PIDS, POD_PIDS, Cri, failure
from tests.vm.node import Node
from tests.vm.pods import Pods
from tests.vm.test_pool import Pool

every_cri = pytest.mark.parametrize("cri_instance", list(builds.VERSIONS), indirect=True)
"""What depends on how a line of containerd says it, or asks for it."""
of_podsandbox = pytest.mark.skipif(
    support.HANDLER == support.SHIM_HANDLER, reason="by the Sandbox API: no task, no machine of the pool"
)


@every_cri
@pytest.mark.client("crictl runp, create, start (several containers)", "works", "in one VM")
def test_containers_of_a_pod_share_a_machine_and_keep_their_files_to_themselves(cri: Cri) -> None:
    with cri.pod() as pod:
        one, two = pod.run(*FOREVER), pod.run(*FOREVER)
        boots = {pod.exec(container, *BOOT_ID).ok().out for container in (one, two)}
        assert len(boots) == 1
        assert boots != {Path("/proc/sys/kernel/random/boot_id").read_text()}
        pod.exec(one, "sh", "-c", "echo one > /mark").ok()
        assert "No such file" in failure(pod.exec(two, "cat", "/mark"))
        assert {item["id"] for item in pod.state["containers"]} == {pod.id, one, two}
        assert sum(item["state"] == "running" for item in pod.state["containers"]) == 3


@every_cri
@pytest.mark.client("crictl stop, rm, inspect", "works", "the VM outlives every container but the sandbox")
def test_a_container_ends_and_is_made_again_while_the_other_one_runs_on(cri: Cri) -> None:
    with cri.pod() as pod:
        steady = pod.run("sh", "-c", "echo $$ > /started; exec sleep 1000")
        boot = pod.exec(steady, *BOOT_ID).ok().out
        for code in (3, 0):
            container = pod.run("sh", "-c", f"echo said {code}; exit {code}", name="again")
            status = pod.ended(container)
            assert status["exitCode"] == code
            assert pod.log(container) == f"said {code}\n"
            cri("rm", container).ok()
        killed = pod.run(*FOREVER, name="again")
        cri("stop", "--timeout=0", killed).ok()
        assert pod.ended(killed)["exitCode"] == 137
        cri("rm", killed).ok()
        assert pod.status(steady)["state"] == "CONTAINER_RUNNING"
        assert pod.exec(steady, *BOOT_ID).ok().out == boot
        cri("rm", "--force", steady).ok()
        assert pod.is_ready
        assert pod.exec(pod.run(*FOREVER), *BOOT_ID).ok().out == boot


@every_cri
@pytest.mark.client(
    "crictl create (process IDs of the pod)", "works", "PID 1 is not the pause image's program"
)
def test_process_ids_are_each_containers_own_or_the_pods(cri: Cri) -> None:
    with cri.pod() as pod:
        own = pod.run(*FOREVER)
        pod.shows(own, ["sleep", "ps"])
        assert pod.exec(own, "cat", "/proc/1/comm").ok().out == "sleep\n"
        shared = pod.run("sh", "-c", "sleep 1001; exit 4", linux=POD_PIDS)
        other = pod.run("sleep", "1002", linux=POD_PIDS)
        pod.shows(shared, ["pause", "ps", "sh", "sleep", "sleep"])
        pod.exec(other, "pkill", "-f", "^sleep 1001$").ok()  # another container's process
        assert pod.ended(shared)["exitCode"] == 4
        assert pod.exec(other, "sh", "-c", "kill -9 1; cat /proc/1/comm").ok().out == "pause\n"
        assert pod.exec(own, "ps", "-eo", "comm=").ok().out.split() == ["sleep", "ps"]
        cri("stop", "--timeout=0", other).ok()
        again = pod.run("cat", "/proc/1/comm", linux=POD_PIDS)
        pod.ended(again)
        assert pod.log(again) == "pause\n"


@pytest.mark.client("crictl create (process IDs of a target)", "works", "")
def test_a_debugging_container_joins_the_process_ids_of_its_target(cri: Cri) -> None:
    """As an ephemeral container with a target: NamespaceMode TARGET is 3."""
    with cri.pod() as pod:
        target = pod.run(*FOREVER)
        options = {"pid": 3, "target_id": target}
        debug = pod.run(*FOREVER, linux={"security_context": {"namespace_options": options}})
        pod.shows(debug, ["sleep", "sleep", "ps"])
        assert pod.exec(debug, "cat", "/proc/1/comm").ok().out == "sleep\n"


SHM_WRITER = """\
from multiprocessing.shared_memory import SharedMemory
memory = SharedMemory("between", create=True, size=4096)
memory.buf[:5] = b"hello"
import time; print("written", flush=True); time.sleep(1000)
"""


@every_cri
@pytest.mark.client("crictl runp (host name, IPC, /dev/shm, sysctls)", "works", "in the guest")
def test_containers_of_a_pod_have_one_host_name_ipc_and_shared_memory(cri: Cri) -> None:
    sysctls = {
        "kernel.shm_rmid_forced": "1",
        "net.ipv4.tcp_keepalive_time": "600",
        "kernel.msgmax": "9000",
        "net.ipv4.conf.eth0.arp_notify": "1",
    }
    options = {**OWN_PIDS, "sysctls": sysctls}
    with cri.pod(hostname="keep-tower", linux=options) as pod:
        one = pod.run("python3", "-c", SHM_WRITER)
        two = pod.run(*FOREVER)
        paths = [f"/proc/sys/{name.replace('.', '/')}" for name in sysctls]
        script = 'hostname; cat "$@"; readlink /proc/self/ns/ipc /proc/self/ns/uts'
        seen = [pod.exec(container, "sh", "-c", script, "sh", *paths).ok().out for container in (one, two)]
        assert seen[0].splitlines()[:-2] == ["keep-tower", *sysctls.values()]
        assert seen[0] == seen[1]
        cri.wait(lambda: pod.log(one) == "written\n", "the memory is there")
        look = (
            "head -c 5 /dev/shm/between; stat -f -c ' %T' /dev/shm; df -B1 --output=size /dev/shm | tail -1"
        )
        shm = pod.exec(two, "sh", "-c", look).ok().out.split()
        assert shm == ["hello", "tmpfs", str(64 << 20)]
        # Nothing of it is on the host, where the sandbox has a directory of this size for it.
        assert (
            list(cri.instance.path("/run/containerd/io.containerd.grpc.v1.cri/sandboxes").glob("*/shm/*"))
            == []
        )


@pytest.mark.client("crictl runp (host's network, PID or IPC namespace)", "refused", "a VM has its own")
def test_what_a_pod_may_not_have_is_refused_with_a_reason(cri: Cri) -> None:
    node = 2
    for kind, words in (("network", "host network"), ("pid", "host PID"), ("ipc", "host IPC")):
        namespaces: dict[str, Any] = {"namespace_options": {"pid": 1, kind: node}}
        config = cri.write(
            f"host-{kind}", metadata=support.metadata(f"host-{kind}"), linux={"security_context": namespaces}
        )
        said = failure(cri("runp", f"--runtime={support.HANDLER}", str(config)))
        assert words in said


@every_cri
@pytest.mark.client("crictl exec, exec -it, logs, attach, stats, inspectp", "works", "")
def test_exec_logs_attach_and_statistics(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run("cat", stdin=True)
        failed = pod.exec(container, "sh", "-c", "echo out; echo err >&2; exit 5")
        assert failed.code != 0
        assert "exited with 5: err" in failed.err
        with cri.terminal(
            "exec", "-it", container, "sh", "-c", "tty -s && echo is-tty; stty size"
        ) as terminal:
            terminal.expect(rb"is-tty", 30)
        with cri.start("attach", "--stdin", container) as attached:
            attached.write(b"through\n")
            assert attached.read_until(b"through\n", 30) == b"through\n"
        cri.wait(lambda: "through" in pod.log(container), "it is in the log")
        [stats] = cri.json("stats", "--output=json", "--id", container)["stats"]
        assert int(stats["memory"]["workingSetBytes"]["value"]) > 0
        assert int(stats["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
        assert pod.is_ready


@pytest.mark.client("crictl update, create (limits)", "works", "OOMKilled where memory is exceeded")
def test_a_container_beyond_its_memory_is_killed_and_said_to_have_been(cri: Cri) -> None:
    limits = {"resources": {"memory_limit_in_bytes": 64 << 20, "cpu_quota": 50_000, "cpu_period": 100_000}}
    with cri.pod() as pod:
        steady = pod.run(*FOREVER, linux={**OWN_PIDS, **limits})
        shown = pod.exec(steady, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max").ok().out
        assert shown == f"{64 << 20}\n50000 100000\n"
        cri("update", "--memory", str(80 << 20), "--cpu-quota", "70000", steady).ok()
        shown = pod.exec(steady, "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max").ok().out
        assert shown == f"{80 << 20}\n70000 100000\n"
        greedy = pod.run("python3", "-c", "bytearray(200 << 20)", linux={**OWN_PIDS, **limits})
        status = pod.ended(greedy)
        assert (status["exitCode"], status["reason"]) == (137, "OOMKilled")
        assert pod.status(steady)["state"] == "CONTAINER_RUNNING"


@of_podsandbox
def test_a_pod_takes_a_machine_that_waited_for_pods_like_it(cri: Cri) -> None:
    """On a host whose mounts are shared, as systemd has it: what CNI mounts reaches a machine that waits."""
    propagate = cri.instance.inside("mount", "--make-rshared", "/")
    subprocess.run(propagate, check=True)
    node = Node(cri.instance)
    pool = Pool(Pods(cri.ctr, RUNTIME, support.IMAGE), node)
    try:
        pool.start(learn=False)
        others = pool.ready()
        with cri.pod() as first:
            assert first.state["source"] == "restore"
        pool.wait_full(but_like=others)
        with cri.pod() as second:
            assert second.state["source"] == "pool"
            one, two = second.run(*FOREVER), second.run(*FOREVER)
            for container in (one, two):
                assert second.exec(container, "hostname").ok().out == f"{second.config['hostname']}\n"
    finally:
        node.close()
        pool.wait_gone()
        subprocess.run(cri.instance.inside("mount", "--make-rprivate", "/"), check=True)


def test_a_pod_whose_machine_dies_is_over_and_can_be_removed(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run(*FOREVER)
        os.kill(pod.state["qemu_pid"], signal.SIGKILL)
        assert pod.ended(container)["exitCode"] == 137
        pod.over()


@of_podsandbox
@pytest.mark.client(
    "crictl runp (the sandbox container)", "differs", "its program is not run, only accounted for"
)
def test_what_is_done_to_the_sandbox_itself_is_done_to_the_pod(cri: Cri) -> None:
    with cri.pod() as pod:
        container = pod.run(*FOREVER)
        exec_ = cri.ctr("task", "exec", "--exec-id", "e", pod.id, "true")
        assert "nothing of it runs in the virtual machine" in failure(exec_)
        cri.ctr("task", "kill", "--signal", "SIGUSR1", pod.id).ok()
        assert pod.is_ready
        qemu = pod.state["qemu_pid"]
        pid = next(item["pid"] for item in pod.state["containers"] if item["id"] == pod.id)
        os.kill(pid, signal.SIGKILL)
        assert pod.ended(container)["exitCode"] == 137
        assert not Path(f"/proc/{qemu}").exists()
        pod.over()


@every_cri
def test_a_pod_goes_on_while_containerd_is_away(cri: Cri) -> None:
    script = "echo before; while read line; do echo got $line; done"
    with cri.pod() as pod:
        container = pod.run("sh", "-c", script, stdin=True)
        cri.instance.restart()
        cri.wait_ready()
        assert pod.status(container)["state"] == "CONTAINER_RUNNING"
        pod.exec(container, "true").ok()
        with cri.start("attach", "--stdin", container) as attached:
            attached.write(b"something\n")
            attached.read_until(b"got something\n", 30)
        cri.wait(lambda: pod.log(container) == "before\ngot something\n", "it is logged")
        assert pod.exec(pod.run(*FOREVER), "hostname").ok().out == f"{pod.config['hostname']}\n"


def test_a_pod_whose_shim_is_killed_is_over_and_can_be_removed(cri: Cri) -> None:
    with cri.pod() as pod:
        container, late = pod.run(*FOREVER), pod.create("true")
        os.kill(pod.state["pid"], signal.SIGKILL)
        assert pod.ended(container)["state"] == "CONTAINER_EXITED"
        said = failure(cri("start", late))
        assert re.search("no virtual machine any more|sandbox container .* is not running", said), said
