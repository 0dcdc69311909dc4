"""The config.json of a pod that is described by a kubelet's words alone."""

from __future__ import annotations

from typing import Any

import pytest

from config.load import load
from rpc.api import cri
from rpc.errors import CasemateError, InvalidArgument, Unimplemented
from shim import oci, sandbox
from shim.podconfig import document_of, files_of
from shim.wants import wants_of

ID = "0123456789abcdef"
NETNS = "/run/netns/cni-1"


def pod(**changes: Any) -> cri.PodSandboxConfig:
    metadata = cri.PodSandboxMetadata(name="web", uid="u-1", namespace="shop")
    return cri.PodSandboxConfig(metadata=metadata, hostname="keep", **changes)


def with_modes(**modes: Any) -> cri.PodSandboxConfig:
    options = cri.NamespaceOption(**modes)
    context = cri.LinuxSandboxSecurityContext(namespace_options=options)
    return pod(linux=cri.LinuxPodSandboxConfig(security_context=context))


def test_it_is_what_cri_writes_for_a_sandbox_container() -> None:
    resources = cri.LinuxContainerResources(memory_limit_in_bytes=1 << 30, cpu_quota=5, cpu_period=10)
    linux = cri.LinuxPodSandboxConfig(
        cgroup_parent="/kubepods/pod1", sysctls={"kernel.msgmax": "9"}, resources=resources
    )
    config = pod(linux=linux, annotations={"dev.casemate.vcpus": "2"})
    spec = oci.parse(document_of(config, ID, NETNS, {}, {}))
    assert sandbox.is_sandbox(spec)
    assert spec.hostname == "keep"
    assert spec.cgroups_path == f"/kubepods/pod1/{ID}"
    assert {each.type: each.path for each in spec.namespaces} == {
        **dict.fromkeys(("mount", "uts", "pid", "ipc"), ""),
        "network": NETNS,
    }
    assert sandbox.limits_of(spec) == oci.Limits(1 << 30, 5, 10)
    request = sandbox.pod_request(spec, ID, sandbox.GUEST_SHM)
    assert request.sysctls == {
        "kernel.msgmax": "9",
        "net.ipv4.ip_unprivileged_port_start": "0",
        "net.ipv4.ping_group_range": "0 2147483647",
    }
    told = {"name": "web", "uid": "u-1", "namespace": "shop", "id": ID, "memory": str(1 << 30)}
    told |= {"cpu-quota": "5", "cpu-period": "10", "cpu-shares": "0"}
    assert spec.annotations.items() >= {f"io.kubernetes.cri.sandbox-{key}": told[key] for key in told}.items()
    assert spec.annotations["dev.casemate.vcpus"] == "2"


def test_its_machine_is_like_that_of_any_pod_of_cris() -> None:
    wants = wants_of(document_of(pod(), ID, NETNS, {}, {}), load(), "k8s.io", ID)
    assert (wants.hostname, wants.owner) == ("keep", "shop")
    assert (wants.own_files, wants.shares_directories) == (False, True)


def test_what_a_pod_says_of_itself_does_not_make_it_another_pod() -> None:
    lies = {
        "io.kubernetes.cri.sandbox-id": "another",
        "io.kubernetes.cri.sandbox-namespace": "bank",
        "io.kubernetes.cri.container-type": "container",
    }
    spec = oci.parse(document_of(pod(annotations=lies), ID, NETNS, lies, {"annotations": lies}))
    assert sandbox.is_sandbox(spec)
    assert spec.annotations["io.kubernetes.cri.sandbox-id"] == ID
    assert spec.annotations["io.kubernetes.cri.sandbox-namespace"] == "shop"


def test_a_slice_is_named_as_systemd_names_it() -> None:
    config = pod(linux=cri.LinuxPodSandboxConfig(cgroup_parent="/kubepods.slice/kubepods-pod1.slice"))
    document = document_of(config, ID, NETNS, {}, {})
    assert document["linux"]["cgroupsPath"] == f"kubepods-pod1.slice:cri-containerd:{ID}"


