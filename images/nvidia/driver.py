"""NVIDIA's driver for a guest, of Debian's packages: kernel modules, the firmware of GPUs, and what programs
of containers use of it.

It lies where NVIDIA's own installer puts it, so that tools which look for a driver find it; Debian keeps the
same files beside others' (nvidia/current) and chooses by links. Must not know of the rest of an image.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from images.nvidia import modules
from images.nvidia.modules import COMPONENTS
from images.packages import Request, fetch
from images.variant import Driver
from rpc.errors import FailedPrecondition

LIBRARIES = "usr/lib/x86_64-linux-gnu"
FIRMWARE = "usr/lib/firmware/nvidia"
PROGRAMS = (
    *("nvidia-smi", "nvidia-debugdump", "nvidia-persistenced", "nvidia-modprobe"),
    *("nvidia-cuda-mps-control", "nvidia-cuda-mps-server"),
)
OPENCL = "etc/OpenCL/vendors/nvidia.icd"
LDCONFIG = "usr/sbin/ldconfig"  # linked statically: it runs in the root of any container
PACKAGES = (
    *("libcuda1", "libcudadebugger1", "libnvidia-ml1", "libnvidia-ptxjitcompiler1", "libnvidia-nvvm4"),
    *("libnvidia-cfg1", "libnvcuvid1", "libnvidia-encode1", "libnvidia-opticalflow1", "libnvidia-allocator1"),
    *("nvidia-opencl-icd", "nvidia-smi", "nvidia-driver-bin", "nvidia-persistenced", "nvidia-modprobe"),
    *("nvidia-cuda-mps", "firmware-nvidia-gsp", "libc-bin"),
)
_PLACES = ("usr/lib/nvidia/current", "usr/bin", "usr/sbin")


def ensure(release: str, suite: str, mirror: str, cache: Path | None, say: Callable[[str], None]) -> Driver:
    """The driver for the kernel of this release. Raises as images.nvidia.modules.ensure()."""
    driver = without_modules(suite, mirror, cache)
    files, made_by = modules.ensure(release, suite, mirror, cache, say)
    if (version := modules.version_of(made_by)) != driver.version:
        raise FailedPrecondition(
            f"NVIDIA's kernel modules are of version {version}, and the mirror's firmware of {driver.version}"
        )
    return replace(driver, modules=tuple(files), versions={**made_by.versions, **driver.versions})


def without_modules(suite: str, mirror: str = "", cache: Path | None = None) -> Driver:
    """What of it is the same for all kernels. Raises FailedPrecondition with apt's words."""
    packages = fetch(Request(PACKAGES, suite=suite, mirror=mirror, components=COMPONENTS), cache)
    found = sorted(path.name for path in (packages.path / FIRMWARE).iterdir())
    if len(found) != 1:
        raise FailedPrecondition("expected firmware of one version of NVIDIA's driver", f"found {found}")
    return Driver(found[0], (), packages.path, packages.versions)


def add(driver: Driver, root: Path) -> None:
    """Into the root of an image, all but the modules. Raises FailedPrecondition if a package lacks a file."""
    for source in libraries(driver):
        _copy(source, root / LIBRARIES / source.name)
    for name in PROGRAMS:
        places = (driver.tree / place / name for place in _PLACES)
        program = next((path for path in places if path.is_file()), None)
        if program is None:
            raise FailedPrecondition(f"NVIDIA's driver {driver.version} has no {name} in Debian's packages")
        _copy(program, root / "usr/bin" / name)
    _copy(driver.tree / LDCONFIG, root / "usr/bin/ldconfig")
    _copy(driver.tree / OPENCL, root / OPENCL)
    for blob in sorted((driver.tree / FIRMWARE / driver.version).glob("*.bin")):
        _copy(blob, root / FIRMWARE / driver.version / blob.name)


def libraries(driver: Driver) -> Iterator[Path]:
    """The driver's own, which end with its version, and the links to each."""
    names = set()
    for path in sorted((driver.tree / LIBRARIES).rglob(f"lib*.so.{driver.version}")):
        if path.is_symlink() or path.name in names:
            continue
        names.add(path.name)
        yield path
        for link in sorted(path.parent.glob("lib*")):
            if link.is_symlink() and link.resolve() == path.resolve():
                yield link


def _copy(source: Path, target: Path) -> None:
    """A file, or a link by its own target's name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink().name)
        return
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)
