"""What a container asks of its host, turned into what it asks of its guest, or refused by name.

Pure: from a Spec to a document for the guest's runtime and a list of what must be shared with it.
It mounts nothing and must not know how files get into a guest.
"""

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace

from rpc.errors import InvalidArgument, Unimplemented
from shim import resources, users
from shim.blockdevices import BLOCK, BlockDevice, asked_for, may_use_all, without_rules
from shim.bootstrap import GROUP_ANNOTATIONS
from shim.devicewishes import DeviceWishes, is_vfio, wishes_of
from shim.fields import Table, leave_out, refuse
from shim.hookserver import HOST_HOOKS
from shim.oci import UNMAPPED, Device, Document, Hook, IdMappings, Mount, Spec
from shim.sandbox import ALONE, GUEST_SHM, Siblings, guest_namespaces, has_pods_users, joined_or_refused

GUEST_SHARE = "/run/casemate/shared"

# Every OCI runtime makes these itself (runtime-spec, config-linux.md, "Default Devices"): asking for
# them is no request.
DEFAULT_DEVICES = frozenset(
    f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx")
)

# Character devices that are one of every kernel's own, by numbers that all kernels have (devices.txt): a
# container gets the guest's.
GUEST_DEVICES = {"fuse": (10, 229), "net/tun": (10, 200)}

# What sharing the host's would mean, and why a VM cannot.
HOST_NAMESPACES = {
    "network": (
        "host network",
        "a VM has a network stack of its own; run without --net-host / --network=host / hostNetwork",
    ),
    "pid": ("host PID namespace", "the host's processes are not in the VM; run without --pid=host / hostPID"),
    "ipc": (
        "host IPC namespace",
        "the host's IPC objects are not in the VM; run without --ipc=host / hostIPC",
    ),
    "uts": ("host UTS namespace", "a VM has a host name of its own; run without --uts=host"),
}

# File systems of no device and no server ("nodev" of /proc/filesystems), which show what the kernel itself
# has, or are memory: a container gets the guest's. Whether its kernel has them, the agent says.
KERNELS_OWN = frozenset(
    "proc sysfs tmpfs ramfs devtmpfs devpts mqueue cgroup cgroup2 hugetlbfs bpf debugfs tracefs securityfs"
    " configfs fusectl binfmt_misc pstore efivarfs".split()
)

# The namespaces that a guest's runtime makes for a container; a path would be one of the host's.
GUEST_NAMESPACES = ("pid", "ipc", "uts", "mount", "user", "cgroup", "time")

# crun before 1.9 reads over a field that it does not know: nothing is left to it that guests may lack.
REFUSED: Table = (
    ("linux.intelRdt", "the host's caches and memory bandwidth are not in the VM"),
    ("linux.memoryPolicy", "the host's memory nodes are not in the VM"),
    ("linux.netDevices", "the host's network devices are not in the VM"),
    ("linux.timeOffsets", "not every guest image's runtime knows it"),
    ("vm", "casemate's configuration and annotations say what a VM is made of"),
)
REFUSED_OF_PROCESSES: Table = (
    ("execCPUAffinity", "the host's CPUs are not in the VM"),
    ("ioPriority", "not every guest image's runtime knows it"),
    ("scheduler", "not every guest image's runtime knows it"),
)
_NO_POLICY = "the guest kernel has no such policy; the VM confines instead"
NEEDLESS: Table = (("mountLabel", _NO_POLICY),)
NEEDLESS_OF_PROCESSES: Table = (("apparmorProfile", _NO_POLICY), ("selinuxLabel", _NO_POLICY))

# Those that crun runs (config.md, "POSIX-platform Hooks"): the runtime's namespace, where the program of a
# createContainer hook lies, is the guest's.
GUEST_HOOKS = frozenset(("createContainer", "startContainer"))

