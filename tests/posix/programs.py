"""pjdfstest and fsx: static executables, for any Linux, that cargo builds from the registry that it knows.

Which versions, and what their archives hold, is pinned here; what they in turn are made of, by the lock file
in each archive. It knows nothing of who runs them.
"""

import os
import re
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from images.files import locked, make_directory
from rpc.errors import DataLoss
from scripts.host import CACHE, distribution, executable, install_packages, run, say

HOME = CACHE / "rust"
TARGET = "x86_64-unknown-linux-gnu"
# With a target named, these are for the program alone, not for what runs while it is built.
SETTINGS = {"RUSTFLAGS": "-C target-feature=+crt-static", "CARGO_PROFILE_RELEASE_OPT_LEVEL": "1"}
MINIMUM_RUST = (1, 85)
LIBRARIES = {"gcc": 12, "libacl1-dev": 12, "libc6-dev": 12}
RUST = {12: ("cargo-web", "rustc-web"), 13: ("cargo", "rustc")}
"""Debian 12's rustc is 1.63; the one that its browsers are built with is newer."""


@dataclass(frozen=True, slots=True)
class Crate:
    """digest: SHA-256 of its archive."""

    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


PJDFSTEST = Crate("pjdfstest", "0.2.2", "bb5e2bea16df357ae879d1585bedaffe5913ab8f45e874f623b0b2f5555c8376")
FSX = Crate("fsx", "0.3.2", "72680bb1e43d40729d5f6e9de5bbe604820ff51e4707e109cb5082ec67d022a2")
CRATES = (PJDFSTEST, FSX)


def ensure() -> list[Path]:
    """The executables of CRATES, from the cache, or built, for which packages are installed.

    Raises DataLoss for an archive that is not the pinned one, CasemateError with cargo's words.
    """
    recipe = sha256(repr((CRATES, sorted(SETTINGS.items()), TARGET)).encode()).hexdigest()[:16]
    made = HOME / recipe
    make_directory(HOME)
    with locked(HOME / "lock"):
        if not made.is_dir():
            cargo = _cargo()
            with tempfile.TemporaryDirectory(dir=HOME, prefix="building-") as scratch:
                for crate in CRATES:
                    say(f"building {crate}")
                    _build(cargo, crate, Path(scratch))
                Path(scratch, "out/bin").rename(made)
    return [made / crate.name for crate in CRATES]


def _cargo() -> Path:
    """The machine's if it is new enough, else Debian's."""
    install_packages(distribution().names(LIBRARIES))
    cargo = executable("cargo")
    if cargo is None or _version(cargo) < MINIMUM_RUST:
        install_packages(RUST.get(distribution().release, RUST[13]))
        cargo = Path("/usr/bin/cargo")
    return cargo


def _version(cargo: Path) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", run([cargo, "--version"], quiet=True))
    return tuple(map(int, found.groups())) if found else ()


def _build(cargo: Path, crate: Crate, scratch: Path) -> None:
    run([cargo, "info", "--quiet", f"{crate.name}@{crate.version}"], quiet=True)  # fetches the archive
    home = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo")
    archives = list(home.glob(f"registry/cache/*/{crate.name}-{crate.version}.crate"))
    if not archives or any(sha256(path.read_bytes()).hexdigest() != crate.digest for path in archives):
        raise DataLoss(f"{crate} is not what was pinned", f"looked at {archives}, for {crate.digest}")
    argv: list[str | Path] = [
        cargo,
        "install",
        "--locked",
        "--quiet",
        f"--target={TARGET}",
        f"--root={scratch / 'out'}",
    ]
    environment = {**SETTINGS, "CARGO_TARGET_DIR": str(scratch / "target")}
    run(
        ["nice", "-n", "10", *argv, "--version", f"={crate.version}", crate.name],
        env=environment,
        quiet=True,
    )
