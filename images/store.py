"""The content-addressed store of guest images: several versions side by side, shared and removed safely.

    ROOT/images/HEX/     one image (images/image.py); HEX is the sha256 of its manifest
    ROOT/names/NAME      -> ../images/HEX
    ROOT/tmp/            images that are being added or removed
    ROOT/lock            held by whoever changes the store; readers need no lock

An image in use holds a shared lock on its directory (lease); removing one needs the exclusive lock.
The shim imports this at every pod's start: heavy imports stay inside the functions that need them.
Must not know how images are made.
"""

import builtins
import errno
import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import places
from images.files import make_directory, write_new
from images.image import (
    BUILD_HINT,
    INITRD,
    KERNEL,
    MANIFEST,
    PREFIX,
    ROOTFS,
    SCHEMA,
    GuestImage,
    check_name,
    encode_manifest,
    load,
    sha256_of,
)
from images.verified import Verifier
from rpc.errors import (
    CasemateError,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)

DEFAULT_ROOT = "/var/lib/casemate/images"
_SHORTEST = 6  # digits of an abbreviated digest
_HEX_DIGITS = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Listed:
    """An image in the store and the names it has. problem: why it cannot be used, or empty."""

    digest: str
    names: tuple[str, ...]
    image: GuestImage | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Collected:
    """What gc did: digests removed, and digests left because they are in use."""

    removed: tuple[str, ...]
    in_use: tuple[str, ...]


