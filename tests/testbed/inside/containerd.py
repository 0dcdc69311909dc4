"""Run by the bed's PID 1: containerd at its standard address, ready, with the demo's image in it."""

import sys

from rpc.errors import CasemateError
from scripts import containerd
from scripts.host import main_guard
from scripts.manifest import Manifest


def main() -> int:
    try:
        containerd.ensure(Manifest.read())
    except CasemateError as error:
        return main_guard(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
