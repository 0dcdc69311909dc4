"""What `make install` and `make demo` created on this machine, for `make uninstall` to take away again.

Each thing is written down before it is made; taking it away when it was never made is no error.
Must not know why a thing was created.
"""

import json
import os
import select
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from hashlib import sha256
from pathlib import Path

from rpc.errors import CasemateError, DeadlineExceeded, FailedPrecondition, InvalidArgument
from scripts.host import executable, missing_packages, run, say, succeeds

MANIFEST = Path("/var/lib/casemate/install.json")
# No mistake in a manifest may cost more than one directory.
SYSTEM_DIRECTORIES = frozenset(
    "/ /bin /boot /dev /etc /home /lib /lib64 /media /mnt /opt /proc /root /run /sbin /srv /sys /tmp /usr "
    "/usr/bin /usr/lib /usr/local /usr/local/bin /usr/sbin /usr/share /var /var/cache /var/lib /var/log "
    "/var/tmp".split()
)


class Kind(StrEnum):
    TREE = "tree"  # a directory and all that is in it
    SHARED_TREE = "shared-tree"  # the same, if nobody else has come to use it: no socket in it is listened on
    FILE = "file"  # detail: sha256 of what was written; one that somebody changed is kept
    DIRECTORY = "directory"  # taken away only when empty: what an operator put into it is his
    USER = "user"  # detail: the Debian package that would have made it, and keeps it if it came since
    DAEMON = "daemon"  # name: pid file (pid and start time), detail: what it is called
    SERVICE = "service"  # a unit file of systemd's; detail: its sha256, as with a file
    CONTAINERD_IMAGE = "containerd-image"  # detail: containerd's address


@dataclass(frozen=True, slots=True)
class Item:
    kind: Kind
    name: str
    detail: str = ""


@dataclass(slots=True)
class Manifest:
    """prefix and stamp say what is installed where; items are in the order of their making."""

    prefix: str = ""
    stamp: str = ""
    items: list[Item] = field(default_factory=list)
    path: Path = MANIFEST

    @classmethod
    def read(cls, path: Path = MANIFEST) -> "Manifest":
        try:
            held = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(path=path)
        items = [Item(Kind(item["kind"]), item["name"], item["detail"]) for item in held["items"]]
        return cls(held["prefix"], held["stamp"], items, path)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"prefix": self.prefix, "stamp": self.stamp, "items": [asdict(item) for item in self.items]},
            indent=1,
        )
        scratch = self.path.with_suffix(".new")
        scratch.write_text(text + "\n")
        scratch.rename(self.path)

    def holds(self, kind: Kind, name: str | Path) -> bool:
        return any(item.kind is kind and item.name == str(name) for item in self.items)

    def record(self, kind: Kind, name: str | Path, detail: str = "") -> None:
        """Before the thing is made. What was recorded before keeps its place and takes the new detail."""
        new = Item(kind, str(name), detail)
        if new in self.items:
            return
        for place, item in enumerate(self.items):
            if (item.kind, item.name) == (kind, new.name):
                self.items[place] = new
                break
        else:
            self.items.append(new)
        self.write()

    def undo(self) -> list[CasemateError]:
        """Take everything away, last first; what fails stays recorded and is returned."""
        failures = []
        for item in reversed(self.items.copy()):
            try:
                UNDO[item.kind](item)
            except CasemateError as error:
                failures.append(error)
                continue
            except OSError as error:
                failures.append(CasemateError(f"{item.name} could not be removed", details=str(error)))
                continue
            self.items.remove(item)
            self.write()
        return failures


