"""What a pod wants of its machine: from the first container's config.json and the operator's settings.

Two pods that want the same can be given the same machine. It must not know where machines come from.
"""

from dataclasses import dataclass
from pathlib import Path

from config import annotations, places
from config.settings import Profile, Settings
from shim import oci, sandbox, sizing, spec
from shim.apprentice import TENANT_ANNOTATION, tenant_of
from shim.devicewishes import NO_DEVICES, DeviceWishes, wishes_of
from shim.paths import PodPaths
from shim.vm.setting import MachineRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.giving import Given


@dataclass(frozen=True, slots=True)
class Wants:
    """tenant: whose templates may serve it. own_files, shares_directories: as the functions of spec.py have
    it. hostname alone is no matter of the machine's making, and owner, who has the devices. What has devices
    does not come from the pool. kubelet_pod: namespace and name, by which a kubelet may know of more
    devices (kubelet.py).
    """

    profile: Profile
    tenant: str
    own_files: bool
    shares_directories: bool
    hostname: str
    devices: DeviceWishes = NO_DEVICES
    owner: str = ""
    kubelet_pod: tuple[str, str] | None = None

    def request(
        self, pod_id: str, settings: Settings, paths: PodPaths, given: "Given | None" = None
    ) -> MachineRequest:
        return MachineRequest(
            pod_id=pod_id,
            hostname=self.hostname,
            profile=self.profile,
            settings=settings,
            paths=paths,
            cache=Path(places.cache_dir()),
            tenant=self.tenant,
            own_files=self.own_files,
            shares_directories=self.shares_directories,
            functions=given.functions if given else (),
            backing=given.backing if given and given.functions else None,
            pinning=given.pinning if given else None,
        )


def wants_of(
    document: object,
    settings: Settings,
    namespace: str,
    pod_id: str,
    room: "Callable[[], int | None]" = lambda: None,
) -> Wants:
    """document: config.json, or None if the bundle has none. namespace: containerd's. room: what the pod's
    cgroup may have, as sizing.grown() has it.

    Raises InvalidArgument, PermissionDenied, or Unimplemented as spec.refuse_host_access().
    """
    wanted = oci.parse(document if document is not None else {})
    spec.refuse_host_access(wanted)
    profile = annotations.apply(settings, settings.profiles[settings.default_profile], wanted.annotations)
    profile = sizing.grown(
        profile,
        sandbox.pod_limits(wanted),
        vcpus=annotations.VCPUS not in wanted.annotations,
        memory=annotations.MEMORY not in wanted.annotations,
        room=room,
    )
    return Wants(
        profile=profile,
        tenant=tenant_of(profile, namespace, wanted.annotations),
        own_files=spec.has_own_files(wanted),
        shares_directories=spec.shares_directories(wanted),
        hostname=wanted.hostname or pod_id[:12],
        devices=wishes_of(spec.as_asked(wanted)),
        owner=wanted.annotations.get(TENANT_ANNOTATION, ""),
        kubelet_pod=sandbox.kubelet_pod(wanted),
    )
