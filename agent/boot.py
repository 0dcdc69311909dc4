"""From the kernel's hand-over to a usable machine: file systems, kernel modules, limits, loopback.

Runs once, before the event loop exists. It must not know of containers or of the RPC.
"""

import errno
import os
import resource
from fcntl import ioctl
from socket import AF_INET, SOCK_DGRAM, socket
from struct import pack

from agent import libc

MODULE_LIST = "/usr/lib/casemate/modules.txt"
CGROUP_ROOT = "/sys/fs/cgroup"
CONTROLLERS = ("cpu", "cpuset", "hugetlb", "io", "memory", "pids")

_SAFE = libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC
_MOUNTS = (
    # source, target, type, flags, options
    ("proc", "/proc", "proc", _SAFE, ""),
    ("sysfs", "/sys", "sysfs", _SAFE, ""),
    ("devtmpfs", "/dev", "devtmpfs", libc.MS_NOSUID, "mode=0755"),
    ("tmpfs", "/run", "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "mode=1777"),
    ("cgroup2", CGROUP_ROOT, "cgroup2", _SAFE, "nsdelegate,memory_recursiveprot"),
    ("devpts", "/dev/pts", "devpts", libc.MS_NOSUID | libc.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "mode=1777"),
)
_MADE_ON_DEV = ("/dev/pts", "/dev/shm")

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_OPEN_FILES = (65536, 1048576)  # soft, hard: what containerd's own unit gives runc containers is the hard one


def mount_all() -> None:
    """Mounts what PID 1 owes its children. What an initramfs already mounted is left as it is."""
    for source, target, fstype, flags, options in _MOUNTS:
        if target in _MADE_ON_DEV and not os.path.isdir(target):
            os.mkdir(target)
        try:
            libc.mount(source, target, fstype, flags, options)
        except OSError as error:
            if error.errno != errno.EBUSY:  # EBUSY: this very file system is already here
                raise


def enable_controllers() -> None:
    """Hands every cgroup controller that this kernel has down to the containers."""
    with open(f"{CGROUP_ROOT}/cgroup.controllers") as file:
        available = file.read().split()
    wanted = " ".join(f"+{name}" for name in CONTROLLERS if name in available)
    if wanted:
        with open(f"{CGROUP_ROOT}/cgroup.subtree_control", "w") as file:
            file.write(wanted)


def load_modules(list_path: str = MODULE_LIST) -> list[str]:
    """Loads the modules the image lists ("PATH [PARAMETERS]" a line), in order.

    A module that is there already, or whose device is missing, is not an error; one that cannot
    be read or linked is: the image is broken then, and says so on the console.
    """
    loaded: list[str] = []
    try:
        with open(list_path) as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return loaded
    for line in lines:
        path, _, parameters = line.strip().partition(" ")
        if not path or path.startswith("#"):
            continue
        try:
            libc.load_module(path, parameters.strip())
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENODEV):
                raise
        else:
            loaded.append(path)
    return loaded


def raise_limits() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def loopback_up() -> None:
    with socket(AF_INET, SOCK_DGRAM) as control:
        request = pack("16sH14x", b"lo", 0)
        flags = int.from_bytes(ioctl(control, _SIOCGIFFLAGS, request)[16:18], "little")
        ioctl(control, _SIOCSIFFLAGS, pack("16sH14x", b"lo", flags | _IFF_UP))


def command_line(path: str = "/proc/cmdline") -> dict[str, str]:
    """The kernel command line's casemate.* settings, without the prefix."""
    with open(path) as file:
        return parse_command_line(file.read())


def parse_command_line(text: str) -> dict[str, str]:
    settings = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if equals and key.startswith("casemate."):
            settings[key.removeprefix("casemate.")] = value
    return settings
