"""Debian packages, resolved and downloaded by apt, verified by its signatures, unpacked into a cached tree.

Used by guest images and by the OCI images of demo and tests. Must not know what is made of a tree.
"""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from urllib.parse import unquote

from images.apt import mirror_lines, read_sources, source_lines
from images.run import run
from rpc.errors import CasemateError, FailedPrecondition

log = logging.getLogger(__name__)

CACHE_VARIABLE = "CASEMATE_CACHE_DIR"
_APT_HELPER = "/usr/lib/apt/apt-helper"
_ARCHIVES = "var/cache/apt/archives"
_KEPT_PER_REQUEST = 2  # what the mirror has now, and what it had before
_FORMAT = 1  # of the cache; raised when an older entry cannot be used


@dataclass(frozen=True, slots=True)
class Request:
    """What is wanted: packages of a suite, with or without what they depend on being configured."""

    packages: tuple[str, ...]
    suite: str = "trixie"
    architecture: str = "amd64"
    mirror: str = ""  # instead of the machine's own


@dataclass(frozen=True, slots=True)
class Package:
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class PackageTree:
    """The packages' files, unpacked on each other, never configured. Read-only for its users."""

    directory: Path
    packages: Mapping[str, Package]


def cache_dir() -> Path:
    return Path(os.environ.get(CACHE_VARIABLE) or "/var/cache/casemate")


def fetch(request: Request, cache: Path | None = None, *, apt_etc: Path | None = None) -> PackageTree:
    """The tree for a request, from the cache if the mirror's index has not changed since.

    Without a network, what the same request got last is used, and said so.
    Raises FailedPrecondition with apt's own words if there is neither.
    """
    home = (cache or cache_dir()) / "packages"
    home.mkdir(parents=True, exist_ok=True)
    lines = _lines(request, apt_etc)
    recipe = _digest([_FORMAT, asdict(request)])
    with _locked(home / f"{recipe}.lock"):
        try:
            entry = home / f"{recipe}-{_digest([lines, _index_digests(lines)])}"
        except CasemateError as error:
            newest = _entries(home, recipe)
            if not newest:
                raise
            log.warning("using packages fetched earlier: %s", error)
            return _load(newest[0] / "tree")
        if not entry.exists():
            with tempfile.TemporaryDirectory(prefix="fetch-", dir=home) as scratch:
                made = Path(scratch, "entry")
                _unpack(request, lines, made)
                made.rename(entry)
        os.utime(entry)  # the newest is the one used last
        for old in _entries(home, recipe)[_KEPT_PER_REQUEST:]:
            shutil.rmtree(old)
        return _load(entry / "tree")


def _lines(request: Request, apt_etc: Path | None) -> list[str]:
    if request.mirror:
        return mirror_lines(request.suite, request.mirror)
    return source_lines(request.suite, read_sources(apt_etc) if apt_etc else read_sources())


def _unpack(request: Request, lines: Sequence[str], entry: Path) -> None:
    tree = entry / "tree"
    entry.mkdir()
    run(
        [
            *("mmdebstrap", "--quiet", "--variant=extract", "--skip=cleanup/apt"),
            *(f"--architectures={request.architecture}", f"--include={','.join(request.packages)}"),
            *(request.suite, str(tree), *lines),
        ],
        package="mmdebstrap",
    )
    packages = {}
    for deb in sorted((tree / _ARCHIVES).glob("*.deb")):
        name, version, _ = deb.name.split("_")
        with deb.open("rb") as file:
            packages[name] = asdict(Package(unquote(version), file_digest(file, "sha256").hexdigest()))
    if not packages:
        raise FailedPrecondition("mmdebstrap left no packages to record", f"looked in {tree / _ARCHIVES}")
    for leftover in (_ARCHIVES, "var/lib/apt/lists"):
        shutil.rmtree(tree / leftover, ignore_errors=True)
    (entry / "packages.json").write_text(json.dumps(packages, indent=1))


def _load(tree: Path) -> PackageTree:
    listed = json.loads((tree.parent / "packages.json").read_text())
    return PackageTree(tree, {name: Package(**fields) for name, fields in listed.items()})


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
                [_APT_HELPER, "download-file", f"{uri.rstrip('/')}/dists/{suite}/InRelease", target],
                package="apt",
            )
            digests.append(sha256(target.read_bytes()).hexdigest())
            target.unlink()
    return digests


def _digest(value: object) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
