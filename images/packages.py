"""Debian packages, resolved and downloaded by apt, verified by its signatures, unpacked and cached.

Used by guest images and by the OCI images of demo and tests. Must not know what is made of them.
"""

import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from urllib.parse import unquote

from images.apt import mirror_lines, read_sources, source_lines
from images.files import locked, make_directory
from images.run import run
from rpc.errors import CasemateError, FailedPrecondition

log = logging.getLogger(__name__)

CACHE_VARIABLE = "CASEMATE_CACHE_DIR"
_APT_HELPER = "/usr/lib/apt/apt-helper"
_ARCHIVES = "var/cache/apt/archives"
_DPKG_STATUS = "var/lib/dpkg/status"
_CONTENT, _VERSIONS = "content", "versions.json"
_UNREAD = ("doc", "man", "locale", "info", "lintian")  # of /usr/share: nobody reads them in a container
_INSTALL_OPTIONS = (
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in _UNREAD),
    # what mmdebstrap copies from this host, and what names its mirror
    '--customize-hook=rm -f "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/apt/sources.list',
)
_KEPT_PER_REQUEST = 2  # what the mirror has now, and what it had before
_FORMAT = 2  # of the cache; raised when an older entry cannot be used


MAIN = ("main",)


class Form(StrEnum):
    """How packages are delivered."""

    UNPACKED = "extract"  # a directory: their files and those of what they depend on, nothing configured
    INSTALLED = "essential"  # a tar archive: a small Debian system with them installed in it


@dataclass(frozen=True, slots=True)
class Request:
    packages: tuple[str, ...]
    form: Form = Form.UNPACKED
    suite: str = "trixie"
    architecture: str = "amd64"
    mirror: str = ""  # instead of the machine's own
    components: tuple[str, ...] = MAIN  # of Debian's archive


@dataclass(frozen=True, slots=True)
class Fetched:
    """path: the directory or archive, read-only for its users. versions: package -> version."""

    path: Path
    versions: Mapping[str, str]


def cache_dir() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "/var/cache/casemate")


def fetch(request: Request, cache: Path | None = None, *, apt_etc: Path | None = None) -> Fetched:
    """What was requested, from the cache if the mirror's index has not changed since.

    Without a network, what the same request got last is used, and said so.
    Raises FailedPrecondition with apt's own words if there is neither.
    """
    home = (cache or cache_dir()) / "packages"
    make_directory(home)
    lines = _lines(request, apt_etc)
    recipe = _recipe(request)
    with locked(home / f"{recipe}.lock"):
        try:
            entry = home / f"{recipe}-{_digest([lines, _index_digests(lines)])}"
        except CasemateError as error:
            newest = _entries(home, recipe)
            if not newest:
                raise
            log.warning("using packages fetched earlier: %s", error)
            return _load(newest[0])
        if not entry.exists():
            with tempfile.TemporaryDirectory(prefix="fetch-", dir=home) as scratch:
                made = Path(scratch, "entry")
                _unpack(request, lines, made)
                made.rename(entry)
        os.utime(entry)  # the newest is the one used last
        for old in _entries(home, recipe)[_KEPT_PER_REQUEST:]:
            shutil.rmtree(old)
        return _load(entry)


def kept(request: Request, cache: Path | None = None) -> bool:
    """Whether it has been fetched here, whatever the mirror has by now."""
    return bool(_entries((cache or cache_dir()) / "packages", _recipe(request)))


def sources_of(request: Request) -> list[str]:
    """The lines of sources.list by which a request is fetched."""
    return _lines(request, None)


def _recipe(request: Request) -> str:
    """Names what is kept of a request. What is fetched from main alone is named as it was before there was a
    choice."""
    fields = asdict(request)
    if request.components == MAIN:
        del fields["components"]
    return _digest([_FORMAT, fields])


def _lines(request: Request, apt_etc: Path | None) -> list[str]:
    if request.mirror:
        return mirror_lines(request.suite, request.mirror, request.components)
    sources = read_sources(apt_etc) if apt_etc else read_sources()
    return source_lines(request.suite, sources, request.components)


def _unpack(request: Request, lines: Sequence[str], entry: Path) -> None:
    entry.mkdir(mode=0o755)
    target = entry / _CONTENT
    include = f"--include={','.join(request.packages)}"
    common = ["mmdebstrap", "--quiet", f"--variant={request.form}", f"--architectures={request.architecture}"]
    where = [request.suite, str(target), *lines]
    if request.form is Form.UNPACKED:
        _mmdebstrap([*common, "--skip=cleanup/apt", "--format=directory", include, *where])
        versions = _downloaded(target / _ARCHIVES)
        for leftover in (_ARCHIVES, "var/lib/apt/lists"):
            shutil.rmtree(target / leftover, ignore_errors=True)
    else:
        _mmdebstrap([*common, *_INSTALL_OPTIONS, "--format=tar", include, *where])
        versions = _installed(target)
    if not versions:
        raise FailedPrecondition("mmdebstrap left no packages to record", f"looked in {target}")
    (entry / _VERSIONS).write_text(json.dumps(versions, indent=1, sort_keys=True))


def _mmdebstrap(command: Sequence[str]) -> None:
    try:
        run(command, environment={"SOURCE_DATE_EPOCH": str(source_date_epoch())}, package="mmdebstrap")
    except FailedPrecondition as error:
        if "NO_PUBKEY" in str(error.details):
            error.hint = "apt-get install --only-upgrade debian-archive-keyring"
        raise


def _downloaded(archives: Path) -> dict[str, str]:
    """From the names of the packages' files: NAME_VERSION_ARCHITECTURE.deb, ":" spelt %3a."""
    parts = [unquote(path.name).split("_") for path in archives.glob("*.deb")]
    return {name: version for name, version, _ in parts}


def _installed(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        member = tar.extractfile(f"./{_DPKG_STATUS}")
        if member is None:
            raise FailedPrecondition(f"{archive} has no {_DPKG_STATUS}")
        status = member.read().decode()
    versions = {}
    for paragraph in status.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and line[0] != " "
        )
        if "Package" in fields:
            versions[fields["Package"]] = fields["Version"]
    return versions


def source_date_epoch() -> int:
    """Seconds; the time that files get which a build makes (reproducible-builds.org)."""
    return int(os.environ.get("SOURCE_DATE_EPOCH", "0"))


def _load(entry: Path) -> Fetched:
    return Fetched(entry / _CONTENT, json.loads((entry / _VERSIONS).read_text()))


def _entries(home: Path, recipe: str) -> list[Path]:
    """Finished entries of a recipe, the one used last first."""
    found = [path for path in home.glob(f"{recipe}-*") if path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _index_digests(lines: Sequence[str]) -> list[str]:
    """Digests of the suites' InRelease files: they change whenever any package does.

    A hint only, fetched unverified; apt verifies what is installed.
    """
    digests = []
    with tempfile.TemporaryDirectory(prefix="casemate-index-") as scratch:
        for line in lines:
            uri, suite = line.split("] ")[1].split()[:2]
            target = Path(scratch, "InRelease")
            run(
                [
                    _APT_HELPER,
                    "-oAcquire::Retries=0",
                    "download-file",
                    f"{uri.rstrip('/')}/dists/{suite}/InRelease",
                    target,
                ],
                package="apt",
            )
            digests.append(sha256(target.read_bytes()).hexdigest())
            target.unlink()
    return digests


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
