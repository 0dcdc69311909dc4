"""The guest's crun: of the source of Debian's, linked statically, without systemd and run-time plug-ins.

A container's start and an exec are one run of crun each. Loading and relocating its libraries, and copying
what that wrote to at every fork, is two thirds of it in an emulated guest. Kept by its recipe below
CACHE/crun. Must not know what else an image is made of.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from images import entries
from images.elf import is_elf, needed
from images.packages import Fetched, Request, cache_dir, fetch, sources_of
from images.rootspace import Rootspace
from images.sources import fetch_source, source_version
from rpc.errors import FailedPrecondition, PermissionDenied

PROGRAM = "usr/bin/crun"
TOOLCHAIN = (
    *("base-files", "coreutils", "dash", "diffutils", "findutils", "gcc", "grep", "gzip", "libc6-dev"),
    *("libcap-dev", "libseccomp-dev", "libyajl-dev", "make", "mawk", "mount", "sed", "tar", "xz-utils"),
)
# What a guest has no use for: systemd's cgroups (crun is told to use cgroupfs), plug-ins, checkpoints.
_WITHOUT = ("--disable-systemd", "--disable-dl", "--disable-criu", "--disable-shared", "--enable-static")
_FLAGS = "-O2 -fstack-protector-strong -D_FORTIFY_SOURCE=2"  # Debian's
_NICENESS = 10
# Python would generate what the source has generated already: configure asks for it all the same.
_SCRIPT = f"""\
set -e
mkdir /usr/src/crun
cd /usr/src/crun
tar --extract --file /usr/src/crun.orig.tar --strip-components=1
ln -s mawk /usr/bin/awk
ln -s libyajl_s.a /usr/lib/x86_64-linux-gnu/libyajl.a
export YAJL_CFLAGS=-I/usr/include YAJL_LIBS=-lyajl
./configure --quiet PYTHON=true {" ".join(_WITHOUT)} CFLAGS='{_FLAGS}' LDFLAGS=-static LIBS=-lm
make --silent --jobs="$(nproc)" LDFLAGS=-all-static
strip crun
"""


def ensure(
    packages: Fetched, suite: str, mirror: str, cache: Path | None, say: Callable[[str], None]
) -> Path:
    """A tree with usr/bin/crun of the version that `packages` has; say is told when it is built.

    Raises PermissionDenied for who is not root, FailedPrecondition with the words of apt or the compiler.
    """
    toolchain = fetch(Request(TOOLCHAIN, suite=suite, mirror=mirror), cache)
    version = source_version(packages.versions["crun"])

    def make(target: Path) -> None:
        if os.geteuid() != 0:
            raise PermissionDenied("building crun needs root, for mounts of its own")
        changes, work, root, download = (
            target.parent / name for name in ("changes", "work", "root", "source")
        )
        for directory in (changes / "usr/src", work, root, download):
            directory.mkdir(parents=True)
        source = fetch_source("crun", version, sources_of(Request((), suite=suite, mirror=mirror)), download)
        source.rename(changes / "usr/src/crun.orig.tar")
        space = Rootspace(root, (toolchain.path,), changes, work)
        space.check(["sh", "-c", _SCRIPT], niceness=_NICENESS, log=target.with_name("log"))
        built = changes / "usr/src/crun/crun"
        content = built.read_bytes()
        if not is_elf(content) or needed(content):
            raise FailedPrecondition("crun was not linked statically", f"it needs {needed(content)}")
        (target / PROGRAM).parent.mkdir(parents=True)
        shutil.copyfile(built, target / PROGRAM)
        (target / PROGRAM).chmod(0o755)

    recipe = {"version": version, "suite": suite, "script": _SCRIPT, "versions": dict(toolchain.versions)}
    return entries.entry(
        (cache or cache_dir()) / "crun", "crun", recipe, make, lambda text: say(f"guest image: {text}")
    )
