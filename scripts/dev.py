"""`make dev`: the checkout's own environment, .venv: what the lock says, and the host's libvirt binding."""

import os
import sys
from pathlib import Path

from rpc.errors import CasemateError, FailedPrecondition
from scripts import venv
from scripts.host import CHECKOUT, install_packages, main_guard, missing_packages

ENVIRONMENT = CHECKOUT / ".venv"
PYTHON = ENVIRONMENT / "bin/python"
PACKAGES = ("git", "python3-libvirt", "python3-venv")


def ensure() -> Path:
    """The Python of an up-to-date .venv. Needs no root where the packages are installed."""
    if missing := missing_packages(PACKAGES):
        if os.geteuid() != 0:
            raise FailedPrecondition(
                f"not installed: {' '.join(missing)}", hint=f"sudo apt-get install {' '.join(missing)}"
            )
        install_packages(missing)
    if venv.ensure(ENVIRONMENT, [CHECKOUT / "requirements/dev.txt"], what="what tests and checks need"):
        venv.link_system_packages(ENVIRONMENT)
    return PYTHON


def main() -> int:
    try:
        ensure()
    except CasemateError as error:
        return main_guard(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
