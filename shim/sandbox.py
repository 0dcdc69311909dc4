"""The sandbox container of a Kubernetes pod, as containerd's CRI has it, and what its other containers share.

Its program (pause) is not run: the VM is what holds the pod. Pure but for one look at the sandbox's /dev/shm.
It must not know of machines, nor how a container is made. Names: containerd's pkg/cri/annotations.
"""

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field

from rpc.api import agent as api
from rpc.errors import InvalidArgument, Unimplemented
from shim.bootstrap import CONTAINER_TYPE
from shim.oci import Limits, Namespace, Spec, limited, parse, typed
from shim.process import KILLED

SANDBOX = "sandbox"
SHM = "/dev/shm"
GUEST_SHM = "/run/casemate/pod/shm"
SHM_BYTES = 64 << 20  # as CRI mounts it (defaultShmSize)
_STATUS_AFTER: dict[int, int] = {signal.SIGKILL: KILLED, signal.SIGTERM: 0, signal.SIGINT: 0}
_SANDBOX = "io.kubernetes.cri.sandbox-"
_CONTAINER_NAME = "io.kubernetes.cri.container-name"
_NAMESPACE = re.compile(r"/proc/([1-9][0-9]{0,9})/ns/([a-z]+)")
# The guest's own are its pod's. A sandbox's PID namespace is one that the agent makes when it is asked for.
OF_THE_GUEST = frozenset(("ipc", "uts"))


@dataclass(frozen=True, slots=True)
class Siblings:
    """The containers that a pod has when another is made: `pids` leads from those that clients know to ids.

    sandbox: the id of its sandbox container; shm: the directory of the host's that is this one's /dev/shm, or
    GUEST_SHM where the host has none. Either is "" where the pod is none of CRI's. gives: files of the host's
    that the pod has for its containers, by where they are to be; None where the client sees to them itself.
    asked: what the pod's first container has said of its VM (config/annotations.py).
    """

    pids: Mapping[int, str] = field(default_factory=dict)
    sandbox: str = ""
    shm: str = ""
    gives: Mapping[str, str] | None = None
    asked: Mapping[str, str] = field(default_factory=dict)

    def joined(self, namespace: Namespace) -> str | None:
        """The id of the container whose namespace it is; None if it is none of this pod's.

        CRI names it by the pid that it was told (/proc/PID/ns/KIND), which is an anchor's. Anchors are in the
        host's namespaces of these kinds: the path stands for the container, and is never opened.
        """
        match = _NAMESPACE.fullmatch(namespace.path)
        if match is None or match[2] != namespace.type:
            return None
        return self.pids.get(int(match[1]))


ALONE = Siblings()


def is_sandbox(spec: Spec) -> bool:
    return spec.annotations.get(CONTAINER_TYPE) == SANDBOX


def kubelet_pod(spec: Spec) -> tuple[str, str] | None:
    """Namespace and name of the pod that a kubelet may know, as CRI was told them; None for any other's."""
    namespace, name = (spec.annotations.get(f"{_SANDBOX}{what}", "") for what in ("namespace", "name"))
    return (namespace, name) if is_sandbox(spec) and namespace and name else None


def container_name(spec: Spec) -> str:
    """What the kubelet calls a container of a pod, as CRI was told; "" for any other's."""
    return "" if is_sandbox(spec) else spec.annotations.get(_CONTAINER_NAME, "")


def status_after(number: int) -> int | None:
    """How a sandbox ends that is sent this signal, as the pause program does; None if it does not.

    The first process of a PID namespace is ended by what it waits for, and by SIGKILL from without.
    """
    return _STATUS_AFTER.get(number)


def shm_of(spec: Spec) -> str:
    """The host's directory that CRI mounted for the sandbox's /dev/shm, or ""."""
    sources = (mount.source for mount in spec.mounts if mount.is_bind and mount.destination == SHM)
    return next(sources, "") if is_sandbox(spec) else ""


def limits_of(spec: Spec) -> Limits:
    """What the kubelet says that the containers of the pod may use together. Raises InvalidArgument."""

    def number(name: str) -> int:
        text = spec.annotations.get(f"{_SANDBOX}{name}", "")
        if not text:
            return 0
        try:
            return limited(int(text), f"annotation {_SANDBOX}{name}")
        except ValueError as error:
            raise InvalidArgument(f"annotation {_SANDBOX}{name}: {text!r} is no number") from error

    return Limits(number("memory"), number("cpu-quota"), number("cpu-period"))


