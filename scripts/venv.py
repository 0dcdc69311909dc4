"""Virtual environments with exactly what a lock says, made once and again only when the lock changes.

Knows pip and venv; must not know which environment is whose.
"""

import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from rpc.errors import AlreadyExists
from scripts.host import run, say

# The one the host's libvirt binding is built for. A pyenv's or conda's python3 on PATH would not find it.
SYSTEM_PYTHON = Path("/usr/bin/python3")
SYSTEM_PACKAGES = Path("/usr/lib/python3/dist-packages")
STAMP = "casemate-lock"


def fingerprint(locks: Sequence[Path]) -> str:
    """Changes when a lock does, or when the distribution brings another Python."""
    digest = sha256(str(SYSTEM_PYTHON.resolve()).encode())
    for lock in locks:
        digest.update(lock.read_bytes())
    return digest.hexdigest()


def site_packages(directory: Path) -> Path:
    """Where this environment's packages are, by asking the disk instead of starting its Python."""
    return next(directory.glob("lib/python3.*/site-packages"))


def pip(python: Path, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
    run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments],
        env={"PIP_ROOT_USER_ACTION": "ignore", "PIP_NO_INPUT": "1", **(env or {})},
        quiet=True,
        hint="pip must reach a package index: its settings come from the environment and pip.conf",
    )


def ensure(directory: Path, locks: Sequence[Path], *, what: str) -> bool:
    """Make directory an environment that holds what locks say. Whether anything had to be done.

    A stamp is written last, so that an interrupted installation is started again from nothing.
    """
    stamp = directory / STAMP
    wanted = fingerprint(locks)
    if stamp.is_file() and stamp.read_text() == wanted and (directory / "bin/python3").exists():
        return False
    say(f"installing {what} into {directory}")
    if (directory / "pyvenv.cfg").exists():
        shutil.rmtree(directory)
    elif directory.exists() and any(directory.iterdir()):
        raise AlreadyExists(f"{directory} is not empty and no virtual environment", hint="move it away")
    run([SYSTEM_PYTHON, "-m", "venv", directory], quiet=True, hint="apt-get install python3-venv")
    for lock in locks:
        pip(directory / "bin/python3", "install", "--require-hashes", "--only-binary", ":all:", "-r", lock)
    stamp.write_text(wanted)
    return True


def link_system_packages(directory: Path) -> None:
    """Let this environment import Debian's python3-libvirt; what it holds itself comes first."""
    (site_packages(directory) / "casemate-host-libvirt.pth").write_text(f"{SYSTEM_PACKAGES}\n")