# By which a client's --gpus gives a container what the host's driver has made, from a hook of the host's.
GIVERS_OF_THE_HOSTS_GPUS = frozenset(
    ("nvidia-container-cli", "nvidia-container-runtime-hook", "nvidia-container-toolkit")
)

PROPAGATING = frozenset(("shared", "rshared", "slave", "rslave"))
_BIND_OPTIONS = frozenset(("bind", "rbind"))
# IDs on the mount are mapped; with the latter also on what is mounted below (config.md, "Mounts").
_MAPPING_OPTIONS = frozenset(("idmap", "ridmap"))


@dataclass(frozen=True, slots=True)
class SharedMount:
    """A host path that the guest sees as GUEST_SHARE/<container>/<name>, its container at destination.

    mapped: to what IDs on disk are for the guest, with maps_below on what is mounted below it as well.
    """

    name: str
    source: str
    read_only: bool
    recursive: bool
    destination: str = ""
    mapped: IdMappings = UNMAPPED
    maps_below: bool = False


@dataclass(frozen=True, slots=True)
class GuestSpec:
    document: Document
    shared: tuple[SharedMount, ...]
    disks: tuple[BlockDevice, ...]
    devices: DeviceWishes
    ignored: tuple[str, ...]
    """What was left out because the VM makes it needless, for the log."""
    unmet: tuple[str, ...]
    """What was left out although somebody may miss it, for the log."""


def refuse_host_access(spec: Spec, siblings: Siblings = ALONE) -> None:
    """Raises Unimplemented for what no VM can honour, naming the option, before anything is made for it.

    siblings: whose namespaces it may join.
    """
    users.refuse_broken(spec)
    for kind, (what, why) in HOST_NAMESPACES.items():
        if spec.namespace(kind) is None:
            raise Unimplemented(f"{what}: not possible in a VM", hint=why)
    for namespace in spec.namespaces:
        if namespace.type not in (*GUEST_NAMESPACES, "network"):
            raise Unimplemented(f"{namespace.type!r} namespace: not known to this version")
        mapped = namespace.type == "user" and has_pods_users(spec, siblings)
        if namespace.path and namespace.type != "network" and not mapped:
            joined_or_refused(namespace, siblings)
    refuse(spec.document, REFUSED, "")
    refuse(spec.document.get("process") or {}, REFUSED_OF_PROCESSES, "process.")
    resources.for_guest((spec.document.get("linux") or {}).get("resources") or {})
    if foreign := _of_the_hosts_drivers(as_asked(spec)):
        raise Unimplemented(
            f"device {foreign[0].path}: the host's character devices are not passed into the VM",
            hint="PCI devices are, by nodes in /dev/vfio or by annotation (docs/gpus.md); block devices "
            "are; /dev/fuse and /dev/net/tun are the VM's own",
        )
    if unknown := spec.hooks.keys() - HOST_HOOKS - GUEST_HOOKS:
        raise Unimplemented(f"hooks {', '.join(sorted(unknown))}: not known to this version")
    for kind in sorted(HOST_HOOKS & spec.hooks.keys()):
        _refuse_gpus_of_the_hosts_driver(kind, spec.hooks[kind])


def _refuse_gpus_of_the_hosts_driver(kind: str, hooks: Iterable[Hook]) -> None:
    for hook in hooks:
        for word in (hook.path, *hook.args):
            if os.path.basename(word) in GIVERS_OF_THE_HOSTS_GPUS:
                raise Unimplemented(
                    f"{kind} hook {word}: the host's GPU driver is not in the VM",
                    hint="without --gpus: a GPU is passed into the VM by --device nvidia.com/pgpu=0 or by "
                    "annotation (docs/gpus.md)",
                )


def _numbers_of_vfio(spec: Spec) -> frozenset[tuple[int, int]]:
    return frozenset((device.major, device.minor) for device in spec.devices if is_vfio(device))