def file_digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def mounts_below(path: Path) -> list[str]:
    """Mount points at or below path, as this process sees them."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point == str(path) or point.startswith(f"{path}/")]


def _remove_tree(item: Item) -> None:
    path = Path(item.name)
    if not path.is_absolute() or item.name in SYSTEM_DIRECTORIES:
        raise InvalidArgument(f"{item.name} is not ours to remove")
    if mounts := mounts_below(path):  # what is mounted there belongs to somebody: never delete through it
        raise FailedPrecondition(f"{item.name} has something mounted: {', '.join(mounts)}", hint="umount it")
    if path.exists():
        shutil.rmtree(path)
        say(f"removed {item.name}")


def listens(path: Path) -> bool:
    """Whether somebody accepts connections at this unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:  # nobody there, or a socket of another type
            return False
    return True


def _remove_shared_tree(item: Item) -> None:
    path = Path(item.name)
    if used := [str(found) for found in path.rglob("*") if found.is_socket() and listens(found)]:
        say(f"kept {path}: somebody listens at {', '.join(used)}")
        return
    _remove_tree(item)


def _remove_file(item: Item) -> None:
    path = Path(item.name)
    if not path.exists():
        return
    if file_digest(path) != item.detail:
        say(f"kept {path}: it is not as it was installed")
        return
    path.unlink()
    say(f"removed {path}")


def _remove_directory(item: Item) -> None:
    path = Path(item.name)
    if not path.is_dir():
        return
    if any(path.iterdir()):
        say(f"kept {path}: it is not empty")
        return
    path.rmdir()
    say(f"removed {path}")


def _remove_user(item: Item) -> None:
    if not succeeds(["getent", "passwd", item.name]):
        return
    if not missing_packages([item.detail]):
        say(f"kept the user {item.name}: {item.detail} was installed since and needs it")
        return
    run(["userdel", item.name], quiet=True)
    if succeeds(["getent", "group", item.name]):
        run(["groupdel", item.name], quiet=True)
    say(f"removed the user {item.name}")


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat: with the pid it names one process for ever. None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat[stat.rindex(")") + 2 :].split()
    return None if state in "ZX" else int(fields[18])


def running_daemon(pid_file: Path) -> int | None:
    """The pid in a pid file of ours, if that very process still runs."""
    try:
        pid, started = (int(word) for word in pid_file.read_text().split())
    except (FileNotFoundError, ValueError):
        return None
    return pid if start_time(pid) == started else None


def stop_daemon(pid_file: Path, timeout_s: float = 20.0) -> bool:
    """End it by SIGTERM and wait for its end. Whether it ran."""
    pid = running_daemon(pid_file)
    if pid is None:
        pid_file.unlink(missing_ok=True)
        return False
    handle = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(handle, signal.SIGTERM)
        readable, _, _ = select.select(
            [handle], [], [], timeout_s
        )  # a pidfd is readable when its process ended
    finally:
        os.close(handle)
    if not readable:
        raise DeadlineExceeded(f"process {pid} did not end within {timeout_s:.0f} s of SIGTERM")
    pid_file.unlink(missing_ok=True)
    return True


def _stop_daemon(item: Item) -> None:
    if stop_daemon(Path(item.name)):
        say(f"stopped {item.detail}")


def _remove_service(item: Item) -> None:
    """Stopped and disabled before its file goes; pods outlive it."""
    path = Path(item.name)
    if not path.exists():
        return
    run(["systemctl", "disable", "--quiet", "--now", path.name], quiet=True)
    _remove_file(item)
    run(["systemctl", "daemon-reload"], quiet=True)


def _remove_image(item: Item) -> None:
    ctr = executable("ctr")
    if ctr is None or not Path(item.detail).is_socket():
        return
    if succeeds([ctr, "--address", item.detail, "images", "rm", "--sync", item.name]):
        say(f"removed the image {item.name} from containerd")


UNDO: dict[Kind, Callable[[Item], None]] = {
    Kind.TREE: _remove_tree,
    Kind.SHARED_TREE: _remove_shared_tree,
    Kind.FILE: _remove_file,
    Kind.DIRECTORY: _remove_directory,
    Kind.USER: _remove_user,
    Kind.DAEMON: _stop_daemon,
    Kind.SERVICE: _remove_service,
    Kind.CONTAINERD_IMAGE: _remove_image,
}
