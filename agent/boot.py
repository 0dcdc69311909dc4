"""From the kernel's hand-over to a usable machine: file systems, kernel modules, limits, loopback.

Runs once, before the event loop exists. It must not know of containers or of the RPC.
"""

import errno
import os
import resource
from contextlib import suppress
from fcntl import ioctl
from socket import AF_INET, SOCK_DGRAM, socket
from struct import pack

from agent import libc
from rpc.errors import FailedPrecondition

MODULE_LIST = "/usr/lib/casemate/modules.txt"
DRIVER_LIST = "/usr/lib/casemate/drivers.txt"
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


def mount_all(mounts_path: str = "/proc/self/mounts") -> None:
    """Mounts what PID 1 owes its children and an initramfs has not mounted already."""
    try:
        with open(mounts_path) as file:
            present = {line.split()[1] for line in file}
    except FileNotFoundError:
        present = set()  # not even /proc
    for source, target, fstype, flags, options in _MOUNTS:
        if target in present:
            continue
        if target in _MADE_ON_DEV:
            os.makedirs(target, exist_ok=True)
        libc.mount(source, target, fstype, flags, options)


def enable_controllers() -> None:
    """Hands every cgroup controller that this kernel has down to the containers."""
    with open(f"{CGROUP_ROOT}/cgroup.controllers") as file:
        available = file.read().split()
    wanted = " ".join(f"+{name}" for name in CONTROLLERS if name in available)
    if wanted:
        with open(f"{CGROUP_ROOT}/cgroup.subtree_control", "w") as file:
            file.write(wanted)


def features(list_path: str = MODULE_LIST) -> dict[str, list[str]]:
    """What the kernel can be made to do ("vsock", "9p"): the modules to load for it, in order.

    The image lists "FEATURE: PATH PATH ..." a line. A feature it does not list is one its kernel lacks.
    """
    with open(list_path) as file:
        lines = (line.partition(":") for line in file)
        return {feature: paths.split() for feature, colon, paths in lines if colon}


def driver_of(modalias: str, list_path: str = DRIVER_LIST) -> str | None:
    """The feature that has the driver for a device of this modalias; None where the image has none for it, or
    the kernel has it built in. The image lists "PATTERN FEATURE" a line."""
    from fnmatch import fnmatchcase

    with open(list_path) as file:
        for line in file:
            pattern, _, feature = line.strip().partition(" ")
            if fnmatchcase(modalias, pattern):
                return feature
    return None


def load_feature(name: str, list_path: str = MODULE_LIST, options: dict[str, str] | None = None) -> None:
    """Loads the kernel modules of a feature, in order; none if it is built in. options: parameters, by the
    module's name. Raises FailedPrecondition."""
    known = features(list_path)
    if name not in known:
        raise FailedPrecondition(f"this guest image's kernel has no {name}")
    for path in known[name]:
        module = path.rpartition("/")[2].partition(".")[0]
        _load_module(path, (options or {}).get(module, ""))


def _load_module(path: str, options: str) -> None:
    try:
        libc.load_module(path, options)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise FailedPrecondition(
                f"kernel module {path} cannot be loaded", os.strerror(error.errno or 0)
            ) from error


def raise_limits() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, _OPEN_FILES)


def rest() -> None:
    """kcompactd looks twice a second whether memory could be in larger pieces, also in a guest that is idle.
    Asked for a piece that there is none of, the kernel compacts all the same (vm.rst)."""
    # A kernel that compacts nothing has no such file.
    with suppress(FileNotFoundError), open("/proc/sys/vm/compaction_proactiveness", "w") as file:
        file.write("0")


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