def _of_the_hosts_drivers(spec: Spec) -> list[Device]:
    return [
        device
        for device in spec.devices
        if not (
            device.path in DEFAULT_DEVICES or device.type == BLOCK or _is_guests(device) or is_vfio(device)
        )
    ]


def as_asked(spec: Spec) -> Spec:
    """Without devices of the host's that nobody asked for: those of a privileged container that is given all
    there are, as Docker and containerd do. It gets none of them, as it is privileged in the VM.
    """
    if not (may_use_all(spec) and _of_the_hosts_drivers(spec)):
        return spec
    linux = spec.document["linux"]
    kept = [at for at, device in enumerate(spec.devices) if _is_guests(device)]
    devices = [linux["devices"][at] for at in kept]
    document = {**spec.document, "linux": {**linux, "devices": devices}}
    return replace(spec, document=document, devices=tuple(spec.devices[at] for at in kept))


def _is_guests(device: Device) -> bool:
    return device.type in ("c", "u") and (device.major, device.minor) in GUEST_DEVICES.values()


def has_own_files(spec: Spec) -> bool:
    """Whether the container of a pod that is to be its only one sees no file that others are to change."""
    shared = any(mount.is_bind for mount in spec.mounts) or os.path.isabs(spec.rootfs)
    return not shared and not _is_one_of_a_group(spec)


def shares_directories(spec: Spec) -> bool:
    """Whether containers of the pod may meet in a directory, with each other or with programs of the host's.

    They would at sockets and FIFOs that they make there, which 9p cannot do. A file alone is no such place.
    """
    given = (mount.source for mount in spec.mounts if mount.is_bind)
    return _is_one_of_a_group(spec) or not all(map(os.path.isfile, given))


def _is_one_of_a_group(spec: Spec) -> bool:
    return not spec.annotations.keys().isdisjoint(GROUP_ANNOTATIONS)


def process_for_guest(process: Document) -> tuple[Document, tuple[str, ...]]:
    """An OCI Process, of a container or an exec, and lines as GuestSpec.ignored. Raises Unimplemented."""
    refuse(process, REFUSED_OF_PROCESSES, "process.")
    return leave_out(process, NEEDLESS_OF_PROCESSES, "process.")


def for_guest(spec: Spec, container_id: str, siblings: Siblings = ALONE) -> GuestSpec:
    """The same container as the guest's runtime has to make it, in the pod of its siblings.

    Raises InvalidArgument for a mount source that cannot be shared, Unimplemented as refuse_host_access.
    """
    refuse_host_access(spec, siblings)
    of_privileged: tuple[str, ...] = ()
    if (asked := as_asked(spec)) is not spec:
        of_privileged = (f"linux.devices: the host's {len(spec.devices)}: privileged is so in the VM alone",)
        spec = asked
    document = dict(spec.document)  # what is changed is copied, the rest is only read
    directory = f"{GUEST_SHARE}/{container_id}"
    document["root"] = {"path": f"{directory}/rootfs", "readonly": spec.readonly}
    shared: list[SharedMount] = []
    document["mounts"] = [
        _guest_mount(mount, directory, shared, siblings.shm, spec.id_mappings) for mount in spec.mounts
    ]
    given = document.pop("hooks", None) or {}
    if of_guest := {kind: entries for kind, entries in given.items() if kind in GUEST_HOOKS and entries}:
        document["hooks"] = of_guest
    linux = dict(document.get("linux") or {})
    linux["namespaces"] = guest_namespaces(spec, siblings)
    for name in ("cgroupsPath", "devices"):  # the host's; the agent names the guest's cgroup
        linux.pop(name, None)
    given = (spec.document.get("linux") or {}).get("devices") or ()
    if kept := [entry for entry, device in zip(given, spec.devices, strict=True) if _is_guests(device)]:
        linux["devices"] = kept
    linux["resources"], unmet = resources.for_guest(
        without_rules(linux.get("resources") or {}, _numbers_of_vfio(spec))
    )
    document["linux"], of_linux = leave_out(linux, NEEDLESS, "linux.")
    document["process"], of_process = process_for_guest(document.get("process") or {})
    ignored = of_process + of_linux + of_privileged
    return GuestSpec(document, tuple(shared), asked_for(spec), wishes_of(spec), ignored, unmet)


