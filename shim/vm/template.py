"""Templates: machines that were booted once and saved, to be restored instead of booted again.

    ROOT/KEY/ram            the guest's RAM, sparse
    ROOT/KEY/state          everything else of it, QEMU's migration stream
    ROOT/KEY/manifest.json  what it was made of, and the digests of both
    ROOT/tmp/               what is being made or removed

KEY stands for everything that has to be the same for a machine to go on from where the template stopped.
A template in use holds a shared lock on its directory. It must not know how one is made or restored.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from rpc.errors import DataLoss, InvalidArgument, NotFound
from shim.trace import write_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FORMAT = 1
RAM, STATE, MANIFEST = "ram", "state", "manifest.json"
STAGING = "tmp"
MOST_STATE_BYTES = 64 << 20
KEY_DIGITS = 32


def key_of(parts: "dict[str, Any]") -> str:
    """32 hexadecimal digits that stand for all of the parts. See designer.template_parts()."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True)
    return sha256(text.encode()).hexdigest()[:KEY_DIGITS]


@dataclass(frozen=True, slots=True)
class Template:
    """One that is there. Its files are opened by whoever uses it."""

    key: str
    directory: Path
    about: "dict[str, Any]"

    @property
    def ram(self) -> Path:
        return self.directory / RAM

    @property
    def state(self) -> Path:
        return self.directory / STATE


class TemplateStore:
    """root: where templates are. memory: a directory that remembers which were verified since the boot."""

    def __init__(self, root: Path, memory: Path) -> None:
        self.root = root
        self._memory = memory

    # --- using ---

    def has(self, key: str) -> bool:
        return (self.root / key / MANIFEST).exists()

    @contextmanager
    def lease(self, key: str) -> Iterator[Template]:
        """A verified template that is not removed while in the context. Raises NotFound, DataLoss."""
        directory = self.root / key
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"no template {key}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            template = load(directory)
            self._verify(template)
            with suppress(OSError):
                os.utime(fd)  # when it was last used, for the collection of those that are not
            yield template
        finally:
            os.close(fd)

    def _verify(self, template: Template) -> None:
        """Reads the files only if they changed since they were last read, or the host was booted."""
        stamp = _stamp(template)
        if self._recall(template.key) == stamp:
            return
        for path, name in ((template.state, STATE), (template.ram, RAM)):
            found = digest_of(path)
            if found != template.about["sha256"][name]:
                raise DataLoss(
                    f"{path} of a template is damaged",
                    f"its digest is {found}, expected {template.about['sha256'][name]}",
                )
        self.remember(template)

    def _recall(self, key: str) -> str:
        try:
            return (self._memory / key).read_text()
        except OSError:
            return ""  # not verified yet, or it could not be remembered

    def remember(self, template: Template) -> None:
        """That its digests are right, as long as its files stay as they are."""
        with suppress(OSError):  # it is verified again next time
            self._memory.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = self._memory / f".{template.key}.{os.urandom(4).hex()}"
            partial.write_text(_stamp(template))
            partial.replace(self._memory / template.key)

    # --- changing ---

    @contextmanager
    def making(self, key: str) -> Iterator[Path | None]:
        """A directory to make a template in, or None if another process is making the same at this moment.

        What is in it when the context ends without publish() is removed.
        """
        staging = self.root / STAGING / key
        (self.root / STAGING).mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.root / STAGING / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            _remove_tree(staging)  # of a maker that was killed
            staging.mkdir(mode=0o700)
            try:
                yield staging
            finally:
                _remove_tree(staging)
        finally:
            os.close(lock)

    def publish(self, staging: Path, about: "dict[str, Any]") -> Template:
        """Makes what is in the directory of making() a template, at once; it replaces one of the same key."""
        digests = {name: digest_of(staging / name) for name in (STATE, RAM)}
        document = {"format": FORMAT, **about, "sha256": digests}
        write_json(staging / MANIFEST, document)
        for name in (STATE, RAM, MANIFEST):
            _sync(staging / name)
        key = staging.name
        self.remove(key)
        staging.rename(self.root / key)
        _sync(self.root)
        template = load(self.root / key)
        self.remember(template)
        return template

    def remove(self, key: str) -> bool:
        """False if there is none. One that is being restored from goes on in what it has opened."""
        if not key or not set(key) <= set("0123456789abcdef"):
            raise InvalidArgument(f"{key!r} is no key of a template")
        doomed = self.root / STAGING / f"{key}.{os.urandom(4).hex()}"
        doomed.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            (self.root / key).rename(doomed)
        except FileNotFoundError:
            return False
        _remove_tree(doomed)
        with suppress(FileNotFoundError):
            (self._memory / key).unlink()
        return True

    # --- looking ---

    def list(self) -> tuple[Template, ...]:
        """All that can be read, the one used last first."""
        try:
            names = [name for name in os.listdir(self.root) if name != STAGING]
        except FileNotFoundError:
            return ()
        found = []
        for name in names:
            with suppress(DataLoss, NotFound):
                found.append(load(self.root / name))
        return tuple(sorted(found, key=lambda template: -last_used(template)))

    def gc(self, wanted: "Callable[[Template], bool]", most: int) -> tuple[str, ...]:
        """Removes the unwanted, all but the `most` used last, and what killed makers left. Returns keys."""
        doomed = self.doomed(wanted, most)
        for key in doomed:
            self.remove(key)
        self._sweep()
        return doomed

    def doomed(self, wanted: "Callable[[Template], bool]", most: int) -> tuple[str, ...]:
        """The keys of those that gc() would remove."""
        there = self.list()
        kept = {template.key for template in [known for known in there if wanted(known)][:most]}
        return tuple(template.key for template in there if template.key not in kept)

    def _sweep(self) -> None:
        try:
            names = os.listdir(self.root / STAGING)
        except FileNotFoundError:
            return
        for name in names:
            if name.endswith(".lock"):
                continue
            with self.making(name.partition(".")[0]) as staging:
                if staging is not None and (self.root / STAGING / name).is_dir():
                    _remove_tree(self.root / STAGING / name)


def last_used(template: Template) -> float:
    """Seconds since the epoch; 0 if it is gone."""
    try:
        return template.directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def load(directory: Path) -> Template:
    """Raises NotFound, DataLoss."""
    try:
        about = json.loads((directory / MANIFEST).read_text())
        digests = about["sha256"]
        if (
            about["format"] != FORMAT
            or not isinstance(digests[RAM], str)
            or not isinstance(digests[STATE], str)
        ):
            raise ValueError("of another format")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"no template in {directory}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataLoss(f"{directory / MANIFEST} cannot be read", str(error)) from error
    return Template(directory.name, directory, about)


def digest_of(path: Path) -> str:
    """SHA-256 over where a file's data lie and what they are; its holes cost nothing. Raises NotFound."""
    from shim.vm.ram import BLOCK_BYTES, COPY_BYTES, extents

    digest = sha256()
    zeros = bytes(BLOCK_BYTES)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"{path} of a template is missing") from error
    try:
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
    finally:
        os.close(fd)
    return digest.hexdigest()


def _stamp(template: Template) -> str:
    """Changes with every change of the files, and with every boot of the host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        words = [file.read().strip()]
    for path in (template.state, template.ram, template.directory / MANIFEST):
        try:
            status = path.stat()
        except FileNotFoundError as error:
            raise NotFound(f"{path} of a template is missing") from error
        words.append(
            f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}:{status.st_ctime_ns}"
        )
    return " ".join(words)


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
