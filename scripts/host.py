"""The machine the scripts run on: its distribution, its packages, and the one way to run a command on it.

Runs under the system's Python before anything is installed, so it knows the standard library and
rpc.errors only.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rpc.errors import CasemateError, FailedPrecondition, PermissionDenied

CHECKOUT = Path(__file__).resolve().parent.parent
CACHE = Path("/var/cache/casemate")
MINIMUM_PYTHON = (3, 11)

# Package -> the first Debian release that has it under that name (before, its files came with another).
RUNTIME_PACKAGES = {
    "containerd": 12,
    "libvirt-daemon-driver-qemu": 12,
    "python3-libvirt": 12,
    "python3-venv": 12,
    "qemu-system-x86": 12,
    "virtiofsd": 13,  # in Debian 12 a part of qemu-system-common
}
IMAGE_PACKAGES = {
    "erofs-utils": 12,
    "mmdebstrap": 12,
    "zstd": 12,
}
# What the tests use beside the product: other runtimes to compare with, and ways to look at a machine.
TEST_PACKAGES = {
    "busybox-static": 12,
    "containernetworking-plugins": 12,
    "crun": 12,
    "e2fsprogs": 12,
    "iproute2": 12,
    "iptables": 12,
    "procps": 12,
    "runc": 12,
    "xz-utils": 12,
}


def say(text: str) -> None:
    """One line of progress, in order with the output of the commands that follow it."""
    print(f"casemate: {text}", flush=True)


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    quiet: bool = False,
    hint: str | None = None,
) -> str:
    """Run a command to its end and return its standard output.

    quiet keeps its words back unless it fails; otherwise they go straight to the terminal and ''
    is returned. Raises CasemateError with a line that can be pasted into a shell.
    """
    sys.stdout.flush()
    words = [str(word) for word in argv]
    pipe = subprocess.PIPE if quiet else None
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise CasemateError(f"{words[0]}: no such command", hint=hint) from error
    if done.returncode != 0:
        raise CasemateError(
            f"exit code {done.returncode} from: {shlex.join(words)}",
            details=((done.stdout or "") + (done.stderr or "")).strip()[-4000:] or None,
            hint=hint,
        )
    return done.stdout or ""


def succeeds(argv: Sequence[str | Path]) -> bool:
    """Whether a question asked as a command is answered with exit code 0."""
    return subprocess.run([str(word) for word in argv], capture_output=True, check=False).returncode == 0


def require_root(target: str) -> None:
    if os.geteuid() != 0:
        raise PermissionDenied(
            f"make {target} needs root",
            details="it installs packages and starts virtual machines",
            hint=f"sudo make {target}",
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """What /etc/os-release says. release is Debian's number; testing and unstable count as newest."""

    name: str
    family: tuple[str, ...]
    release: int

    @classmethod
    def read(cls, text: str) -> "Distribution":
        pairs: dict[str, str] = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', text, re.MULTILINE))
        number = pairs.get("VERSION_ID", "").split(".")[0]
        return cls(
            name=pairs.get("PRETTY_NAME", pairs.get("ID", "an unknown system")),
            family=(pairs.get("ID", ""), *pairs.get("ID_LIKE", "").split()),
            release=int(number) if number.isdigit() else 99,
        )

    def names(self, packages: dict[str, int]) -> list[str]:
        return [name for name, since in packages.items() if self.release >= since]


def distribution(os_release: Path = Path("/etc/os-release")) -> Distribution:
    """The distribution, if it is one that these scripts know how to furnish."""
    found = Distribution.read(os_release.read_text())
    machine = platform.machine()
    if found.family[0] != "debian" or found.release < 12 or machine != "x86_64":
        raise FailedPrecondition(
            f"{found.name} on {machine} is not a system this installs on",
            hint="Debian 12 or 13 on amd64",
        )
    if sys.version_info < MINIMUM_PYTHON:
        raise FailedPrecondition(
            f"{sys.executable} is Python {platform.python_version()}",
            hint="Python >= 3.11 is needed; Debian 12 and 13 have it as /usr/bin/python3",
        )
    return found


def held_packages(listing: str) -> set[str]:
    """Names that installed packages have or provide: Docker's containerd.io, say, stands for containerd."""
    held = set()
    for line in listing.splitlines():
        status, name, provides = line.split("|")
        if status[1:2] == "i":
            held |= {name, *re.findall(r"(?:^|, )([a-z0-9][a-z0-9+.-]+)", provides)}
    return held


def missing_packages(names: Iterable[str]) -> list[str]:
    """Those of names that nothing installed has or provides."""
    form = "${db:Status-Abbrev}|${Package}|${Provides}\n"
    held = held_packages(run(["dpkg-query", "--show", "--showformat", form], quiet=True))
    return [name for name in names if name not in held]


def install_packages(names: Iterable[str]) -> None:
    missing = missing_packages(names)
    if not missing:
        return
    say(f"installing Debian packages: {' '.join(missing)}")
    quiet_debconf = {"DEBIAN_FRONTEND": "noninteractive"}
    run(["apt-get", "-qq", "update"], env=quiet_debconf, hint="the machine's apt sources must be reachable")
    run(
        # --no-remove: what is on this machine stays, even if that means that we cannot be installed
        ["apt-get", "-qq", "-y", "--no-remove", "--no-install-recommends", "install", *missing],
        env=quiet_debconf,
        quiet=True,
    )
    if still := missing_packages(missing):
        raise CasemateError(f"apt-get said yes, and these are still missing: {' '.join(still)}")


def executable(name: str) -> Path | None:
    """Where a command is, /usr/sbin and /usr/local included even if the caller's PATH lacks them."""
    path = os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    found = shutil.which(name, path=path)
    return Path(found) if found else None


def main_guard(error: CasemateError) -> int:
    """How every script here ends when it fails: what, then why, then what to do."""
    sys.stdout.flush()
    print(f"casemate: error: {error.brief}", file=sys.stderr)
    if error.details:
        print(error.details, file=sys.stderr)
    if error.hint:
        print(f"casemate: hint: {error.hint}", file=sys.stderr)
    return 1
