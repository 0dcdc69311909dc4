"""Templates: machines that were booted once and saved, to be restored instead of booted again.

    ROOT/KEY/ram            the guest's RAM, sparse
    ROOT/KEY/state          everything else of it, QEMU's migration stream
    ROOT/KEY/manifest.json  what it was made of, and the digests of both
    ROOT/tmp/               what is being made or removed

KEY stands for everything that has to be the same for a machine to go on from where the template stopped.
Whoever uses a template has its files open, so it may be removed or replaced at any time. Nothing is taken
from, or put into, a place that others than root could change. It must not know how one is made or restored.
"""

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from config.whole import write_whole
from rpc.errors import DataLoss, InvalidArgument, NotFound, PermissionDenied
from shim.paths import sha256_hex
from shim.trace import write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMAT = 1
RAM, STATE, MANIFEST = "ram", "state", "manifest.json"
STAGING = "tmp"
MOST_MANIFEST_BYTES = 1 << 16
KEY_DIGITS = 32
# How long pods make no template of a key for which that, or restoring from it, has failed.
RETRY_S = 600.0


def key_of(parts: "dict[str, Any]") -> str:
    """32 hexadecimal digits that stand for all of the parts. See template_key.parts()."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return sha256_hex(text)[:KEY_DIGITS]


@dataclass(frozen=True, slots=True)
class Template:
    """One that is there."""

    key: str
    directory: Path
    about: "dict[str, Any]"


@dataclass(frozen=True, slots=True)
class Opened:
    """Descriptors of a verified template's files, at their beginning. They stay good when it is removed."""

    template: Template
    ram: int
    state: int


