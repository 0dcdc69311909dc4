"""Users that no other pod has, for its QEMU and its anchors; QEMU's may be one that the operator names.

Two QEMUs of one user could reach each other's sockets and count against each other's limits; an anchor could
be killed by whatever else runs as its user. A uid is held by a lock that the kernel drops with its holder, so
that none leaks, however a shim ends.
"""

import fcntl
import grp
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import FailedPrecondition, ResourceExhausted

# Beyond what useradd, subordinate ids and systemd give out (systemd's UIDS-GIDS.md: 1879048192 to
# 2147483647 is unused).
FIRST_UID = 2_000_000_000
UIDS = 1 << 14
FIRST_ANCHOR_UID = FIRST_UID + UIDS


@dataclass(frozen=True, slots=True)
class QemuUser:
    """uid, and how qemu.conf(5) wants user and group: a name, or a number after a plus sign."""

    uid: int
    user: str
    group: str


@contextmanager
def qemu_user(wanted: str, locks: Path, *, kvm: bool) -> Iterator[QemuUser]:
    """The user `wanted`, or for "auto" one of this pod's own, for as long as the context lasts.

    Raises FailedPrecondition for a user that does not exist, ResourceExhausted if every uid is taken.
    """
    # The group is all that QEMU needs to open /dev/kvm.
    group = kvm_group() if kvm else None
    if wanted != "auto":
        entry = named(wanted)
        yield QemuUser(entry.pw_uid, wanted, group or f"+{entry.pw_gid}")
        return
    fd, number = _take(locks, "")
    uid = FIRST_UID + number
    try:
        yield QemuUser(uid, f"+{uid}", group or f"+{uid}")
    finally:
        os.close(fd)


def anchor_uid(locks: Path) -> int:
    """For the life of the calling process. Raises ResourceExhausted if every uid is taken."""
    _, number = _take(locks, "anchors-")
    return FIRST_ANCHOR_UID + number


def _take(locks: Path, prefix: str) -> tuple[int, int]:
    """A lock's descriptor, and its number."""
    locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    for number in range(UIDS):
        fd = os.open(locks / f"{prefix}{number}", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            continue
        return fd, number
    raise ResourceExhausted(f"all of the {UIDS} users for pods are taken", hint="casemate ps")


def named(user: str) -> pwd.struct_passwd:
    """Its group need not have its name: nobody's is nogroup, or nobody, or nfsnobody."""
    try:
        return pwd.getpwnam(user)
    except KeyError as error:
        raise FailedPrecondition(
            f"the user {user}, which QEMU is to run as, does not exist",
            hint='set qemu_user = "auto", or create the user',
        ) from error


def kvm_group() -> str | None:
    try:
        return grp.getgrnam("kvm").gr_name
    except KeyError:
        return None
