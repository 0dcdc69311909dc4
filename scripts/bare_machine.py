"""`make bare SUITE=trixie`: proves `make demo` and `make test` on a Debian without anything they want.

Makes a root file system with what a fresh Debian has plus make, git and ca-certificates, clones the last
commit into it, and runs there in mount, process and host name spaces of its own. What it takes from this
machine: the network, the way to its package sources (apt, pip, Go, certificates), /dev and /sys.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

from images import apt
from images.rootspace import Rootspace, copy_sources
from rpc.errors import CasemateError
from scripts.host import CHECKOUT, install_packages, main_guard, require_root, run, say

HOME = Path("/var/tmp/casemate-bare")
SUITES = ("bookworm", "trixie")
FRESH_DEBIAN = "important"  # mmdebstrap's variant: essential, required and important packages
A_NEWCOMER_HAS = ("ca-certificates", "git", "make")
CERTIFICATES = Path("/usr/local/share/ca-certificates")
CHECKED_OUT = "/root/casemate"


def make_root(suite: str) -> Path:
    """An archive of a fresh Debian, made once; unpacked anew for every proof."""
    HOME.mkdir(parents=True, exist_ok=True)
    archive = HOME / f"{suite}.tar"
    if not archive.exists():
        say(f"making a bare {suite}")
        install_packages(["mmdebstrap"])
        scratch = archive.with_suffix(".part.tar")
        run(
            [
                *("mmdebstrap", "--mode=root", f"--variant={FRESH_DEBIAN}", "--quiet"),
                f"--include={','.join(A_NEWCOMER_HAS)}",
                *(suite, str(scratch)),
                *apt.source_lines(suite, apt.read_sources()),
            ],
        )
        scratch.rename(archive)
    return archive


def unpack(archive: Path, root: Path) -> None:
    root.mkdir(parents=True)
    run(["tar", "--extract", "--file", archive, "--directory", root, "--numeric-owner"])
    copy_sources(root)
    if CERTIFICATES.is_dir():
        shutil.copytree(CERTIFICATES, root / str(CERTIFICATES).lstrip("/"), dirs_exist_ok=True)
        run(["chroot", root, "update-ca-certificates"], quiet=True)
    (root / "etc/hosts").write_text("127.0.0.1 localhost bare-debian\n")
    run(["git", "clone", "--quiet", "--no-hardlinks", f"file://{CHECKOUT}", root / CHECKED_OUT.lstrip("/")])


def inside(root: Path, command: str) -> int:
    """Run a shell command in the bare machine; every process of it ends with it."""
    say(f"in {root.name}: {command}")
    start = time.monotonic()
    code = Rootspace(root).run(["bash", "-c", command], cwd=CHECKED_OUT)
    say(f"in {root.name}: exit code {code} after {time.monotonic() - start:.1f} s: {command}")
    return code


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bare", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--keep", action="store_true", help="leave the machine's files there to look at")
    parser.add_argument("--run", default="make demo && make demo && make test && make uninstall")
    arguments = parser.parse_args()
    try:
        require_root("bare")
        root = HOME / f"{arguments.suite}-{os.getpid()}"
        try:
            unpack(make_root(arguments.suite), root)
            return inside(root, arguments.run)
        finally:
            if arguments.keep:
                say(f"kept: {shlex.quote(str(root))}")
            else:
                run(["rm", "-rf", "--one-file-system", root])
    except CasemateError as error:
        return main_guard(error)


if __name__ == "__main__":
    sys.exit(main())
