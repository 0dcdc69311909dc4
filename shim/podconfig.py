"""The config.json of a pod that comes without one, by containerd's Sandbox API: from what a kubelet says.

The same that containerd's CRI writes for a sandbox container, so that whatever reads one need not know which
way a pod came (sandbox.py). Pure. CRI's rules: containerd's podsandbox/sandbox_run_linux.go.
"""

import posixpath
from collections.abc import Mapping

from rpc.api.cri import (
    DNSConfig,
    IDMapping,
    LinuxPodSandboxConfig,
    NamespaceMode,
    NamespaceOption,
    PodSandboxConfig,
    UserNamespace,
)
from rpc.errors import InvalidArgument, Unimplemented
from shim import oci
from shim.apprentice import TENANT_ANNOTATION
from shim.bootstrap import CONTAINER_TYPE
from shim.oci import Document
from shim.sandbox import SANDBOX

_CRI = "io.kubernetes.cri."
HOSTNAME, HOSTS, RESOLV_CONF = "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"
# containerd 2 gives them to every pod with a network of its own (enable_unprivileged_ports, _icmp), if its
# configuration, which a shim is not told, is the usual one.
UNPRIVILEGED = {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"}


def document_of(
    config: PodSandboxConfig | None,
    sandbox_id: str,
    netns_path: str,
    annotations: Mapping[str, str],
    base: Document,
) -> Document:
    """config: None where the client is no CRI. base: a config.json without a process, or nothing.

    netns_path: "" for a network of the pod's own. Raises InvalidArgument, or Unimplemented for a pod that
    is not one of Linux.
    """
    spec = oci.parse(base)
    said = config or PodSandboxConfig()
    if said.windows is not None:
        raise Unimplemented("windows: a pod of Windows")
    linux_said = said.linux or LinuxPodSandboxConfig()
    metadata = said.metadata
    linux = dict(base.get("linux") or {})
    linux["namespaces"] = _namespaces(linux_said, netns_path, linux.get("namespaces") or [])
    linux |= _id_mappings(linux_said)
    if parent := linux_said.cgroup_parent:
        linux["cgroupsPath"] = _cgroup(parent, sandbox_id)
    sysctls = {**oci.typed(linux.get("sysctl") or {}, dict, "linux.sysctl"), **linux_said.sysctls}
    linux["sysctl"] = {**_usual_sysctls(linux_said), **sysctls} if config else sysctls
    known = {**spec.annotations, **annotations, **said.annotations}
    if metadata is not None:
        known |= {
            f"{_CRI}sandbox-name": metadata.name,
            f"{_CRI}sandbox-uid": metadata.uid,
            TENANT_ANNOTATION: metadata.namespace,
        }
    if (resources := linux_said.resources) is not None:
        known |= {
            f"{_CRI}sandbox-cpu-period": str(resources.cpu_period),
            f"{_CRI}sandbox-cpu-quota": str(resources.cpu_quota),
            f"{_CRI}sandbox-cpu-shares": str(resources.cpu_shares),
            f"{_CRI}sandbox-memory": str(resources.memory_limit_in_bytes),
        }
    known |= {f"{_CRI}sandbox-id": sandbox_id, CONTAINER_TYPE: SANDBOX}
    return {
        **base,
        "hostname": said.hostname or spec.hostname or sandbox_id[:12],
        "annotations": known,
        "linux": linux,
    }


def _usual_sysctls(said: LinuxPodSandboxConfig) -> dict[str, str]:
    """Not all of these groups are in a user namespace, where containerd says nothing of any."""
    if _users(said) is None:
        return UNPRIVILEGED
    return {name: value for name, value in UNPRIVILEGED.items() if "ping_group" not in name}


def _users(said: LinuxPodSandboxConfig) -> UserNamespace | None:
    """None where the pod has none of its own."""
    context = said.security_context
    users = (context.namespace_options or NamespaceOption()).userns_options if context else None
    return None if users is None or users.mode == NamespaceMode.NODE else users


def _id_mappings(said: LinuxPodSandboxConfig) -> Document:
    """linux.uidMappings and gidMappings, if it has a user namespace."""

    def ranges(given: list[IDMapping]) -> list[Document]:
        return [
            {"containerID": line.container_id, "hostID": line.host_id, "size": line.length} for line in given
        ]

    users = _users(said)
    return {} if users is None else {"uidMappings": ranges(users.uids), "gidMappings": ranges(users.gids)}


def _namespaces(said: LinuxPodSandboxConfig, netns_path: str, given: object) -> list[Document]:
    """One that is left out is the host's, which sandbox.py and spec.py refuse by name."""
    context = said.security_context
    modes = (context.namespace_options if context else None) or NamespaceOption()
    network = {"type": "network", "path": netns_path} if netns_path else {"type": "network"}
    if given:
        kept = oci.typed(given, list, "linux.namespaces")
        for entry in kept:
            namespace = oci.typed(entry, dict, "linux.namespaces[]")
            if namespace.get("type") == "network" and namespace.get("path", "") not in ("", netns_path):
                raise InvalidArgument(
                    f"network namespace {netns_path!r}: config.json names {namespace['path']!r}"
                )
        return [network if entry.get("type") == "network" else entry for entry in kept]
    wanted = [{"type": "mount"}, {"type": "uts"}]
    if modes.network != NamespaceMode.NODE:
        wanted.append(network)
    for kind, mode in (("pid", modes.pid), ("ipc", modes.ipc)):
        if mode != NamespaceMode.NODE:
            wanted.append({"type": kind})
    if _users(said) is not None:
        wanted.append({"type": "user"})
    return wanted


def _cgroup(parent: str, sandbox_id: str) -> str:
    """linux.cgroupsPath of a container below the pod's, in the form that the parent has."""
    name = posixpath.basename(parent)
    return f"{name}:cri-containerd:{sandbox_id}" if name.endswith(".slice") else f"{parent}/{sandbox_id}"


def files_of(config: PodSandboxConfig, hostname: str) -> dict[str, str | None]:
    """What a pod's containers find at these places: the text, or None for a copy of the host's own."""
    dns = config.dns_config
    return {
        HOSTNAME: f"{hostname}\n",
        HOSTS: None,
        RESOLV_CONF: None if dns is None else _resolv_conf(dns),
    }


def _resolv_conf(dns: DNSConfig) -> str:
    """resolv.conf(5)."""
    lines = [f"nameserver {server}" for server in dns.servers]
    if dns.searches:
        lines.insert(0, f"search {' '.join(dns.searches)}")
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return "".join(f"{line}\n" for line in lines)