class TemplateStore:
    """root: where templates are. memory: a directory that remembers which were verified since the boot."""

    def __init__(self, root: Path, memory: Path) -> None:
        self.root = root
        self._memory = memory

    # --- using ---

    def version(self, key: str) -> str:
        """Tells a template from the next one with its key; empty if there is none."""
        try:
            return _mark((self.root / key / MANIFEST).stat())
        except (FileNotFoundError, NotADirectoryError):
            return ""

    @contextmanager
    def opened(self, key: str) -> Iterator[Opened]:
        """The files of a template, verified. Raises NotFound, DataLoss, PermissionDenied."""
        _check_ours(self.root)
        with _opened(self.root / key) as files:
            template = _parse(self.root / key, files[MANIFEST])
            self._verify(template, files)
            with suppress(OSError):
                os.utime(self.root / key)  # when it was last used, for the collection of those that are not
            for name in (RAM, STATE):
                os.lseek(files[name], 0, os.SEEK_SET)  # QEMU reads on from where the verification stopped
            yield Opened(template, files[RAM], files[STATE])

    def _verify(self, template: Template, files: "dict[str, int]") -> None:
        """Reads the files only if they changed since they were last read, or the host was booted."""
        stamp = _stamp(files)
        if self._recall(template.key) == stamp:
            return
        for name in (STATE, RAM):
            try:
                found, expected = digest_of(files[name]), template.about["sha256"][name]
            except OSError as error:
                raise DataLoss(f"{template.directory / name} cannot be read", str(error)) from error
            if found != expected:
                raise DataLoss(
                    f"{template.directory / name} of a template is damaged",
                    f"its digest is {found}, expected {expected}",
                )
        self._remember(template.key, stamp)

    def _recall(self, key: str) -> str:
        try:
            return (self._memory / key).read_text()
        except OSError:
            return ""  # not verified yet, or it could not be remembered

    def _remember(self, key: str, stamp: str) -> None:
        """That the digests of the files with this stamp are right."""
        with suppress(OSError):  # they are verified again next time
            self._memory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._memory / key, stamp.encode())

    # --- failing ---

    def note_useless(self, key: str) -> None:
        """Restoring from an undamaged template has failed. If it was made lately, another one would be no
        better: see failed_lately()."""
        with suppress(FileNotFoundError):
            if 0 <= time.time() - (self.root / key / MANIFEST).stat().st_mtime < RETRY_S:
                self.note_failure(key)

    def note_failure(self, key: str) -> None:
        """Making a template of this key has failed: see failed_lately()."""
        with suppress(OSError):  # then it is tried again at once
            self._memory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._failure(key).touch(mode=0o600)
            os.utime(self._failure(key))

    def failed_lately(self, key: str) -> bool:
        """Whether pods should do without a template for now: what failed is likely to fail again."""
        try:
            age_s = time.time() - self._failure(key).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return False
        return 0 <= age_s < RETRY_S

    def _failure(self, key: str) -> Path:
        return self._memory / f"{key}.failed"

    # --- changing ---

    @contextmanager
    def making(self, key: str) -> Iterator[Path | None]:
        """A directory to make a template in, or None if another process is making the same at this moment.

        What is in it when the context ends without publish() is removed. Raises PermissionDenied.
        """
        _check_key(key)
        staging = self.root / STAGING / key
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        _check_ours(self.root)
        (self.root / STAGING).mkdir(mode=0o700, exist_ok=True)
        with _locked(self.root / STAGING / f"{key}.lock") as ours:
            if not ours:
                yield None
                return
            _remove_tree(staging)  # of a maker that was killed
            staging.mkdir(mode=0o700)
            try:
                yield staging
            finally:
                _remove_tree(staging)

    def publish(self, staging: Path, about: "dict[str, Any]") -> Template:
        """Makes what is in the directory of making() a template, at once; it replaces one of the same key."""
        digests = {}
        for name in (STATE, RAM):
            fd = os.open(staging / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
                digests[name] = digest_of(fd)
            finally:
                os.close(fd)
        write_json(staging / MANIFEST, {"format": FORMAT, **about, "sha256": digests})
        _sync(staging / MANIFEST)
        _sync(staging)
        key = staging.name
        self.remove(key)
        staging.rename(self.root / key)
        _sync(self.root)
        with _opened(self.root / key) as files:
            self._remember(key, _stamp(files))
            template = _parse(self.root / key, files[MANIFEST])
        with suppress(OSError):  # it is there: that it could not be made before is of no interest
            self._failure(key).unlink()
        return template

    def remove(self, key: str, version: str = "") -> bool:
        """False if there is none, or none of that version. Whoever restores from it has it open, and goes
        on. Raises PermissionDenied."""
        _check_key(key)
        _check_ours(self.root)
        if version and self.version(key) != version:
            return False
        doomed = self.root / STAGING / f"{key}.{os.urandom(4).hex()}"
        doomed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            (self.root / key).rename(doomed)
        except FileNotFoundError:
            return False
        _remove_tree(doomed)
        with suppress(OSError):  # its stamp fits no other template
            (self._memory / key).unlink()
        return True

    # --- looking ---

    def keys(self) -> tuple[str, ...]:
        """Of all that are there, those that cannot be read too."""
        try:
            return tuple(name for name in os.listdir(self.root) if _is_key(name))
        except FileNotFoundError:
            return ()

    def list(self) -> tuple[Template, ...]:
        """All that can be read, the one used last first."""
        found = []
        for key in self.keys():
            with suppress(DataLoss, NotFound):
                found.append(load(self.root / key))
        return tuple(sorted(found, key=lambda template: -last_used(template)))

    def gc(self, wanted: "Callable[[Template], bool]", most: int) -> tuple[str, ...]:
        """Removes the unwanted, all but the `most` used last, and what killed makers left. Returns keys.

        Raises PermissionDenied.
        """
        doomed = self.doomed(wanted, most)
        for key in doomed:
            self.remove(key)
        self._sweep()
        return doomed

    def make_room(self, most: int, unused_s: float) -> bool:
        """Whether one more may be made where there may be `most`. What cannot be read goes for it, and those
        that nobody used for so long, the one used first first. Raises PermissionDenied."""
        now_s, there = time.time(), self.list()
        unused = [template.key for template in there if now_s - last_used(template) >= unused_s]
        unreadable = set(self.keys()) - {template.key for template in there}
        goes = [*unreadable, *reversed(unused)]
        while len(self.keys()) >= most and goes:
            self.remove(goes.pop(0))
        return len(self.keys()) < most

    def doomed(self, wanted: "Callable[[Template], bool]", most: int) -> tuple[str, ...]:
        """The keys of those that gc() would remove: also of what cannot be read, as no pod will."""
        kept = {template.key for template in [known for known in self.list() if wanted(known)][:most]}
        return tuple(key for key in self.keys() if key not in kept)

    def _sweep(self) -> None:
        try:
            names = os.listdir(self.root / STAGING)
        except FileNotFoundError:
            return
        for name in names:
            key = name.partition(".")[0]
            if not _is_key(key):
                continue
            with self.making(key) as staging:  # it removes what a maker of this key has left
                if staging is not None and name not in (staging.name, f"{key}.lock"):
                    _remove_tree(self.root / STAGING / name)


def _check_ours(root: Path) -> None:
    """Who could put a template there would decide what runs in the machines of others' pods. In memory
    (/dev/shm) anybody might have made the directory first.

    Each directory on the way, and each link, is root's (or the caller's), and nobody else may write there,
    but on the way where only their owner may rename things (sticky). Raises PermissionDenied.
    """
    for way in {os.path.abspath(root), os.path.realpath(root)}:
        for place in (way, *map(str, Path(way).parents)):
            try:
                about = os.lstat(place)
            except FileNotFoundError:
                continue
            sticky = place != way and about.st_mode & stat.S_ISVTX
            if about.st_uid in (0, os.geteuid()) and (sticky or not _lets_others_write(about)):
                continue
            raise PermissionDenied(
                f"templates in {root} are not used",
                f"others than root can write to {place}, or it is theirs",
                hint="move template_dir, or chown root and chmod go-w",
            )


def _lets_others_write(about: os.stat_result) -> bool:
    if stat.S_ISLNK(about.st_mode):
        return False  # a link has every bit, and none of them counts
    by_group = about.st_mode & stat.S_IWGRP and about.st_gid not in (0, os.getegid())
    return bool(about.st_mode & stat.S_IWOTH or by_group)


def last_used(template: Template) -> float:
    """Seconds since the epoch; 0 if it is gone."""
    try:
        return template.directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def load(directory: Path) -> Template:
    """Raises NotFound, DataLoss."""
    try:
        fd = os.open(directory / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"no template in {directory}") from error
    try:
        return _parse(directory, fd)
    finally:
        os.close(fd)


def _parse(directory: Path, manifest: int) -> Template:
    try:
        about = json.loads(os.pread(manifest, MOST_MANIFEST_BYTES, 0))
        digests = about["sha256"]
        if (
            about["format"] != FORMAT
            or not isinstance(digests[RAM], str)
            or not isinstance(digests[STATE], str)
        ):
            raise ValueError("of another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{directory / MANIFEST} cannot be read", str(error)) from error
    return Template(directory.name, directory, about)


def digest_of(fd: int) -> str:
    """SHA-256 over where a file's data lie and what they are; its holes cost nothing. Raises OSError."""
    from hashlib import sha256  # OpenSSL's: the fastest one

    from shim.vm.ram import BLOCK_BYTES, COPY_BYTES, extents

    digest = sha256()
    zeros = bytes(BLOCK_BYTES)
    digest.update(os.fstat(fd).st_size.to_bytes(8, "little"))
    for start, end in extents(fd):
        for offset in range(start, end, COPY_BYTES):
            chunk = memoryview(os.pread(fd, min(COPY_BYTES, end - offset), offset))
            for position in range(0, len(chunk), BLOCK_BYTES):
                block = chunk[position : position + BLOCK_BYTES]
                # Which zeros are holes is the file system's affair.
                if block != zeros[: len(block)]:
                    digest.update((offset + position).to_bytes(8, "little"))
                    digest.update(block)
    return digest.hexdigest()


@contextmanager
def _opened(directory: Path) -> "Iterator[dict[str, int]]":
    """Descriptors of a template's files, all of one template, by their names. Raises NotFound."""
    with ExitStack() as opened:
        try:
            top = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, top)
            files = {}
            for name in (RAM, STATE, MANIFEST):
                files[name] = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=top)
                opened.callback(os.close, files[name])
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFound(f"{directory} is no template", f"no file {error.filename}") from error
        except OSError as error:
            raise DataLoss(f"the files of {directory} cannot be opened", str(error)) from error
        yield files


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the lock is ours; then its file is removed at the end."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            if not _is_file(path, fd):
                continue  # its holder removed it between our open and our lock
            try:
                yield True
            finally:
                path.unlink()
            return
        finally:
            os.close(fd)


def _is_file(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def _is_key(name: str) -> bool:
    return len(name) == KEY_DIGITS and set(name) <= set("0123456789abcdef")


def _check_key(key: str) -> None:
    if not _is_key(key):
        raise InvalidArgument(f"{key!r} is no key of a template")


def _mark(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"


def _stamp(files: "dict[str, int]") -> str:
    """Changes with every change of the files, and with every boot of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    return " ".join([boot_id, *(_mark(os.fstat(files[name])) for name in (STATE, RAM, MANIFEST))])


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_tree(directory: Path) -> None:
    from shutil import rmtree

    with suppress(FileNotFoundError):
        rmtree(directory)


if TYPE_CHECKING:
    from collections.abc import Callable
