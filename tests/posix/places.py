"""Where in a container files can be, and what it takes to have it so. It knows ctr's options."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.storage import losetup
from rpc.errors import FailedPrecondition

DISK_BYTES = 512 << 20
VOLUME_NAME = "volume"
MOUNT = """\
import ctypes, os, sys
os.mkdir("/tried")
libc = ctypes.CDLL(None, use_errno=True)
if libc.mount(sys.argv[1].encode(), b"/tried", b"ext4", 0, None):
    sys.exit(os.strerror(ctypes.get_errno()))
"""

Options = tuple[str, ...]
Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """path: the directory in the container. given: with a directory of the host's, and for as long as it is
    needed, what `ctr run` is told, and what the container has to run first. shared: what of that directory
    the container has, if any.
    """

    name: str
    path: str
    given: Callable[[Path], AbstractContextManager[tuple[Options, Command]]]
    shared: str = ""


@contextmanager
def _nothing(_: Path) -> Iterator[tuple[Options, Command]]:
    yield (), ("mkdir", "/tried")


@contextmanager
def _volume(work: Path) -> Iterator[tuple[Options, Command]]:
    directory = work / VOLUME_NAME
    directory.mkdir()
    yield ("--mount", f"type=bind,src={directory},dst=/tried,options=rbind:rw"), ()


@contextmanager
def _tmpfs(_: Path) -> Iterator[tuple[Options, Command]]:
    yield ("--mount", "type=tmpfs,src=tmpfs,dst=/tried,options=mode=755"), ()


@contextmanager
def _disk(work: Path) -> Iterator[tuple[Options, Command]]:
    file = work / "disk"
    with file.open("wb") as made:
        made.truncate(DISK_BYTES)
    done = subprocess.run(["mkfs.ext4", "-q", file], capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedPrecondition("mkfs.ext4 failed", done.stderr)
    device = losetup("--find", "--show", file)
    try:
        mounting = ("python3", "-c", MOUNT, device)
        yield ("--device", device, "--cap-add", "CAP_SYS_ADMIN"), mounting
    finally:
        losetup("--detach", device)


ROOT, VOLUME, TMPFS, DISK = (
    Place("root file system", "/tried", _nothing),
    Place("volume", "/tried", _volume, VOLUME_NAME),
    Place("tmpfs", "/tried", _tmpfs),
    Place("block device", "/tried", _disk),
)
PLACES = (ROOT, VOLUME, TMPFS, DISK)
