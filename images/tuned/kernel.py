"""The guest's own kernel: the suite's linux-source, built with nothing but what kernel.config asks for.

It mounts the root by itself: there are no modules to load first, so no initramfs. Those that it has are of
devices that few guests are given. Kept by its recipe below CACHE/tuned. Must not know what else an image is
made of.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from images import entries, kbuild
from images.kernel import compact
from images.packages import Fetched, Request, cache_dir, fetch
from rpc.errors import FailedPrecondition, PermissionDenied

FRAGMENT = Path(__file__).with_name("kernel.config")
TARGET = "vmlinux"
_TARGETS = f"{TARGET} modules"
SOURCE = "linux-source-"  # the package's name goes on with the version
# A compiler and the source, unpacked and never configured: hence awk by its package's name, and the
# directories and links of base-files.
TOOLCHAIN = (
    *("base-files", "bc", "bison", "coreutils", "dash", "diffutils", "findutils", "flex", "gcc", "grep"),
    *("gzip", "libc6-dev", "libelf-dev", "linux-source", "make", "mawk", "mount", "perl", "sed", "tar"),
    "xz-utils",
)
CMDLINE = (
    *("root=/dev/vda", "rootfstype=erofs", "ro"),
    "dummy.numdummies=0",  # a pod's only interfaces are those that it was given
)
_KIND, _ORIGIN = "kernel", "origin.json"


def ensure(suite: str, mirror: str, cache: Path | None, say: Callable[[str], None]) -> Fetched:
    """A tree with the kernel as a package of Debian's would hold it, and the versions of what made it.

    Builds it where it is not kept yet, which takes minutes of every processor; say is told. Raises
    PermissionDenied for who is not root, FailedPrecondition as images.kbuild.build and images.packages.fetch.
    """
    toolchain = fetch(Request(TOOLCHAIN, suite=suite, mirror=mirror), cache)
    fragment = FRAGMENT.read_text()
    variables = settings(toolchain)
    origin = {"suite": suite, "fragment": fragment, "versions": dict(toolchain.versions)}

    def make(target: Path) -> None:
        if os.geteuid() != 0:
            raise PermissionDenied("building a kernel needs root, for mounts of its own")
        log = target.with_name("log")
        output = kbuild.build(toolchain.path, fragment, _TARGETS, target.parent, variables, log)
        release = (output / "include/config/kernel.release").read_text().strip()
        boot, modules = target / "boot", target / "usr/lib/modules" / release
        for directory in (boot, modules / "kernel"):
            directory.mkdir(parents=True)
        (boot / f"{TARGET}-{release}").write_bytes(compact((output / TARGET).read_bytes()))
        shutil.copyfile(output / kbuild.CONFIG, boot / f"config-{release}")
        shutil.copyfile(output / "System.map", boot / f"System.map-{release}")
        shutil.copyfile(output / "modules.builtin", modules / "modules.builtin")
        for module in output.rglob("*.ko"):
            shutil.copyfile(module, modules / "kernel" / module.name)
        (target / _ORIGIN).write_text(json.dumps(origin))

    recipe = [origin, *kbuild.commands(_TARGETS, variables)]
    path = entries.entry(_home(cache), _KIND, recipe, make, lambda text: say(f"tuned guest: {text}"))
    return Fetched(path, toolchain.versions)


def kept(suite: str, cache: Path | None = None) -> bool:
    """Whether this suite's source has been built as kernel.config is now, be it with an older compiler."""
    for path in entries.entries(_home(cache), _KIND):
        origin = json.loads((path / _ORIGIN).read_text())
        if (origin["suite"], origin["fragment"]) == (suite, FRAGMENT.read_text()):
            return True
    return False


def _home(cache: Path | None) -> Path:
    return (cache or cache_dir()) / "tuned"


def settings(toolchain: Fetched) -> dict[str, str]:
    """Make's variables. Who builds, when and where is not in the kernel, but the source's version is."""
    sources = [name for name in toolchain.versions if name.startswith(SOURCE)]
    if len(sources) != 1:
        raise FailedPrecondition(f"expected one kernel source, found {sources}")
    return {
        "AWK": "mawk",
        "KBUILD_BUILD_USER": "casemate",
        "KBUILD_BUILD_HOST": "casemate",
        "KBUILD_BUILD_VERSION": "1",
        "KBUILD_BUILD_TIMESTAMP": f"Debian {toolchain.versions[sources[0]]}",
    }