class ImageStore:
    """root: $CASEMATE_IMAGE_DIR or /var/lib/casemate/images; run: config/places.py's."""

    def __init__(self, root: Path | None = None, run: Path | None = None) -> None:
        self.root = root or Path(os.environ.get(places.IMAGE_DIR_VARIABLE) or DEFAULT_ROOT)
        self._images = self.root / "images"
        self._names = self.root / "names"
        self._staging = self.root / "tmp"
        run = run or Path(places.run_dir())
        self._verifier = Verifier(run / "cache/verified")

    # --- finding and using ---

    def resolve(self, reference: str) -> GuestImage:
        """The image with this name or (abbreviated) digest. Reads its manifest, verifies nothing.

        Raises NotFound, InvalidArgument (not a reference, or an abbreviation of several), DataLoss.
        """
        hex_ = self._find(reference)
        return load(self._images / hex_, reference if reference in self.names() else "")

    def verify(self, image: GuestImage, *, full: bool = False) -> None:
        """Raises DataLoss naming the file that is not what the manifest says. See Verifier.verify."""
        self._verifier.verify(image, full=full)

    @contextmanager
    def lease(self, image: GuestImage) -> Iterator[GuestImage]:
        """Holds an image: while in the context it is neither removed nor collected."""
        with _opened(image.directory) as fd:
            fcntl.flock(fd, fcntl.LOCK_SH)
            _check_still_there(image.directory, fd)
            yield image

    def list(self) -> tuple[Listed, ...]:
        """Everything in the store, the damaged too."""
        names = self.names()
        return tuple(
            self._listed(hex_, tuple(name for name, named in names.items() if named == hex_))
            for hex_ in self._digests()
        )

    def _listed(self, hex_: str, names: tuple[str, ...]) -> Listed:
        try:
            return Listed(PREFIX + hex_, names, load(self._images / hex_, *names[:1]))
        except CasemateError as error:
            return Listed(PREFIX + hex_, names, None, str(error))

    def names(self) -> dict[str, str]:
        """name -> hexadecimal digest."""
        try:
            entries = sorted(os.listdir(self._names))
        except FileNotFoundError:
            return {}
        return {n: os.path.basename(os.readlink(self._names / n)) for n in entries if not n.startswith(".")}

    def _digests(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(os.listdir(self._images)))
        except FileNotFoundError:
            return ()

    def _find(self, reference: str) -> str:
        digits = reference.removeprefix(PREFIX)
        if not reference.startswith(PREFIX):
            check_name(reference)
            named = self.names().get(reference)
            if named:
                return named
        if len(digits) >= _SHORTEST and _HEX_DIGITS.issuperset(digits):
            matches = [hex_ for hex_ in self._digests() if hex_.startswith(digits)]
            if len(matches) > 1:
                raise InvalidArgument(f"guest image {reference} is ambiguous", ", ".join(matches))
            if matches:
                return matches[0]
        raise NotFound(f"no guest image {reference} in {self.root}", hint=BUILD_HINT)

    # --- changing ---

    def add(self, name: str, files: Mapping[str, Path], about: Mapping[str, Any]) -> GuestImage:
        """Adds an image and gives it a name, which another may have had until then.

        files: KERNEL, ROOTFS and perhaps INITRD -> where they are; they are copied, and shared with
        an image that has the same. about: what the manifest says besides, at least "cmdline".
        Whoever looks meanwhile sees the whole image or none.
        """
        check_name(name)
        if "cmdline" not in about or not {KERNEL, ROOTFS} <= set(files) <= {KERNEL, ROOTFS, INITRD}:
            raise InvalidArgument(f"an image needs {KERNEL}, {ROOTFS} and a cmdline, got {sorted(files)}")
        with self._enough_space(), self._changing(), self._stage() as stage:
            listed = {}
            for file, source in sorted(files.items()):
                digest = self._place(source, stage / file)
                listed[file] = {"sha256": digest, "bytes": (stage / file).stat().st_size}
            write_new(stage / MANIFEST, encode_manifest({**about, "schema": SCHEMA, "files": listed}))
            _sync(stage / MANIFEST)
            _sync(stage)
            hex_ = sha256_of(stage / MANIFEST)
            self._install(stage, hex_)
            self._tag(name, hex_)
            return load(self._images / hex_, name)

    def _tag(self, name: str, hex_: str) -> None:
        temporary = self._names / f".{name}"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"../images/{hex_}")
        temporary.rename(self._names / name)

    def remove(self, reference: str) -> str:
        """Removes an image by its digest, or its only name; one of several names is only taken off it.

        Returns the image's digest. Raises FailedPrecondition if it is in use.
        """
        with self._changing():
            hex_ = self._find(reference)
            names = self.names()
            if names.get(reference) == hex_ and list(names.values()).count(hex_) > 1:
                (self._names / reference).unlink()
                return PREFIX + hex_
            removed = self._remove(hex_)
        if not removed:
            raise FailedPrecondition(
                f"guest image {reference} is in use", hint="casemate ps shows the pods; end them first"
            )
        return PREFIX + hex_

    def gc(self) -> Collected:
        """Removes images without a name that nobody uses, and what interrupted additions left behind."""
        removed: builtins.list[str] = []
        in_use: builtins.list[str] = []
        with self._changing():
            named = set(self.names().values())
            for hex_ in self._digests():
                if hex_ not in named:
                    (removed if self._remove(hex_) else in_use).append(PREFIX + hex_)
            for leftover in self._staging.iterdir():
                _delete(leftover)
        return Collected(tuple(removed), tuple(in_use))

    def _remove(self, hex_: str) -> bool:
        """False if it is in use."""
        directory = self._images / hex_
        with _opened(directory) as fd:
            if not _locked_alone(fd):
                return False
            for name, named in self.names().items():
                if named == hex_:
                    (self._names / name).unlink(missing_ok=True)
            with self._stage() as doomed:
                directory.rename(doomed / hex_)  # at once, so that nobody finds half of it
        return True

    @contextmanager
    def _changing(self) -> Iterator[None]:
        for directory in (self._images, self._names, self._staging):
            make_directory(directory)
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _enough_space(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ResourceExhausted(
                f"no space left in {self.root} for a guest image", error.strerror, hint="casemate image gc"
            ) from error

    @contextmanager
    def _stage(self) -> Iterator[Path]:
        """A directory to fill, gone afterwards if it was not put somewhere else."""
        from tempfile import mkdtemp

        stage = Path(mkdtemp(dir=self._staging))
        try:
            stage.chmod(0o755)
            yield stage
        finally:
            if stage.exists():
                _delete(stage)

    def _place(self, source: Path, target: Path) -> str:
        """Puts a file's content at target, shared with an image that has it already. Returns its sha256."""
        from shutil import copyfile

        digest = sha256_of(source)
        for listed in self.list():
            if listed.image is None:
                continue
            entry = listed.image.manifest["files"].get(target.name)
            other = listed.image.directory / target.name
            if entry is None or entry["sha256"] != digest or not other.exists() or sha256_of(other) != digest:
                continue
            try:
                os.link(other, target)
            except OSError:
                break  # removed just now, or out of links: copy it
            return digest
        copyfile(source, target)
        target.chmod(0o644)
        _sync(target)
        if sha256_of(target) != digest:
            raise DataLoss(f"{source} changed while it was copied")
        return digest

    def _install(self, stage: Path, hex_: str) -> None:
        target = self._images / hex_
        try:
            stage.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            try:
                self.verify(load(target), full=True)
                return  # the same image was there
            except (DataLoss, NotFound) as damage:
                if not self._remove(hex_):
                    raise FailedPrecondition(
                        f"{target} is damaged and in use", str(damage), hint="end the pods that use it"
                    ) from damage
            stage.rename(target)
        _sync(self._images)


@contextmanager
def _opened(directory: Path) -> Iterator[int]:
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"guest image {directory.name[:12]} is not there", hint=BUILD_HINT) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _locked_alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _check_still_there(directory: Path, fd: int) -> None:
    """After the lock was taken: is the locked directory still the one at its path?"""
    try:
        now = os.stat(directory)
    except FileNotFoundError:
        now = None
    held = os.fstat(fd)
    if now is None or (now.st_ino, now.st_dev) != (held.st_ino, held.st_dev):
        raise NotFound(f"guest image {directory.name[:12]} was removed just now", hint=BUILD_HINT)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _delete(directory: Path) -> None:
    from shutil import rmtree

    rmtree(directory)
