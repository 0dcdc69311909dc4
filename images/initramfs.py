"""The initramfs: an /init that loads the modules for the root, mounts it, and becomes the agent.

Must not know where modules come from or what the agent is; it is given both.
"""

import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from images.initprogram import Buffer, Call, Step, Strings, build

ROOT = "/root"  # the kernel's built-in initramfs has it, and /dev/console
BOOT_MARKS_VARIABLE = "CASEMATE_BOOT_MARKS"

_READ_ONLY, _NOSUID, _NODEV, _NOEXEC, _MOVE = 1, 2, 4, 8, 8192
_SAFE = _NOSUID | _NODEV | _NOEXEC
_O_RDONLY, _O_WRONLY, _O_RDWR_CREATE = 0, 1, 0o102
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


def steps(modules: Sequence[str], root: Root) -> list[Step]:
    """The system calls from the kernel's hand-over to the root's program."""
    mark = [
        Step(Call.CLOCK_GETTIME, (_CLOCK_MONOTONIC, clock := Buffer(16))),
        Step(Call.WRITE, (_MARKS_FD, clock, 16)),
    ]
    plan = [Step(Call.OPEN, ("/marks", _O_RDWR_CREATE, 0o600), "casemate: cannot create /marks"), *mark]
    for path in modules:
        plan += [
            Step(Call.OPEN, (path, _O_RDONLY), f"casemate: the initramfs lacks {path}"),
            Step(Call.FINIT_MODULE, (_FD, "", 0), f"casemate: cannot load {path}"),
            Step(Call.CLOSE, (_FD,)),
            Step(Call.UNLINK, (path,)),  # its memory is the guest's
        ]
    plan += [
        *mark,
        Step(Call.MKDIR, ("/dev", 0o755)),
        Step(Call.MOUNT, ("devtmpfs", "/dev", "devtmpfs", _NOSUID, "mode=0755"), "casemate: no devtmpfs"),
        Step(
            Call.MOUNT,
            (root.device, ROOT, root.fstype, _READ_ONLY, ""),
            f"casemate: cannot mount {root.device} as {root.fstype}: is it the image's first disk?",
        ),
        Step(Call.UNLINK, ("/init",)),
        *_read_ahead(root),
        Step(Call.CHDIR, (ROOT,), "casemate: cannot enter the root"),
        Step(Call.MOUNT, (".", "/", "", _MOVE, ""), "casemate: cannot move the root"),
        Step(Call.CHROOT, (".",), "casemate: cannot change the root"),
        Step(Call.CHDIR, ("/",)),
    ]
    for source, target, fstype, flags, options in MOUNTS:
        if target in _MADE_ON_DEV:
            plan.append(Step(Call.MKDIR, (target, 0o755)))
        plan.append(
            Step(Call.MOUNT, (source, target, fstype, flags, options), f"casemate: cannot mount {target}")
        )
    program = root.program[0]
    environment = ("PATH=/usr/bin:/bin", "HOME=/", "LANG=C.UTF-8", f"{BOOT_MARKS_VARIABLE}={_MARKS_FD}")
    plan += [
        *mark,
        Step(
            Call.EXECVE,
            (program, Strings(root.program), Strings(environment)),
            f"casemate: cannot execute {program}",
        ),
    ]
    return plan


def _read_ahead(root: Root) -> list[Step]:
    """Makes the disk's requests few. Only an optimization: nothing here may end the boot."""
    size = str(_READAHEAD_KIB)
    queue = f"{ROOT}/sys/block/{root.device.removeprefix('/dev/')}/queue/read_ahead_kb"
    plan = [
        Step(Call.MOUNT, ("sysfs", f"{ROOT}/sys", "sysfs", _SAFE, "")),
        Step(Call.OPEN, (queue, _O_WRONLY)),
        Step(Call.WRITE, (_FD, size, len(size))),
        Step(Call.CLOSE, (_FD,)),
    ]
    for path in root.wanted:
        plan += [
            Step(Call.OPEN, (ROOT + path, _O_RDONLY)),
            Step(Call.READAHEAD, (_FD, 0, _ALL)),
            Step(Call.CLOSE, (_FD,)),
        ]
    return plan


def initramfs(modules: Mapping[str, bytes], root: Root) -> bytes:
    """The initramfs as an uncompressed cpio archive; modules: file name -> content, in load order."""
    paths = [f"/{name}" for name in modules]
    files = [("init", stat.S_IFREG | 0o755, build(steps(paths, root)))]
    files += [(name, stat.S_IFREG | 0o644, content) for name, content in modules.items()]
    return cpio(files)


def cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive in the kernel's format (Documentation/driver-api/early-userspace/buffer-format.rst).

    files: (path, st_mode, content). No times, no owners: the same files are the same bytes.
    """
    archive = bytearray()
    for number, (path, mode, content) in enumerate([*files, ("TRAILER!!!", 0, b"")], start=1):
        name = path.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
