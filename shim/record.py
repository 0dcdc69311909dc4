"""What is written down of a pod for other processes to read: state.json, which `casemate ps` shows.

The fields are a promise to the command line and to scripts. Of the shim, joining.py alone reads them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from config.settings import Profile
from shim.container import Container
from shim.namespaces import HostNamespaces
from shim.paths import pod_key
from shim.vm.guest import Machine


@dataclass(frozen=True, slots=True)
class Identity:
    """namespace is containerd's. pid and start_time are the shim's, as the host counts them.

    host_proc: a directory descriptor of the host's /proc. host: None where the shim has left none.
    """

    namespace: str
    pod_id: str
    pid: int
    start_time: int
    host_proc: int
    host: HostNamespaces | None = None


def describe(
    identity: Identity,
    state: str,
    machine: Machine | None,
    profile: Profile | None,
    containers: Iterable[Container],
    error: str | None,
) -> dict[str, Any]:
    """state: starting, running, stopping or ended. Pids are the host's, 0 for what does not run."""
    facts = machine.facts if machine else None
    backing = facts.backing if facts else None
    pinning = facts.pinning if facts else None
    return {
        "namespace": identity.namespace,
        "id": identity.pod_id,
        "key": pod_key(identity.namespace, identity.pod_id),
        "pid": identity.pid,
        "start_time": identity.start_time,
        "state": state,
        "error": error,
        "profile": profile.name if profile else "",
        "vcpus": profile.vcpus if profile else 0,
        "cpus": list(pinning.vcpus) if pinning else [],
        "emulator_cpus": list(pinning.emulator) if pinning else [],
        "memory_bytes": profile.memory_bytes if profile else 0,
        "image": profile.image if profile else "",
        "image_digest": facts.image_digest if facts else "",
        "source": facts.source if facts else "",
        "accel": facts.accel.kind if facts else "",
        "accel_reason": facts.accel.reason if facts else "",
        "transport": facts.transport if facts else "",
        "files": facts.files if facts else "",
        "kernel_release": facts.kernel_release if facts else "",
        "memory_used_bytes": facts.memory_used_bytes if facts else 0,
        "qemu_pid": machine.qemu.host_pid(identity.host_proc) if machine else 0,
        "virtiofsd_pid": machine.files.host_pid(identity.host_proc) if machine else 0,
        "devices": [
            {
                "address": each.address,
                "title": each.title,
                "kind": each.kind,
                "group": each.group,
                "port": each.port,
                "function": each.function,
                "node": each.node,
                "gone": machine is not None and each.address in machine.gone,
            }
            for each in (facts.devices if facts else ())
        ],
        "device_access": facts.access.way if facts and facts.access else "",
        "device_access_reason": facts.access.why if facts and facts.access else "",
        "hugepage_bytes": backing.page_bytes if backing else 0,
        "hugepage_reason": backing.why if backing else "",
        "nodes": [cell.host for cell in backing.cells] if backing else [],
        "containers": [
            {
                "id": container.id,
                "state": container.init.state.name,
                "pid": container.pid,
                "exit_status": getattr(container.init.state, "exit_status", None),
            }
            for container in containers
        ],
    }