def test_a_sysctl_of_the_pods_own_is_kept() -> None:
    own = {"net.ipv4.ip_unprivileged_port_start": "80"}
    config = pod(linux=cri.LinuxPodSandboxConfig(sysctls=own))
    assert document_of(config, ID, NETNS, {}, {})["linux"]["sysctl"] == {
        **own,
        "net.ipv4.ping_group_range": "0 2147483647",
    }


NODE, POD = cri.NamespaceMode.NODE, cri.NamespaceMode.POD


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (with_modes(network=NODE), "host network: not possible in a VM"),
        (with_modes(pid=NODE), "host PID namespace"),
        (with_modes(ipc=NODE), "host IPC namespace"),
    ],
)
def test_what_a_machine_cannot_have_is_refused_as_in_any_config(
    config: cri.PodSandboxConfig, words: str
) -> None:
    document = document_of(config, ID, "", {}, {})
    with pytest.raises(Unimplemented, match=words):
        wants_of(document, load(), "k8s.io", ID)


def test_a_pod_may_have_a_user_namespace() -> None:
    line = cri.IDMapping(host_id=300000, container_id=0, length=65536)
    users = cri.UserNamespace(mode=POD, uids=[line], gids=[line])
    spec = oci.parse(document_of(with_modes(userns_options=users), ID, NETNS, {}, {}))
    mapping = ((0, 300000, 65536),)
    assert spec.namespace("user") == oci.Namespace("user", "")
    assert spec.id_mappings == oci.IdMappings(mapping, mapping)
    assert "net.ipv4.ping_group_range" not in sandbox.pod_request(spec, ID, sandbox.GUEST_SHM).sysctls
    wants_of(spec.document, load(), "k8s.io", ID)
    nodes = cri.UserNamespace(mode=NODE)
    assert (
        oci.parse(document_of(with_modes(userns_options=nodes), ID, NETNS, {}, {})).namespace("user") is None
    )


def test_a_pod_of_windows_is_refused() -> None:
    with pytest.raises(Unimplemented, match="windows"):
        document_of(pod(windows=cri.WindowsPodSandboxConfig()), ID, "", {}, {})


def test_a_client_that_is_no_cri_may_bring_a_config_without_a_process() -> None:
    base = {"annotations": {"its": "2"}, "linux": {"sysctl": {"kernel.msgmax": "9"}}}
    document = document_of(None, ID, "", {"more": "1"}, base)
    spec = oci.parse(document)
    assert spec.annotations.items() >= {"its": "2", "more": "1"}.items()
    assert spec.hostname == ID[:12]
    assert document["linux"]["sysctl"] == {"kernel.msgmax": "9"}
    assert spec.namespace("network") == oci.Namespace("network", "")
    wants_of(document, load(), "default", ID)


def test_the_network_of_a_config_and_that_of_the_request_are_one() -> None:
    given = {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": NETNS}]}}
    document = document_of(None, ID, NETNS, {}, given)
    assert document["linux"]["namespaces"] == given["linux"]["namespaces"]
    with pytest.raises(InvalidArgument, match="/run/netns/other"):
        document_of(None, ID, "/run/netns/other", {}, given)


@pytest.mark.parametrize(
    "base", [{"linux": {"namespaces": "all"}}, {"linux": {"namespaces": ["x"]}}, {"annotations": []}]
)
def test_a_config_that_is_none_is_named(base: dict[str, Any]) -> None:
    with pytest.raises(CasemateError):
        document_of(None, ID, "", {}, base)


def test_files_of_the_containers() -> None:
    dns = cri.DNSConfig(servers=["10.0.0.1", "::1"], searches=["a.b", "b"], options=["ndots:5", "edns0"])
    assert files_of(pod(dns_config=dns), "keep") == {
        "/etc/hostname": "keep\n",
        "/etc/hosts": None,
        "/etc/resolv.conf": "search a.b b\nnameserver 10.0.0.1\nnameserver ::1\noptions ndots:5 edns0\n",
    }
    assert files_of(pod(), "keep")["/etc/resolv.conf"] is None
    assert files_of(pod(dns_config=cri.DNSConfig()), "keep")["/etc/resolv.conf"] == ""