def pod_limits(spec: Spec) -> Limits:
    """Of the pod that begins with this container: a sandbox stands for all that are to come. Raises
    InvalidArgument."""
    return limits_of(spec) if is_sandbox(spec) else spec.limits


def furnished(spec: Spec, siblings: Siblings) -> Spec:
    """The container with what its pod gives it, where its client has put nothing; with the pod's /dev/shm if
    it shares the sandbox's IPC namespace. Raises InvalidArgument.
    """
    if siblings.gives is None:
        return spec
    taken = {mount.destination for mount in spec.mounts}
    mounts = list(spec.document.get("mounts") or ())
    access = "ro" if spec.readonly else "rw"
    for place, source in siblings.gives.items():
        if place not in taken:
            options = ["rbind", "rprivate", access]
            mounts.append({"destination": place, "type": "bind", "source": source, "options": options})
    ipc = spec.namespace("ipc")
    own = [mount for mount in spec.mounts if mount.destination == SHM]
    if ipc is not None and siblings.joined(ipc) == siblings.sandbox and not any(m.is_bind for m in own):
        mounts = [entry for entry in mounts if entry.get("destination") != SHM]
        mounts.append({"destination": SHM, "type": "bind", "source": siblings.shm, "options": ["rbind"]})
    return parse({**spec.document, "mounts": mounts})


def pod_request(spec: Spec, container_id: str, shm: str) -> api.MakePodRequest:
    """What the guest is to make for the pod. shm: as in Siblings. Raises InvalidArgument."""
    linux = spec.document.get("linux") or {}
    sysctls = typed(linux.get("sysctl") or {}, dict, "linux.sysctl")
    return api.MakePodRequest(
        container_id=container_id,
        shm_path=GUEST_SHM if shm else "",
        shm_bytes=_size_bytes(shm) if shm else 0,
        sysctls={name: typed(value, str, f"linux.sysctl[{name!r}]") for name, value in sysctls.items()},
    )


def _size_bytes(directory: str) -> int:
    """Of the file system that CRI has mounted there: the size is nowhere in what it asks for."""
    if directory == GUEST_SHM:
        return SHM_BYTES
    try:
        about = os.statvfs(directory)
    except OSError as error:
        raise InvalidArgument(f"mount {SHM}: source {directory}: {error.strerror}") from error
    return about.f_blocks * about.f_frsize


def has_pods_users(spec: Spec, siblings: Siblings) -> bool:
    """Whether its user namespace is that to which all belongs that the pod has in common: a sandbox's, or its
    first container's own.

    A sandbox may name one of the host's by a path (containerd 2 has made it for the network namespace): in
    the guest there is another one of the same mappings.
    """
    users = spec.namespace("user")
    return users is not None and (is_sandbox(spec) or not (users.path or siblings.pids))


def guest_namespaces(spec: Spec, siblings: Siblings) -> list[dict[str, str]]:
    """linux.namespaces for the guest's runtime: new ones, and those of the pod's other containers.

    The VM is the pod's network namespace, and its own IPC and UTS namespaces are what a sandbox's containers
    share. Raises Unimplemented for a path that leads out of the pod.
    """
    kinds: dict[str, str] = {}
    for entry in spec.namespaces:
        if entry.type == "network":
            continue
        if entry.type == "user" and has_pods_users(spec, siblings):
            kinds.setdefault(entry.type, api.POD_USERS)
            continue
        joined = joined_or_refused(entry, siblings) if entry.path else None
        if joined and joined == siblings.sandbox and entry.type in OF_THE_GUEST:
            continue
        if joined and joined == siblings.sandbox and entry.type == "user":
            joined = ""
            kinds.setdefault(entry.type, api.POD_USERS)
        kinds.setdefault(entry.type, f"{api.NAMESPACES}/{joined}/{entry.type}" if joined else "")
    # containerd asks for it on hosts with cgroups v2 only; the guest always has v2, where a container
    # without one would see the guest's whole tree.
    kinds.setdefault("cgroup", "")
    return [{"type": kind, "path": path} if path else {"type": kind} for kind, path in kinds.items()]


def joined_or_refused(entry: Namespace, siblings: Siblings) -> str:
    """Raises Unimplemented, naming the namespace."""
    joined = siblings.joined(entry)
    if joined is None:
        raise Unimplemented(
            f"{entry.type} namespace {entry.path}: a VM's container cannot join the host's",
            hint="containers that share a namespace must be in one pod: of one in another's network "
            "(--network container:X) they are",
        )
    return joined
