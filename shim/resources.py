"""What a container is limited to: what its guest can give of it, and what only the host could.

Pure, as spec.py: from the OCI runtime specification's linux.resources to those that the guest's runtime
gets, and lines about the rest. It must not know what a machine is made of.
"""

from config import annotations
from config.settings import Profile
from rpc.api.cgroups import Metrics
from rpc.errors import DataLoss, InvalidArgument
from shim import sizing
from shim.fields import Table, leave_out, refuse
from shim.oci import Document, Limits

WHERE = "linux.resources."
_DEVICE = "the device is the host's, and the container's files are not on it in the VM"
_CPUS = "the numbers are those of the host's CPUs, and the VM's are not pinned to any"
_NODES = "the numbers are those of the host's memory nodes, and the VM's memory is not pinned to any"
_FILES = "the VM reads and writes files through a process of the host's"
REFUSED: Table = (
    ("blockIO.throttleReadBpsDevice", _DEVICE),
    ("blockIO.throttleWriteBpsDevice", _DEVICE),
    ("blockIO.throttleReadIOPSDevice", _DEVICE),
    ("blockIO.throttleWriteIOPSDevice", _DEVICE),
    ("blockIO.weightDevice", _DEVICE),
    ("network", "cgroups v2, which the guest has, know no such thing"),
    ("rdma", "the host's RDMA devices are not in the VM"),
)
# A kubelet with static CPUs sets some of these for every container: to refuse them would be to refuse it.
LEFT_OUT: Table = (
    ("cpu.cpus", _CPUS),
    ("cpu.mems", _NODES),
    ("unified.cpuset.cpus", _CPUS),
    ("unified.cpuset.mems", _NODES),
    ("blockIO.weight", _FILES),
    ("blockIO.leafWeight", _FILES),
)
MIB = 1 << 20


def for_guest(resources: Document) -> tuple[Document, tuple[str, ...]]:
    """What the guest's runtime gets, and a line for each limit that is left out.

    Raises Unimplemented, by name, for a limit that nothing would hold.
    """
    refuse(resources, REFUSED, WHERE)
    return leave_out(resources, LEFT_OUT, WHERE)


def beyond(limits: Limits, profile: Profile) -> tuple[str, ...]:
    """A line for each limit that a VM of this shape cannot reach, with the way to a larger one."""
    lines = []
    if limits.memory_bytes > profile.memory_bytes:
        lines.append(
            f"{WHERE}memory.limit is {limits.memory_bytes // MIB} MiB, but the whole VM has "
            f"{profile.memory_bytes // MIB} MiB: {_larger(annotations.MEMORY)}"
        )
    cpus = sizing.cpus(limits)
    if cpus > profile.vcpus:
        lines.append(
            f"{WHERE}cpu.quota is {cpus:g} CPUs, but the whole VM has {profile.vcpus}: "
            f"{_larger(annotations.VCPUS)}"
        )
    return tuple(lines)


def _larger(annotation: str) -> str:
    return f"annotate the pod with {annotation}, or with {annotations.PROFILE} for a larger profile"


def made_anew(metrics: bytes) -> bytes:
    """A guest's statistics (io.containerd.cgroups.v2.Metrics), of what was understood of them: containerd and
    its clients parse no byte of the guest's. Raises DataLoss."""
    try:
        return Metrics.decode(metrics).encode()
    except InvalidArgument as error:
        raise DataLoss("the guest's statistics cannot be read", details=error.brief) from error
