"""`make dev`: the checkout's own environment, .venv: what the lock says, and the host's libvirt binding."""

import sys
from pathlib import Path

from rpc.errors import CasemateError
from scripts import venv
from scripts.host import CHECKOUT, main_guard

ENVIRONMENT = CHECKOUT / ".venv"
PYTHON = ENVIRONMENT / "bin/python"


def ensure() -> Path:
    """The Python of an up-to-date .venv. Needs no root where python3-venv is installed."""
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