def _guest_mount(
    mount: Mount, directory: str, shared: list[SharedMount], shm: str, users: IdMappings
) -> Document:
    options = [option for option in mount.options if option not in _MAPPING_OPTIONS]
    mapped = mapped_of(mount, users)
    if not mount.is_bind:
        _refuse_hosts_filesystem(mount)
        return {
            "destination": mount.destination,
            "type": mount.type,
            "source": mount.source,
            "options": options,
        }
    refuse_mount_options(mount)
    if shm and mount.source == shm and not mapped:
        # Memory of the pod's own, not the host's by way of its file server.
        return {"destination": mount.destination, "type": "bind", "source": GUEST_SHM, "options": options}
    check_bind_source(mount)
    entry = SharedMount(
        name=f"mount{len(shared)}",
        source=mount.source,
        read_only=not {"ro", "rro"}.isdisjoint(options),
        recursive="rbind" in options,
        destination=mount.destination,
        mapped=mapped,
        maps_below="ridmap" in mount.options,
    )
    shared.append(entry)
    return {
        "destination": mount.destination,
        "type": "bind",
        "source": f"{directory}/{entry.name}",
        # What lies below came along on the host; in the guest it is one file system.
        "options": ["rbind", *(option for option in options if option not in _BIND_OPTIONS)],
    }


def mapped_of(mount: Mount, users: IdMappings) -> IdMappings:
    """Its mappings, of which none means the container's, where an option asks for any.

    Raises InvalidArgument where there are none, or only half of them, Unimplemented where nothing of the
    host's is mounted.
    """
    mapped = mount.id_mappings
    if not mapped and not _MAPPING_OPTIONS.isdisjoint(mount.options):
        if not users:
            raise InvalidArgument(f"mount {mount.destination}: idmap, and there are no mappings")
        mapped = users
    if not mapped:
        return mapped
    if not (mapped.uids and mapped.gids):
        raise InvalidArgument(f"mount {mount.destination}: uidMappings and gidMappings go together")
    if not mount.is_bind:
        raise Unimplemented(f"mount {mount.destination}: uidMappings and gidMappings of type {mount.type}")
    return mapped


def _refuse_hosts_filesystem(mount: Mount) -> None:
    if mount.type not in KERNELS_OWN:
        raise Unimplemented(
            f"mount {mount.destination}: type {mount.type!r}: the host's disk, directories or server that it"
            " would be of are not in the VM",
            hint="mount it on the host and share it by a bind mount, or give the container the block device",
        )


def refuse_mount_options(mount: Mount) -> None:
    """What would have to reach across the VM's border in a way that it does not."""
    for option in mount.options:
        if option in PROPAGATING:
            raise Unimplemented(
                f"mount {mount.destination}: propagation {option}: later mounts do not reach the VM",
                hint="use rprivate, which is every client's default",
            )


def check_bind_source(mount: Mount) -> None:
    """A file or directory can be shared with a guest; what lives in the host's kernel cannot."""
    try:
        mode = os.stat(mount.source).st_mode
    except OSError as error:
        raise InvalidArgument(
            f"mount {mount.destination}: source {mount.source}: {error.strerror}"
        ) from error
    except ValueError as error:  # a NUL, or what cannot be a file's name
        raise InvalidArgument(f"mount {mount.destination}: source {mount.source!r}: {error}") from error
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return
    kind = "socket" if stat.S_ISSOCK(mode) else "FIFO" if stat.S_ISFIFO(mode) else "device"
    raise Unimplemented(
        f"mount {mount.destination}: source {mount.source} is a {kind}, and its other end is on the host",
        hint="share a directory, or reach the service over the network",
    )
