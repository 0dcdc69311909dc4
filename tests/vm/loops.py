"""A block device of the host's with a file below it, and programs that look at it in a container."""

from pathlib import Path

from bench.storage import losetup

SIZE = 8 << 20
LOOK = """\
import os, stat, sys
path = sys.argv[1]
fd = os.open(path, os.O_RDONLY)
print(stat.S_ISBLK(os.stat(path).st_mode), os.lseek(fd, 0, os.SEEK_END), os.pread(fd, 6, 512).decode())
"""
WRITE = """\
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
os.pwrite(fd, b"guest!" + bytes(506), 4096)
os.fsync(fd)
"""


class Loop:
    """A loop device of the host's with a file below it."""

    def __init__(self, file: Path, *options: str) -> None:
        self.file = file
        file.write_bytes(bytes(512) + b"host's" + bytes(SIZE - 518))
        self.path = losetup("--find", "--show", *options, file)

    @property
    def option(self) -> tuple[str, ...]:
        return ("--device", self.path)

    def close(self) -> None:
        losetup("--detach", self.path)
