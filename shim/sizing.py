"""How large a pod's machine is: as its profile says, or larger where the pod's limits are.

Pure but for what the host has. Sizes are steps, a power of two and one and a half of it, so that pods with
limits of all kinds are restored from a few templates. It must not know where the limits came from.
"""

import os

from config.settings import Profile
from shim.oci import Limits

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
# What a guest has for itself before a container has anything: 77 MiB of 256, 347 of 4096 (MemAvailable of
# /proc/meminfo, Debian's kernel), as the kernel keeps a record of each page.
GUEST_BYTES, GUEST_SHARE = 96 * MIB, 16
# What of the pod's cgroup is QEMU's, virtiofsd's and the shim's.
HOST_BYTES = 64 * MIB
DEFAULT_PERIOD_US = 100_000  # the kernel's, where none is given
UNLIMITED_BYTES = 1 << 60  # cgroups v1 have a number of pages near 2^63 for none


def cpus(limits: Limits) -> float:
    """How many the quota is; 0 where none is said."""
    period_us = limits.cpu_period_us if limits.cpu_period_us > 0 else DEFAULT_PERIOD_US
    return max(limits.cpu_quota_us, 0) / period_us


def grown(
    profile: Profile,
    limits: Limits,
    *,
    vcpus: bool = True,
    memory: bool = True,
    room: "Callable[[], int | None]" = lambda: None,
) -> Profile:
    """The profile, with as many CPUs as the limits have, and memory for them and the guest's own needs.

    At most what the profile lets it (`max_vcpus`, `max_memory`), and what the host has. vcpus, memory:
    whether that may change. room: what bytes the pod's cgroup may have, asked where it matters. A machine
    that fills its memory has to fit into that: the kernel would end all of it, where a guest ends a process.
    """
    if vcpus:
        most = profile.max_vcpus or os.sysconf("SC_NPROCESSORS_ONLN")
        profile = profile.replace(vcpus=max(profile.vcpus, min(most, _rounded_up(cpus(limits)))))
    if memory and 0 < limits.memory_bytes < UNLIMITED_BYTES:
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = min(most, profile.max_memory_bytes or most)
        if (room_bytes := room()) is not None:
            most = min(most, room_bytes - HOST_BYTES)
        wanted = limits.memory_bytes + limits.memory_bytes // GUEST_SHARE + GUEST_BYTES
        profile = profile.replace(memory_bytes=max(profile.memory_bytes, _step(wanted, most)))
    return profile


def _rounded_up(count: float) -> int:
    return -int(-count // 1)


def _step(wanted: int, most: int) -> int:
    """The least that is enough, else the largest that is not too much; 0 if there is none."""
    chosen = 0
    for each in _steps():
        if each > most:
            break
        chosen = each
        if each >= wanted:
            break
    return chosen


def _steps() -> "Iterator[int]":
    size = 64 * MIB
    while True:
        yield size
        yield size + size // 2
        size *= 2
