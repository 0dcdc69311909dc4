"""What an operator decided, as plain frozen records that every part of casemate reads.

Imports nothing heavy: a shim builds these from a cached file in its first milliseconds. It must
not know where the values came from (load.py) nor what is allowed (schema.py).
"""

from config.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself costs the shim two milliseconds
    from collections.abc import Mapping
    from typing import Any


DEDICATED = "dedicated"


class Profile(Record):
    """The shape of a pod's machine. An annotation may change it for one pod (annotations.py), or its limits
    may, up to the maximum (shim/sizing.py): 0 is all that the host has."""

    name: str
    vcpus: int
    memory_bytes: int
    max_vcpus: int
    max_memory_bytes: int
    image: str
    kernel_cmdline: str
    cpu_model: str
    template: str
    files: str
    hugepages: str
    cpu_policy: str

    @property
    def has_own_cpus(self) -> bool:
        """Each of the guest's CPUs is one of the host's that no other pod is given."""
        return self.cpu_policy == DEDICATED


class Timeouts(Record):
    """How long the host waits, in seconds; boot_s and agent_call_s without KVM tcg_factor times as long, on a
    crowded host as many times as it is crowded."""

    boot_s: float
    agent_call_s: float
    tcg_factor: float
    empty_s: float


class Node(Record):
    """What casemated does for the pods of this host. pool: how many machines wait, by profile. pool_refill_s:
    from one's being taken to the making of another."""

    fork_server: bool
    pool: dict[str, int]
    pool_memory_bytes: int
    pool_refill_s: float


class Vfio(Record):
    """What an operator answers for when devices are given to pods. waive: codes of vfio/findings.py.

    ready_s, reset_s, scrub_s: in seconds, of one device. scrub: a program's path, or "" for none. cdi_dir,
    cdi_kind: of the file that `casemate cdi generate` writes. pod_resources: of a kubelet's socket, or "".
    partitions: of NVLink, by name, the addresses of their GPUs as the kernel writes them.
    """

    waive: tuple[str, ...]
    partitions: dict[str, tuple[str, ...]]
    ready_s: float
    reset_s: float
    scrub: str
    scrub_s: float
    cdi_dir: str
    cdi_kind: str
    pod_resources: str


class Settings(Record):
    """Every option of config/default.toml, checked. That file says what each one means."""

    accel: str
    transport: str
    qemu: str
    qemu_user: str
    qemu_paths: tuple[str, ...]
    virtiofsd: str
    firmware: str
    image_dir: str
    template_dir: str
    ledger_dir: str
    dedicated_cpus: str
    make_templates: bool
    templates_kept: int
    default_profile: str
    profiles: dict[str, Profile]
    allowed_annotations: tuple[str, ...]
    log_level: str
    address_format: str
    timeouts: Timeouts
    node: Node
    vfio: Vfio
    console_bytes: int
    traces_kept: int


def to_mapping(settings: Settings) -> "dict[str, Any]":
    """Plain values for JSON; from_mapping() is the way back."""
    return vars(settings) | {
        "profiles": {name: vars(profile) for name, profile in settings.profiles.items()},
        "timeouts": vars(settings.timeouts),
        "node": vars(settings.node),
        "vfio": vars(settings.vfio),
    }


def from_mapping(values: "Mapping[str, Any]") -> Settings:
    """Settings from what to_mapping() gave, once it has been through JSON.

    Raises ValueError, TypeError, AttributeError or KeyError for anything else: what another
    version stored must not become half-right settings.
    """
    given = dict(values)
    given["profiles"] = {
        name: Profile(**_checked(Profile, profile)) for name, profile in given["profiles"].items()
    }
    given["allowed_annotations"] = tuple(given["allowed_annotations"])
    given["qemu_paths"] = tuple(given["qemu_paths"])
    given["timeouts"] = Timeouts(**_checked(Timeouts, given["timeouts"]))
    given["node"] = Node(**_checked(Node, given["node"]))
    lists = {
        "waive": tuple(given["vfio"]["waive"]),
        "partitions": {name: tuple(members) for name, members in given["vfio"]["partitions"].items()},
    }
    given["vfio"] = Vfio(**_checked(Vfio, given["vfio"] | lists))
    settings = Settings(**_checked(Settings, given))
    if not all(type(name) is str for name in settings.allowed_annotations):
        raise TypeError("allowed_annotations: not all are text")
    if not all(type(path) is str for path in settings.qemu_paths):
        raise TypeError("qemu_paths: not all are text")
    if not all(type(code) is str for code in settings.vfio.waive):
        raise TypeError("vfio.waive: not all are text")
    if not all(type(each) is str for members in settings.vfio.partitions.values() for each in members):
        raise TypeError("vfio.partitions: not all are text")
    if not all(type(count) is int for count in settings.node.pool.values()):
        raise TypeError("node.pool: not all are numbers")
    if any(name != profile.name for name, profile in settings.profiles.items()):
        raise ValueError("a profile is stored under another's name")
    if settings.default_profile not in settings.profiles:
        raise ValueError(f"default_profile: no profile {settings.default_profile!r}")
    return settings


def _checked(kind: "type[Record]", values: "Mapping[str, Any]") -> "Mapping[str, Any]":
    """values, if they are all of kind's fields and nothing else, each of its declared type."""
    if values.keys() != {name for name, _ in kind.FIELDS}:
        raise ValueError(f"{kind.__name__}: not the fields of this version")
    for name, declared in kind.FIELDS:
        if type(values[name]) is not getattr(declared, "__origin__", declared):
            raise TypeError(f"{kind.__name__}.{name}: not {declared}")
    return values
