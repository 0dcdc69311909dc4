"""NVIDIA's open kernel modules, of Debian's package, built for a guest's kernel. Kept by their recipe below
CACHE/nvidia.

The package has their larger part compiled already; what depends on the kernel is compiled here, against
Debian's package of its headers. Must not know what else a driver is made of.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from images import entries
from images.packages import Fetched, Request, cache_dir, fetch, source_date_epoch
from images.rootspace import Rootspace
from rpc.errors import FailedPrecondition, PermissionDenied

COMPONENTS = ("main", "contrib", "non-free", "non-free-firmware")
SOURCE = "nvidia-open-kernel-dkms"
MODULES = ("nvidia", "nvidia-uvm", "nvidia-modeset")
# A compiler, the kernel's headers and the source, unpacked and never configured.
TOOLCHAIN = (
    *("base-files", "bash", "binutils", "coreutils", "dash", "diffutils", "findutils", "gcc", "grep", "gzip"),
    *("libc6-dev", "linux-headers-cloud-amd64", "make", "mawk", "mount", "sed", SOURCE),
)
# Newer kernels, 6.12.117 among them, have one more argument of pci_resize_resource() than 550.163.01 knows: a
# mask of BARs to leave alone. The driver calls it where it is told NVreg_EnableResizableBar=1.
_RESIZE = r"s/\(pci_resize_resource(pci_dev, NV_GPU_BAR1, requested_size\))/\1, 0)/"
_NICENESS = 10
_KIND = "modules"


def ensure(
    release: str, suite: str, mirror: str, cache: Path | None, say: Callable[[str], None]
) -> tuple[list[Path], Fetched]:
    """The modules' files for the kernel of this release (`uname -r`), and the packages that made them; say is
    told when they are built.

    Raises PermissionDenied for who is not root, FailedPrecondition with the words of apt or the compiler, and
    where the mirror has the headers of another kernel.
    """
    toolchain = fetch(Request(TOOLCHAIN, suite=suite, mirror=mirror, components=COMPONENTS), cache)
    version = version_of(toolchain)
    script = commands(release, version)

    def make(target: Path) -> None:
        if os.geteuid() != 0:
            raise PermissionDenied("building kernel modules needs root, for mounts of its own")
        if not (toolchain.path / f"usr/src/linux-headers-{release}").is_dir():
            raise FailedPrecondition(
                f"the mirror has no headers of the kernel {release}",
                hint="the image's kernel and its headers are fetched one after the other: build it again",
            )
        changes, work, root = (target.parent / name for name in ("changes", "work", "root"))
        for directory in (changes / "usr/src", work, root):
            directory.mkdir(parents=True)
        space = Rootspace(root, (toolchain.path,), changes, work)
        space.check(["sh", "-c", script], niceness=_NICENESS, log=target.with_name("log"))
        for name in MODULES:
            shutil.copyfile(changes / f"usr/src/nvidia/{name}.ko", target / f"{name}.ko")

    recipe = {"release": release, "script": script, "suite": suite, "versions": dict(toolchain.versions)}
    path = entries.entry(_home(cache), _KIND, recipe, make, lambda text: say(f"NVIDIA: {text}"))
    return [path / f"{name}.ko" for name in MODULES], toolchain


def kept(cache: Path | None = None) -> bool:
    """Whether any have been built here, be it for an older kernel."""
    return bool(entries.entries(_home(cache), _KIND))


def _home(cache: Path | None) -> Path:
    return (cache or cache_dir()) / "nvidia"


def version_of(packages: Fetched) -> str:
    """The driver's (550.163.01), of the package that the modules are built from."""
    found = sorted((packages.path / "usr/src").glob("nvidia-current-open-*"))
    if len(found) != 1:
        raise FailedPrecondition(f"expected one source of NVIDIA's modules, found {found}")
    return found[0].name.removeprefix("nvidia-current-open-")


def commands(release: str, version: str) -> str:
    """The shell script that builds them: a part of the recipe. No name and no time is in what it makes."""
    names = " ".join(MODULES)
    return f"""\
set -e
cp -a /usr/src/nvidia-current-open-{version} /usr/src/nvidia
ln -s mawk /usr/bin/awk
export KBUILD_BUILD_USER=casemate KBUILD_BUILD_HOST=casemate KBUILD_BUILD_TIMESTAMP=@{source_date_epoch()}
cd /usr/src/nvidia
if grep -q exclude_bars /usr/lib/modules/{release}/source/include/linux/pci.h; then
    sed --in-place '{_RESIZE}' nvidia/nv-pci.c
fi
make --jobs="$(nproc)" KERNEL_UNAME={release} IGNORE_CC_MISMATCH=1 \\
    NV_KERNEL_MODULES="{names}" modules
strip --strip-debug {" ".join(f"{name}.ko" for name in MODULES)}
"""
