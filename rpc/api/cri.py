"""What a kubelet says of a pod to its runtime (runtime.v1 of k8s.io/cri-api), as far as containerd hands it
on: the options of a CreateSandboxRequest.
"""

from __future__ import annotations

from enum import IntEnum

from rpc.codec import (
    Message,
    boolean,
    enum_,
    int32,
    int64,
    int64s,
    message,
    messages,
    string,
    string_map,
    strings,
    uint32,
    uint64,
)

_PACKAGE = "runtime.v1."


class NamespaceMode(IntEnum):
    """Whose namespace: the pod's, each container's own, the host's, another container's."""

    POD = 0
    CONTAINER = 1
    NODE = 2
    TARGET = 3


class PodSandboxMetadata(Message, name=_PACKAGE + "PodSandboxMetadata"):
    name: str = string(1)
    uid: str = string(2)
    namespace: str = string(3)
    attempt: int = uint32(4)


class DNSConfig(Message, name=_PACKAGE + "DNSConfig"):
    """The lines of a resolv.conf, without their first words."""

    servers: list[str] = strings(1)
    searches: list[str] = strings(2)
    options: list[str] = strings(3)


class PortMapping(Message, name=_PACKAGE + "PortMapping"):
    """protocol: 0 TCP, 1 UDP, 2 SCTP."""

    protocol: int = enum_(1)
    container_port: int = int32(2)
    host_port: int = int32(3)
    host_ip: str = string(4)


class IDMapping(Message, name=_PACKAGE + "IDMapping"):
    host_id: int = uint32(1)
    container_id: int = uint32(2)
    length: int = uint32(3)


class UserNamespace(Message, name=_PACKAGE + "UserNamespace"):
    """mode: a NamespaceMode."""

    mode: int = enum_(1)
    uids: list[IDMapping] = messages(2, IDMapping)
    gids: list[IDMapping] = messages(3, IDMapping)


class NamespaceOption(Message, name=_PACKAGE + "NamespaceOption"):
    """network, pid, ipc: a NamespaceMode each; target_id: of the container that TARGET means."""

    network: int = enum_(1)
    pid: int = enum_(2)
    ipc: int = enum_(3)
    target_id: str = string(4)
    userns_options: UserNamespace | None = message(5, UserNamespace)


class SELinuxOption(Message, name=_PACKAGE + "SELinuxOption"):
    user: str = string(1)
    role: str = string(2)
    type: str = string(3)
    level: str = string(4)


class Int64Value(Message, name=_PACKAGE + "Int64Value"):
    value: int = int64(1)


class SecurityProfile(Message, name=_PACKAGE + "SecurityProfile"):
    """profile_type: 0 the runtime's default, 1 unconfined, 2 the node's file at localhost_ref."""

    profile_type: int = enum_(1)
    localhost_ref: str = string(2)


class LinuxSandboxSecurityContext(Message, name=_PACKAGE + "LinuxSandboxSecurityContext"):
    namespace_options: NamespaceOption | None = message(1, NamespaceOption)
    selinux_options: SELinuxOption | None = message(2, SELinuxOption)
    run_as_user: Int64Value | None = message(3, Int64Value)
    readonly_rootfs: bool = boolean(4)
    supplemental_groups: list[int] = int64s(5)
    privileged: bool = boolean(6)
    seccomp_profile_path: str = string(7)
    run_as_group: Int64Value | None = message(8, Int64Value)
    seccomp: SecurityProfile | None = message(9, SecurityProfile)
    apparmor: SecurityProfile | None = message(10, SecurityProfile)
    supplemental_groups_policy: int = enum_(11)


class HugepageLimit(Message, name=_PACKAGE + "HugepageLimit"):
    page_size: str = string(1)
    limit: int = uint64(2)


class LinuxContainerResources(Message, name=_PACKAGE + "LinuxContainerResources"):
    cpu_period: int = int64(1)
    cpu_quota: int = int64(2)
    cpu_shares: int = int64(3)
    memory_limit_in_bytes: int = int64(4)
    oom_score_adj: int = int64(5)
    cpuset_cpus: str = string(6)
    cpuset_mems: str = string(7)
    hugepage_limits: list[HugepageLimit] = messages(8, HugepageLimit)
    unified: dict[str, str] = string_map(9)
    memory_swap_limit_in_bytes: int = int64(10)


class LinuxPodSandboxConfig(Message, name=_PACKAGE + "LinuxPodSandboxConfig"):
    """overhead: the RuntimeClass's; resources: the sum of what the pod's containers may use."""

    cgroup_parent: str = string(1)
    security_context: LinuxSandboxSecurityContext | None = message(2, LinuxSandboxSecurityContext)
    sysctls: dict[str, str] = string_map(3)
    overhead: LinuxContainerResources | None = message(4, LinuxContainerResources)
    resources: LinuxContainerResources | None = message(5, LinuxContainerResources)


class WindowsNamespaceOption(Message, name=_PACKAGE + "WindowsNamespaceOption"):
    network: int = enum_(1)


class WindowsSandboxSecurityContext(Message, name=_PACKAGE + "WindowsSandboxSecurityContext"):
    run_as_username: str = string(1)
    credential_spec: str = string(2)
    host_process: bool = boolean(3)
    namespace_options: WindowsNamespaceOption | None = message(4, WindowsNamespaceOption)


class WindowsPodSandboxConfig(Message, name=_PACKAGE + "WindowsPodSandboxConfig"):
    security_context: WindowsSandboxSecurityContext | None = message(1, WindowsSandboxSecurityContext)


class PodSandboxConfig(Message, name=_PACKAGE + "PodSandboxConfig"):
    """dns_config: None means the node's own resolv.conf."""

    metadata: PodSandboxMetadata | None = message(1, PodSandboxMetadata)
    hostname: str = string(2)
    log_directory: str = string(3)
    dns_config: DNSConfig | None = message(4, DNSConfig)
    port_mappings: list[PortMapping] = messages(5, PortMapping)
    labels: dict[str, str] = string_map(6)
    annotations: dict[str, str] = string_map(7)
    linux: LinuxPodSandboxConfig | None = message(8, LinuxPodSandboxConfig)
    windows: WindowsPodSandboxConfig | None = message(9, WindowsPodSandboxConfig)
