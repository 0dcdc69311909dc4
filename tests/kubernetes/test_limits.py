"""What a pod may use, and what is said of what it uses."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.cluster import CGROUPS, POD_PIDS, Cluster
from tests.kubernetes.kubectl import FOREVER, Kubectl, KubePod, container
from tests.vm.cri import hierarchies

MIB = 1 << 20
OVERHEAD = 384 * MIB
"""As config/kubernetes/runtimeclass.yaml has it."""
QEMU = "qemu-system-x86"
HOLD = "held = bytearray({}); print('held', flush=True); import time; time.sleep(1000)"
POD_RAM = ("memory.max", "memory.limit_in_bytes")


def pod_cgroups(pod: KubePod) -> Iterator[Path]:
    """Of a pod on the host, one of each hierarchy."""
    uid = pod.kubectl.json("get", "pod", pod.name)["metadata"]["uid"]
    for top in hierarchies():
        yield from (top / CGROUPS).glob(f"**/pod{uid}")


def value(pod: KubePod, *names: str) -> str:
    """What the first of these files of the pod's cgroups has."""
    [found] = [path / name for path in pod_cgroups(pod) for name in names if (path / name).exists()]
    return found.read_text().strip()


def oom_scores(pod: KubePod) -> dict[str, int]:
    """Of the processes in the pod's cgroup, by name."""
    files = [path for cgroup in pod_cgroups(pod) for path in cgroup.glob("**/cgroup.procs")]
    places = [Path("/proc", pid) for path in files for pid in path.read_text().split()]
    return {(at / "comm").read_text().strip(): int((at / "oom_score_adj").read_text()) for at in places}


@pytest.mark.client(
    "kubectl create (resources, a RuntimeClass's overhead)", "works", "the machine is in the pod's cgroup"
)
def test_the_pods_cgroup_has_its_limits_and_its_machine(kubectl: Kubectl) -> None:
    resources = {"limits": {"memory": "100Mi", "cpu": "500m"}}
    with kubectl.pod(container(*FOREVER, resources=resources)) as pod:
        assert int(value(pod, *POD_RAM)) == 100 * MIB + OVERHEAD
        assert QEMU in oom_scores(pod)
        assert pod.status["qosClass"] == "Guaranteed"
        limits = pod.sh("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max").split()
        assert limits == [str(100 * MIB), "50000", "100000"]


@pytest.mark.client(
    "kubectl create (QoS class BestEffort, Burstable, Guaranteed)", "works", "the VM's oom_score_adj is it"
)
def test_the_machine_of_a_pod_that_asks_for_nothing_goes_first(kubectl: Kubectl) -> None:
    with kubectl.pod() as pod:
        assert pod.status["qosClass"] == "BestEffort"
        assert oom_scores(pod)[QEMU] == 1000
        assert pod.sh("cat /proc/1/oom_score_adj") == "1000\n"


@pytest.mark.client(
    "kubectl create (a container beyond its memory)", "works", "OOMKilled, and made again in the same VM"
)
def test_a_container_beyond_its_memory_is_killed_and_made_again(kubectl: Kubectl) -> None:
    resources = {"limits": {"memory": "48Mi"}}
    greedy = container("python3", "-c", HOLD.format(100 * MIB), resources=resources)
    with kubectl.asked(greedy, container(*FOREVER, name="beside")) as pod:
        kubectl.wait(
            lambda: any(one.get("lastState") for one in pod.status.get("containerStatuses", [])), "again"
        )
        last = pod.of()["lastState"]["terminated"]
        assert (last["reason"], last["exitCode"]) == ("OOMKilled", 137)
        assert pod.of("beside")["restartCount"] == 0


@pytest.mark.client(
    "kubectl create (what the kubelet measures (stats/summary, metrics/resource))",
    "works",
    "as of kubectl top",
)
def test_what_a_pod_uses_is_measured(kubectl: Kubectl, cluster: Cluster) -> None:
    with kubectl.pod(
        container("python3", "-c", HOLD.format(64 * MIB)), container(*FOREVER, name="idle")
    ) as pod:
        pod.wait_said("held")

        def summary() -> dict[str, Any]:
            pods = json.loads(cluster.of_kubelet("/stats/summary"))["pods"]
            found = [one for one in pods if one["podRef"]["name"] == pod.name]
            return found[0] if found else {}

        def used() -> dict[str, int]:
            return {
                one["name"]: one.get("memory", {}).get("workingSetBytes", 0)
                for one in summary().get("containers", [])
            }

        def of_pod(measured: dict[str, Any]) -> int:
            """From its cgroup, which is looked at every ten seconds or so."""
            return int(measured.get("memory", {}).get("workingSetBytes", 0))

        kubectl.wait(lambda: used().get("main", 0) > 64 * MIB, "it has been measured")
        assert used()["main"] < 110 * MIB
        assert 0 < used()["idle"] < 16 * MIB
        kubectl.wait(lambda: of_pod(summary()) > 64 * MIB, "the pod has been measured")
        whole = summary()
        assert of_pod(whole) < 1024 * MIB
        assert whole["cpu"]["usageCoreNanoSeconds"] > 0
        metrics = cluster.of_kubelet("/metrics/resource")
        for name in ("container_cpu_usage_seconds_total", "container_memory_working_set_bytes"):
            assert re.search(rf'^{name}{{container="main",.*pod="{pod.name}"}} [1-9]', metrics, re.M), metrics


@pytest.mark.client("kubectl patch --subresource resize", "works", "")
def test_a_container_is_resized_while_it_runs(kubectl: Kubectl) -> None:
    resources = {"requests": {"cpu": "200m"}, "limits": {"cpu": "400m"}}
    with kubectl.pod(container(*FOREVER, resources=resources)) as pod:
        change = {"spec": {"containers": [{"name": "main", "resources": {"limits": {"cpu": "800m"}}}]}}
        kubectl("patch", "pod", pod.name, "--subresource=resize", "--patch", json.dumps(change)).ok()
        kubectl.wait(lambda: pod.sh("cat /sys/fs/cgroup/cpu.max") == "80000 100000\n", "it has more")
        assert pod.of()["restartCount"] == 0


@pytest.mark.client("kubectl create (resources of the pod)", "works", "")
def test_limits_of_the_whole_pod(kubectl: Kubectl) -> None:
    whole = {"limits": {"memory": "300Mi", "cpu": "1"}}
    with kubectl.pod(container(*FOREVER), container(*FOREVER, name="beside"), resources=whole) as pod:
        assert int(value(pod, *POD_RAM)) == 300 * MIB + OVERHEAD
        in_all = int(pod.sh("grep MemTotal /proc/meminfo").split()[1]) << 10
        assert in_all > 300 * MIB, "its machine has not what its containers may have"


@pytest.mark.client(
    "kubectl create (the kubelet's podPidsLimit)", "differs", "holds for the VM's processes on the host"
)
def test_process_ids_of_the_pod_are_limited(kubectl: Kubectl) -> None:
    with kubectl.pod() as pod:
        assert int(value(pod, "pids.max")) == POD_PIDS
        assert 0 < int(value(pod, "pids.current")) < 100
