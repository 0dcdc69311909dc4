"""Pods by containerd 2's Sandbox API (`sandboxer = "shim"`): what they share, their ends, what is refused."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rpc.api import sandbox as api
from rpc.api.cgroups import Metrics
from shim.bootstrap import socket_path
from tests.vm import cri as support
from tests.vm.cri import BOOT_ID, FOREVER, POD_PIDS, SHIM_HANDLER, Cri, failure
from tests.vm.taskapi import ask_at


@pytest.mark.client(
    'crictl runp of sandboxer = "shim" (create, start, exec, logs, inspectp)', "works", "in one VM"
)
def test_containers_of_a_sandbox_share_its_machine(cri: Cri) -> None:
    dns = {"servers": ["10.1.2.3"], "searches": ["tests.example"], "options": ["ndots:3"]}
    sysctls = {"kernel.msgmax": "9000"}
    with cri.pod(SHIM_HANDLER, hostname="keep-tower", dns_config=dns, linux={"sysctls": sysctls}) as pod:
        one = pod.run("sh", "-c", "printf hello > /dev/shm/between; echo written; exec sleep 1000")
        two = pod.run("sh", "-c", "echo said; exec sleep 1000", linux=POD_PIDS)
        script = (
            "hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/kernel/msgmax"
            " /proc/sys/net/ipv4/ip_unprivileged_port_start;"
            "readlink /proc/self/ns/ipc /proc/self/ns/uts; cat /proc/sys/kernel/random/boot_id"
        )
        seen = [pod.exec(container, "sh", "-c", script).ok().out for container in (one, two)]
        assert seen[0] == seen[1]
        assert seen[0].splitlines()[:7] == [
            *("keep-tower", "keep-tower"),
            *("search tests.example", "nameserver 10.1.2.3", "options ndots:3"),
            *("9000", "0"),
        ]
        assert seen[0].splitlines()[-1] != Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        assert pod.exec(one, "cat", "/etc/hosts").ok().out == Path("/etc/hosts").read_text()
        cri.wait(lambda: pod.log(one) == "written\n", "the memory is there")
        cri.wait(lambda: pod.log(two) == "said\n", "it is in the log")
        look = (
            "head -c 5 /dev/shm/between; stat -f -c ' %T' /dev/shm; df -B1 --output=size /dev/shm | tail -1"
        )
        assert pod.exec(two, "sh", "-c", look).ok().out.split() == ["hello", "tmpfs", str(64 << 20)]
        shown = cri.json("inspectp", pod.id)
        assert shown["status"]["state"] == "SANDBOX_READY"
        address = shown["status"]["network"]["ip"]
        assert f" {address}/" in pod.exec(one, "ip", "-4", "-o", "address").ok().out
        assert shown["info"]["runtimeSpec"]["hostname"] == "keep-tower"
        inside = os.readlink(f"/proc/{shown['info']['pid']}/ns/net")
        assert inside == os.readlink(f"/proc/{pod.state['qemu_pid']}/ns/net")
        assert inside != os.readlink("/proc/self/ns/net")
        shim = cri.instance.path(socket_path("/run/containerd/containerd.sock", support.NAMESPACE, pod.id))
        metrics = ask_at(shim, api.METRICS, api.SandboxMetricsRequest(sandbox_id=pod.id)).metrics
        assert metrics is not None
        assert metrics.data is not None
        used = Metrics.decode(metrics.data.value)
        assert used.memory is not None
        assert used.memory.usage > 32 << 20
        assert used.cpu is not None
        assert used.cpu.usage_usec > 0
        qemu = pod.state["qemu_pid"]
        cri("stopp", pod.id).ok()
        assert not Path(f"/proc/{qemu}").exists()
        assert pod.ended(one)["exitCode"] == 137
        assert not pod.is_ready


@pytest.mark.client(
    'crictl stop, rm, stopp, rmp of sandboxer = "shim"', "works", "the VM outlives every container"
)
def test_a_sandbox_outlives_its_containers_and_containerd_and_ends_with_its_machine(cri: Cri) -> None:
    with cri.pod(SHIM_HANDLER) as pod:
        first = pod.run("sh", "-c", "exit 3")
        assert pod.ended(first)["exitCode"] == 3
        cri("rm", first).ok()
        container = pod.run(*FOREVER)
        boot = pod.exec(container, *BOOT_ID).ok().out
        cri.instance.restart()
        cri.wait_ready()
        assert pod.is_ready
        assert {pod.exec(each, *BOOT_ID).ok().out for each in (container, pod.run(*FOREVER))} == {boot}
        os.kill(pod.state["qemu_pid"], signal.SIGKILL)
        assert pod.ended(container)["exitCode"] == 137
        pod.over()


@pytest.mark.client('crictl runp of sandboxer = "shim" (host namespaces)', "refused", "a VM has its own")
def test_what_a_sandbox_may_not_have_is_refused_with_a_reason(cri: Cri) -> None:
    node = 2
    for kind, words in (("network", "host network"), ("ipc", "host IPC")):
        namespaces: dict[str, Any] = {"namespace_options": {"pid": 1, kind: node}}
        name = f"sandbox-host-{kind}"
        linux = {"security_context": namespaces}
        config = cri.write(name, metadata=support.metadata(name), linux=linux)
        assert words in failure(cri("runp", f"--runtime={SHIM_HANDLER}", str(config)))
