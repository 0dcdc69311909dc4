"""The machine as a whole: clock, entropy, host name, memory figures, power.

What the shim tells a guest when they meet (HELLO), and how the guest ends. Knows no RPC types.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from _thread import start_new_thread
from fcntl import ioctl
from struct import pack

from agent import boot, libc
from agent.uevents import when_there
from rpc.errors import DeadlineExceeded, FailedPrecondition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

CLOCK_TOLERANCE_NS = 20_000_000  # below this a step would only hurt: timers, file times, logs
STEP_NS = 100_000_000  # from which on a running guest's is set: to make up for it would take minutes
SYNC_S = 60.0
PLUGGED_S = 5.0  # from QEMU's word that a device is plugged in to the guest's driver
LAST_SYNC_S = 5.0
_RNDADDENTROPY = 0x40085203
_RNDRESEEDCRNG = 0x5207


def set_clock(realtime_ns: int, *, only_forward: bool) -> None:
    """Steps CLOCK_REALTIME to the host's time if that is needed."""
    if clock_is_off(time.time_ns(), realtime_ns, only_forward=only_forward):
        time.clock_settime_ns(time.CLOCK_REALTIME, realtime_ns)


def adjust_clock(by_ns: int) -> None:
    """Moves CLOCK_REALTIME. A little at a time where it is little (half a millisecond in a second), so that
    time does not go backwards."""
    if abs(by_ns) < STEP_NS:
        libc.adjtime(by_ns // 1000)
    else:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.time_ns() + by_ns)


def clock_is_off(guest_ns: int, host_ns: int, *, only_forward: bool) -> bool:
    """Whether the difference matters.

    only_forward: the time may have been written long before it was read (bytes wait in a virtio-serial port
    while the guest boots), so it can prove that the guest is late, not that it is early.
    """
    behind_ns = host_ns - guest_ns
    return (behind_ns if only_forward else abs(behind_ns)) >= CLOCK_TOLERANCE_NS


def add_entropy(seed: bytes) -> None:
    """Credits the host's random bytes to the kernel's pool, and makes it use them at once."""
    fd = os.open("/dev/urandom", os.O_WRONLY | os.O_CLOEXEC)
    try:
        ioctl(fd, _RNDADDENTROPY, pack("ii", len(seed) * 8, len(seed)) + seed)
        ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def set_hostname(name: str) -> None:
    socket.sethostname(name)


def memory_bytes() -> tuple[int, int]:
    """(total, used) memory of the guest; used is what an application could not get."""
    values = {}
    with open("/proc/meminfo") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key in ("MemTotal", "MemAvailable"):
                values[key] = int(rest.split()[0]) * 1024
                if len(values) == 2:
                    break
    return values["MemTotal"], values["MemTotal"] - values["MemAvailable"]


def free_bytes() -> int:
    """Memory that nobody uses, not even as a cache."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemFree:"):
                return int(line.split()[1]) * 1024
    return 0


def rss_bytes() -> int:
    """Resident memory of the agent itself."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


_MOUNT_FLAGS = {
    "ro": libc.MS_RDONLY,
    "nosuid": libc.MS_NOSUID,
    "nodev": libc.MS_NODEV,
    "noexec": libc.MS_NOEXEC,
    "sync": libc.MS_SYNCHRONOUS,
    "noatime": libc.MS_NOATIME,
    "nodiratime": libc.MS_NODIRATIME,
    "relatime": libc.MS_RELATIME,
    "strictatime": libc.MS_STRICTATIME,
    "rw": 0,
}


def mount_arguments(options: Sequence[str]) -> tuple[int, str]:
    """(flags, data) of mount(2) for options as in fstab."""
    flags = 0
    data = []
    for option in options:
        if option in _MOUNT_FLAGS:
            flags |= _MOUNT_FLAGS[option]
        else:
            data.append(option)
    return flags, ",".join(data)


def ensure_file_system(name: str) -> None:
    """Has the kernel know a type of file system. Raises FailedPrecondition."""
    with open("/proc/filesystems") as file:
        known = {line.split()[-1] for line in file}
    if name not in known:
        boot.load_feature(name)


def mount_share(tag: str, path: str, fstype: str, options: Sequence[str]) -> None:
    """Mounts what the host shares under this tag; options as in fstab."""
    flags, data = mount_arguments(options)
    os.makedirs(path, exist_ok=True)

    def mount() -> bool | None:
        try:
            libc.mount(tag, path, fstype, flags, data)
        except OSError as error:
            if error.errno == errno.EINVAL and fstype == "virtiofs":
                return None  # no device has this tag: it was plugged in a moment ago
            raise FailedPrecondition(
                f"the guest cannot mount {fstype} {tag} on {path}", os.strerror(error.errno or 0)
            ) from error
        return True

    when_there(mount, f"{fstype} device {tag}", PLUGGED_S)


async def sync(timeout_s: float) -> None:
    """Writes out every file system, in a thread: it takes its time, and a share whose server is dead holds it
    up for ever. That thread then ends with the machine."""
    loop = asyncio.get_running_loop()
    written: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not written.done():
            written.set_result(None)

    def write_out() -> None:
        os.sync()
        loop.call_soon_threadsafe(settle)

    start_new_thread(write_out, ())
    try:
        async with asyncio.timeout(timeout_s):
            await written
    except TimeoutError:
        raise DeadlineExceeded(f"the guest's data were not written out within {timeout_s:g} s") from None


def power_off() -> None:
    """At once: without a sync."""
    libc.power_off()
