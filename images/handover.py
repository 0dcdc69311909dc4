"""From the kernel's first program to the agent: which system calls, from an initramfs or from the root.

Must not know where modules come from or what the agent is; it is given both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from images.initprogram import Buffer, Call, Step, Strings

ROOT = "/root"  # the kernel's built-in initramfs has it, and /dev/console
BOOT_MARKS_VARIABLE = "CASEMATE_BOOT_MARKS"

_READ_ONLY, _NOSUID, _NODEV, _NOEXEC, _MOVE = 1, 2, 4, 8, 8192
_SAFE = _NOSUID | _NODEV | _NOEXEC
_O_RDONLY, _O_WRONLY = 0, 1
_CLOCK_MONOTONIC = 1
_MARKS_FD = 3  # 0 to 2 are the console
_FD = 4
# An emulated guest pays for each request to the disk, hardly for its size: the default of 128 KiB takes
# twice as many to start the agent.
_READAHEAD_KIB = 512
_ALL = 1 << 30  # bytes: whatever a file has


@dataclass(frozen=True, slots=True)
class Root:
    """What is mounted as the root, the program that becomes PID 1 there, and files it needs at once."""

    device: str
    fstype: str
    program: tuple[str, ...]
    wanted: tuple[str, ...] = ()


# mounted for the agent, because here it costs microseconds: source, target, type, flags, options
MOUNTS: tuple[tuple[str, str, str, int, str], ...] = (
    ("devtmpfs", "/dev", "devtmpfs", _NOSUID, "mode=0755"),
    ("proc", "/proc", "proc", _SAFE, ""),
    ("tmpfs", "/run", "tmpfs", _NOSUID | _NODEV, "mode=0755"),
    ("tmpfs", "/tmp", "tmpfs", _NOSUID | _NODEV, "mode=1777"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", _SAFE, "nsdelegate,memory_recursiveprot"),
    ("devpts", "/dev/pts", "devpts", _NOSUID | _NOEXEC, "gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", "tmpfs", _NOSUID | _NODEV, "mode=1777"),
)
_MADE_ON_DEV = ("/dev/pts", "/dev/shm")


def from_initramfs(modules: Sequence[str], root: Root) -> list[Step]:
    """Loads the modules, which are removed, mounts the root and enters it. modules: paths, in load order."""
    plan = [*_marks_file(), *_mark()]
    for path in modules:
        plan += [
            Step(Call.OPEN, (path, _O_RDONLY), f"casemate: the initramfs lacks {path}"),
            Step(Call.FINIT_MODULE, (_FD, "", 0), f"casemate: cannot load {path}"),
            Step(Call.CLOSE, (_FD,)),
            Step(Call.UNLINK, (path,)),  # its memory is the guest's
        ]
    return [
        *plan,
        *_mark(),
        Step(Call.MKDIR, ("/dev", 0o755)),
        Step(Call.MOUNT, ("devtmpfs", "/dev", "devtmpfs", _NOSUID, "mode=0755"), "casemate: no devtmpfs"),
        Step(
            Call.MOUNT,
            (root.device, ROOT, root.fstype, _READ_ONLY, ""),
            f"casemate: cannot mount {root.device} as {root.fstype}: is it the image's first disk?",
        ),
        Step(Call.UNLINK, ("/init",)),
        *_read_ahead(root, ROOT),
        Step(Call.CHDIR, (ROOT,), "casemate: cannot enter the root"),
        Step(Call.MOUNT, (".", "/", "", _MOVE, ""), "casemate: cannot move the root"),
        Step(Call.CHROOT, (".",), "casemate: cannot change the root"),
        Step(Call.CHDIR, ("/",)),
        *_become(root),
    ]


def from_root(root: Root) -> list[Step]:
    """For a kernel that has mounted the root by itself: there is no module to load, nor a root to change."""
    return [*_marks_file(), *_mark(), *_mark(), *_read_ahead(root, ""), *_become(root)]


def _marks_file() -> list[Step]:
    return [Step(Call.MEMFD_CREATE, ("casemate-boot-marks", 0), "casemate: no memory for the boot's marks")]


def _mark() -> list[Step]:
    """Writes down the time: three are made, of the first program's start, of its modules' and mounts' end."""
    clock = Buffer(16)
    return [
        Step(Call.CLOCK_GETTIME, (_CLOCK_MONOTONIC, clock)),
        Step(Call.WRITE, (_MARKS_FD, clock, 16)),
    ]


def _read_ahead(root: Root, at: str) -> list[Step]:
    """Makes the disk's requests few. Only an optimization: nothing here may end the boot."""
    size = str(_READAHEAD_KIB)
    queue = f"{at}/sys/block/{root.device.removeprefix('/dev/')}/queue/read_ahead_kb"
    plan = [
        Step(Call.MOUNT, ("sysfs", f"{at}/sys", "sysfs", _SAFE, "")),
        Step(Call.OPEN, (queue, _O_WRONLY)),
        Step(Call.WRITE, (_FD, size, len(size))),
        Step(Call.CLOSE, (_FD,)),
    ]
    for path in root.wanted:
        plan += [
            Step(Call.OPEN, (at + path, _O_RDONLY)),
            Step(Call.READAHEAD, (_FD, 0, _ALL)),
            Step(Call.CLOSE, (_FD,)),
        ]
    return plan


def _become(root: Root) -> list[Step]:
    """In the root: mounts what the agent wants, and executes it."""
    plan: list[Step] = []
    for source, target, fstype, flags, options in MOUNTS:
        if target in _MADE_ON_DEV:
            plan.append(Step(Call.MKDIR, (target, 0o755)))
        plan.append(
            Step(Call.MOUNT, (source, target, fstype, flags, options), f"casemate: cannot mount {target}")
        )
    program = root.program[0]
    environment = ("PATH=/usr/bin:/bin", "HOME=/", "LANG=C.UTF-8", f"{BOOT_MARKS_VARIABLE}={_MARKS_FD}")
    return [
        *plan,
        *_mark(),
        Step(
            Call.EXECVE,
            (program, Strings(root.program), Strings(environment)),
            f"casemate: cannot execute {program}",
        ),
    ]
