"""`make test`: installs what the tests need, then becomes pytest, whose summary is the last line."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from rpc.errors import CasemateError
from scripts import demo_image, dev, golang, product
from scripts.host import (
    CHECKOUT,
    IMAGE_PACKAGES,
    RUNTIME_PACKAGES,
    TEST_PACKAGES,
    distribution,
    install_packages,
    main_guard,
    require_root,
    say,
)
from scripts.manifest import Manifest


def prepare() -> dict[str, str]:
    """Everything that stands outside the checkout; the environment that pytest shall have."""
    require_root(Path(sys.argv[0]).stem)
    packages = RUNTIME_PACKAGES | IMAGE_PACKAGES | TEST_PACKAGES
    install_packages(distribution().names(packages))
    manifest = Manifest.read()
    product.create_qemu_user(manifest)
    product.record_directories(manifest)
    product.ensure_image()
    go = golang.ensure()
    dev.ensure()
    archive, _ = demo_image.archive()
    return {
        **os.environ,
        "CASEMATE_TEST_DEMO": str(archive),
        "PATH": f"{go}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
    }


def become(module: str, arguments: list[str]) -> NoReturn:
    """Prepare the machine, then be this module of the checkout's environment."""
    try:
        environment = prepare()
    except CasemateError as error:
        sys.exit(main_guard(error))
    say(f"running {module}")
    os.chdir(CHECKOUT)
    os.execve(dev.PYTHON, [str(dev.PYTHON), "-B", "-m", module, *arguments], environment)


if __name__ == "__main__":
    become("pytest", sys.argv[1:])
