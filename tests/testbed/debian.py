"""Root file systems of Debian's newest suite: the bed's own, and the one that its kernel is built in.

Must not know what is done in them.
"""

from collections.abc import Sequence
from pathlib import Path

from images import apt
from scripts.host import IMAGE_PACKAGES, RUNTIME_PACKAGES, TEST_PACKAGES, install_packages, run
from tests.testbed import cache

SUITE = "forky"
TOOLCHAIN_PACKAGES = (
    *("bc", "bison", "flex", "gcc", "kmod", "libc6-dev", "libelf-dev", "linux-source", "make", "perl"),
    *("python3", "xz-utils"),
)
# Beside what the product and its tests want: a host's daemons and tools, and QEMU's firmware.
HOST_PACKAGES = (
    *("ca-certificates", "containernetworking-plugins", "e2fsprogs", "git", "iptables", "kmod"),
    *("libvirt-clients", "libvirt-daemon", "make", "nftables", "pciutils", "qemu-utils", "seabios"),
    *("socat", "strace", "udev"),
)
OPTIONS = (
    *("--mode=root", "--variant=minbase", "--quiet"),
    '--aptopt=APT::Install-Recommends "false"',
    # A mirror may be a snapshot of a day long ago. Signatures are checked all the same.
    '--aptopt=Acquire::Check-Valid-Until "false"',
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "info", "locale", "man")),
)


def toolchain() -> Path:
    """A compiler, and the kernel's source as Debian packs it."""
    return root_file_system("toolchain", TOOLCHAIN_PACKAGES)


def host() -> Path:
    """A host of containers and machines, without a kernel and without casemate."""
    return root_file_system("host", furnished())


def missing() -> list[str]:
    """Which of the two root file systems are to be built yet."""
    wanted = {"toolchain": TOOLCHAIN_PACKAGES, "host": furnished()}
    return [kind for kind, packages in wanted.items() if not place_of(kind, packages).is_dir()]


def furnished() -> list[str]:
    """The packages of host()."""
    return sorted({*RUNTIME_PACKAGES, *IMAGE_PACKAGES, *TEST_PACKAGES, *HOST_PACKAGES})


def place_of(kind: str, packages: Sequence[str]) -> Path:
    """Where it is, if it was built."""
    return cache.place(kind, recipe(packages))


def recipe(packages: Sequence[str]) -> list[str]:
    """What a root file system is known by."""
    return [SUITE, *OPTIONS, *packages]


def root_file_system(kind: str, packages: Sequence[str]) -> Path:
    def build(target: Path) -> None:
        install_packages(["mmdebstrap"])
        include = f"--include={','.join(packages)}"
        lines = apt.source_lines(SUITE, apt.read_sources())[:1]
        run(["mmdebstrap", *OPTIONS, include, SUITE, target, *lines], quiet=True)

    return cache.entry(kind, recipe(packages), build)
