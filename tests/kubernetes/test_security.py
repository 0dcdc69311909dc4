"""What a pod may do, and what it may not have."""

from typing import Any

import pytest

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.kubectl import FOREVER, Kubectl, container
from tests.vm.pods import MOUNT


@pytest.mark.client(
    "kubectl create (securityContext (users, groups, capabilities, seccomp, read-only root))",
    "works",
    "in the guest",
)
def test_security_contexts_hold(kubectl: Kubectl) -> None:
    context = {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
        "runAsNonRoot": True,
    }
    of_pod = {"runAsUser": 1000, "runAsGroup": 1001, "fsGroup": 1002, "supplementalGroups": [1003]}
    mounts = [{"name": "disk", "mountPath": "/disk"}]
    with kubectl.pod(
        container(*FOREVER, securityContext=context, volumeMounts=mounts),
        volumes=[{"name": "disk", "emptyDir": {}}],
        securityContext=of_pod,
    ) as pod:
        assert pod.sh("id -u; id -g").split() == ["1000", "1001"]
        assert {"1001", "1002", "1003"} == set(pod.sh("id -G").split())
        pod.sh("touch /disk/mine")
        assert pod.sh("stat -c '%u %g' /disk/mine") == "1000 1002\n"
        assert "Read-only file system" in pod.exec("touch", "/new").err
        status = pod.sh("grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/self/status")
        found = dict(line.split(":\t") for line in status.splitlines())
        assert found == {"CapEff": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}


@pytest.mark.client(
    "kubectl create (securityContext.privileged)", "differs", "in its own VM, without the host's devices"
)
def test_a_privileged_container_is_so_in_its_machine(kubectl: Kubectl) -> None:
    with kubectl.pod(container(*FOREVER, securityContext={"privileged": True})) as pod:
        assert pod.exec("python3", "-c", MOUNT).code == 0
        assert "No such file" in pod.exec("ls", "/dev/kvm").err


@pytest.mark.client(
    "kubectl create (securityContext.sysctls)", "works", "the kubelet allows them as on any node"
)
def test_sysctls(kubectl: Kubectl) -> None:
    sysctls = [
        {"name": "net.core.somaxconn", "value": "1234"},
        {"name": "net.ipv4.ip_local_port_range", "value": "20000 30000"},
        {"name": "kernel.shm_rmid_forced", "value": "1"},
    ]
    with kubectl.pod(securityContext={"sysctls": sysctls}) as pod:
        paths = " ".join(f"/proc/sys/{item['name'].replace('.', '/')}" for item in sysctls)
        assert pod.sh(f"cat {paths}").split() == ["1234", "20000", "30000", "1"]


@pytest.mark.client("kubectl create (shareProcessNamespace)", "works", "")
def test_containers_may_see_each_others_processes(kubectl: Kubectl) -> None:
    pair = (container("sleep", "1111"), container("sleep", "2222", name="other"))
    with kubectl.pod(*pair, shareProcessNamespace=True) as pod:
        assert {"sleep 1111", "sleep 2222"} <= set(pod.sh("ps -eo args=").splitlines())


@pytest.mark.client("kubectl create (hostUsers: false)", "works", "volumes are mounted with mapped IDs")
def test_a_pod_has_users_of_its_own(kubectl: Kubectl, cluster: Cluster) -> None:
    """Its root is nobody's, and writes as root to what the kubelet gives it."""
    volumes = [
        {"name": "disk", "emptyDir": {}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
        {
            "name": "about",
            "downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]},
        },
    ]
    mounts = [{"name": volume["name"], "mountPath": f"/{volume['name']}"} for volume in volumes]
    pair = (
        container(*FOREVER, volumeMounts=mounts, securityContext={"capabilities": {"add": ["NET_ADMIN"]}}),
        container(*FOREVER, volumeMounts=mounts, name="other", securityContext={"runAsUser": 1000}),
    )
    with kubectl.pod(*pair, volumes=volumes, hostUsers=False) as pod:
        inside, outside, size = pod.sh("cat /proc/self/uid_map").split()
        assert (inside, size) == ("0", "65536")
        assert int(outside) >= 65536
        assert pod.sh("cat /about/name") == pod.name
        pod.sh("ip address add 10.9.8.7/32 dev lo; touch /disk/roots /memory/roots; chmod 777 /disk /memory")
        pod.sh("touch /disk/users /memory/users", container="other")
        seen = "stat -c %u /disk/roots /memory/roots /disk/users /memory/users; readlink /proc/self/ns/user"
        seen_by = [pod.sh(seen, container=name).split() for name in ("main", "other")]
        assert seen_by[0] == seen_by[1]
        assert seen_by[0][:4] == ["0", "0", "1000", "1000"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hostNetwork": ({"hostNetwork": True}, "host network: not possible in a VM"),
    "hostPID": ({"hostPID": True}, "host PID namespace: not possible in a VM"),
    "hostIPC": ({"hostIPC": True}, "host IPC namespace: not possible in a VM"),
}


@pytest.mark.client("kubectl create (hostNetwork, hostPID, hostIPC)", "refused", "an event says why")
@pytest.mark.parametrize("kind", list(REFUSED))
def test_what_a_machine_cannot_give_is_said_in_an_event(kubectl: Kubectl, kind: str) -> None:
    spec, words = REFUSED[kind]
    with kubectl.asked(**spec) as pod:
        assert "FailedCreatePodSandBox" in pod.wait_event(words)


@pytest.mark.client("kubectl create (mountPropagation, hostPath of a socket)", "refused", "an event says why")
def test_volumes_that_do_not_reach_a_machine(kubectl: Kubectl, cluster: Cluster) -> None:
    here = str(cluster.instance.work)
    cluster.on_node(
        "mount", "--bind", "--make-shared", here, here
    )  # what containerd wants, before it asks us
    directory = {"name": "here", "hostPath": {"path": here}}
    socket = {"name": "socket", "hostPath": {"path": "/run/containerd/containerd.sock", "type": "Socket"}}
    with (
        kubectl.asked(
            container(
                *FOREVER,
                volumeMounts=[{"name": "here", "mountPath": "/here", "mountPropagation": "HostToContainer"}],
            ),
            volumes=[directory],
        ) as one,
        kubectl.asked(
            container(*FOREVER, volumeMounts=[{"name": "socket", "mountPath": "/socket"}]), volumes=[socket]
        ) as two,
    ):
        assert "propagation" in one.wait_event("propagation")
        assert "socket" in two.wait_event("its other end is on the host")
    cluster.on_node("umount", here)
