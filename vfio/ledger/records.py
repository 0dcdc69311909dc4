"""What the ledger says: the states of a device and the ways between them, claims, uses, the audit log.

Plain records; database.py has them on disk. It must not know SQL, nor how anything is done to a device.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from rpc.errors import FailedPrecondition, ResourceExhausted
from vfio.address import PciAddress

# In place of a namespace: no containerd and no Kubernetes has one of this name.
HOST = "(host)"


class State(Enum):
    """Of a device. One that the ledger never heard of is free."""

    FREE = "free"
    CLAIMED = "claimed"  # somebody's, and perhaps bound to vfio, but not in a machine yet
    IN_USE = "in use"  # a machine has it, or is about to
    RESETTING = "resetting"  # nobody's any more, and not clean yet
    QUARANTINED = "quarantined"  # nobody gets it until a person clears it


# What may follow upon what. The database holds the same (database.py), so that no other program makes a
# shorter way: nothing is free that a pod had and nobody has reset.
MOVES: Mapping[State, frozenset[State]] = {
    State.FREE: frozenset({State.CLAIMED, State.QUARANTINED}),
    # Straight back only if nothing was done to it: no binding is written down.
    State.CLAIMED: frozenset({State.IN_USE, State.RESETTING, State.FREE}),
    State.IN_USE: frozenset({State.RESETTING}),
    State.RESETTING: frozenset({State.FREE, State.QUARANTINED}),
    State.QUARANTINED: frozenset({State.FREE}),
}


class Cause(Enum):
    """Why a line is in the audit log."""

    STATE = "state"  # a device went from one state to another
    CLAIM = "claim"
    RELEASE = "release"
    ORPHAN = "orphan"  # released by somebody else, as its owner had ended
    TAKEOVER = "takeover"  # a reset that somebody else goes on with
    BIND = "bind"
    RESTORE = "restore"
    RESET = "reset"
    SCRUB = "scrub"
    KEEP = "keep"  # an operator bound it, and there it stays
    BOOT = "boot"  # of an earlier boot of the host: the last that was heard of it


class IllegalMove(FailedPrecondition):
    """A device is not in the state that something takes."""


class NotEnough(ResourceExhausted):
    """The devices are free, if any are wanted, and CPUs or huge pages are not."""


def check_move(address: PciAddress, now: State, wanted: State) -> None:
    """Raises IllegalMove."""
    if wanted not in MOVES[now]:
        raise IllegalMove(f"device {address} is {now.value}, and cannot become {wanted.value}")


@dataclass(frozen=True, slots=True)
class Pod:
    """Whose a claim is, and who is told how long it had what. namespace: containerd's or Kubernetes'."""

    namespace: str
    id: str
    tenant: str = ""

    @property
    def is_host(self) -> bool:
        """Not a pod: an operator's command, which has devices for as long as it changes something."""
        return self.namespace == HOST

    def __str__(self) -> str:
        return f"{self.namespace}/{self.id}"


@dataclass(frozen=True, slots=True)
class Process:
    """Who works on something: the pid as the host counts it, its start time in clock ticks, and the boot.

    Together they are never another's (shim/procfs.py, start_time). boot: of /proc/sys/kernel/random/boot_id.
    """

    pid: int
    started: int
    boot: str

    @classmethod
    def here(cls, pid: int, started: int) -> "Process":
        """Of this boot of the host."""
        return cls(pid, started, boot_id())


@dataclass(frozen=True, slots=True)
class Claim:
    """What one pod has, or had. cpus, pages: by NUMA node; page_bytes is the size of its pages, or 0.

    given: the devices for each request. companions: those that only came along. ended_s: when it was
    released, in seconds since 1970. A claim that was released has no CPUs and pages.
    """

    id: int
    pod: Pod
    owner: Process
    made_s: float
    ended_s: float | None
    given: tuple[tuple[PciAddress, ...], ...]
    companions: tuple[PciAddress, ...]
    partitions: tuple[str, ...]
    cpus: Mapping[int, tuple[int, ...]]
    pages: Mapping[int, int]
    page_bytes: int

    @property
    def addresses(self) -> tuple[PciAddress, ...]:
        """All that is claimed, companions too."""
        return tuple(sorted([*(address for group in self.given for address in group), *self.companions]))

    @property
    def own_cpus(self) -> tuple[int, ...]:
        """Of all nodes, by number."""
        return tuple(sorted(cpu for cpus in self.cpus.values() for cpu in cpus))


@dataclass(frozen=True, slots=True)
class Device:
    """How the ledger has one device. claim, pod: whose it is, or was until it is clean again."""

    address: PciAddress
    state: State
    since_s: float
    reason: str = ""
    claim: int | None = None
    pod: Pod | None = None


@dataclass(frozen=True, slots=True)
class Use:
    """One device in the hands of one pod. to_s is None while it has it; seconds counts up to now then.

    Times are seconds since 1970; the seconds in between are counted by the kernel's clock since boot, so that
    setting the host's clock changes none.
    """

    pod: Pod
    address: PciAddress
    companion: bool
    from_s: float
    to_s: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the audit log. actor: who did it. before, after: of a device's state."""

    number: int
    at_s: float
    cause: Cause
    actor: str
    address: PciAddress | None
    claim: int | None
    pod: Pod | None
    before: State | None
    after: State | None
    detail: str


@dataclass(frozen=True, slots=True)
class Binding:
    """One function of a device as it was before it was bound to another driver: how it is restored.

    driver: the name of its driver, or "" if it had none. override: what driver_override said, "" for nothing.
    condition: what it was like (vfio/condition.py), for a comparison after its reset. boot: of the host, when
    that was. used: a machine has had it since. clean: it was reset after that.
    """

    address: PciAddress
    claim: int
    driver: str
    override: str
    condition: str = ""
    boot: str = ""
    used: bool = False
    clean: bool = False


@dataclass(frozen=True, slots=True)
class Orphans:
    """What collect() found, and what is to be done now: reset these devices.

    claims: those whose owner had ended. devices: all that are to be reset by the caller, which is written
    down, whether they are these claims' or were being reset by somebody who has ended. cpus: those that were
    a pod's alone.
    """

    claims: tuple[Claim, ...]
    devices: tuple[PciAddress, ...]
    cpus: Mapping[Pod, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Instant:
    """Now, by both clocks: seconds since 1970, which can be set, and since the boot, which cannot."""

    wall_s: float
    uptime_s: float
    boot: str


def instant() -> Instant:
    return Instant(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), boot_id())


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def this_process() -> str:
    """An actor, for the audit log, where nobody says who it is."""
    return f"uid {os.getuid()} pid {os.getpid()}"
