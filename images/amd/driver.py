"""AMD's driver for a guest: the kernel's own amdgpu, and Debian's package of firmware that GPUs are given.

Programs have ROCm in their containers' images. Must not know of the rest of an image.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from images import packages
from images.packages import Request
from images.variant import Driver
from rpc.errors import FailedPrecondition

FIRMWARE = "usr/lib/firmware/amdgpu"
# Of whichever GPU amdgpu knows: it asks for files by the chips that it finds, and all are not large.
PACKAGES = ("firmware-amd-graphics",)
COMPONENTS = ("main", "non-free-firmware")


def ensure(release: str, suite: str, mirror: str, cache: Path | None, say: Callable[[str], None]) -> Driver:
    """For the generic kernel of this release (`uname -r`), in whose package amdgpu is. Raises
    FailedPrecondition with apt's words."""
    fetched = packages.fetch(_request(suite, mirror), cache)
    return Driver(f"amdgpu of {release}", (), fetched.path, fetched.versions)


def kept(cache: Path | None = None, suite: str = "trixie") -> bool:
    """Whether the firmware of that suite has been fetched here, be it an older one."""
    return packages.kept(_request(suite, ""), cache)


def add(driver: Driver, root: Path) -> None:
    """Into the root of an image, all but the modules. Raises FailedPrecondition if the package has none."""
    source = driver.tree / FIRMWARE
    if not any(source.glob("*.bin")):
        raise FailedPrecondition(f"Debian's {PACKAGES[0]} has no firmware in {FIRMWARE}")
    # Files that are the same for several chips are links to one of them.
    shutil.copytree(source, root / FIRMWARE, symlinks=True)


def _request(suite: str, mirror: str) -> Request:
    return Request(PACKAGES, suite=suite, mirror=mirror, components=COMPONENTS)
