"""`make test`: installs what the tests need, then becomes pytest, whose summary is the last line."""

import os
import sys
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
    require_root("test")
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


def main() -> NoReturn:
    try:
        environment = prepare()
    except CasemateError as error:
        sys.exit(main_guard(error))
    say("running the tests")
    os.chdir(CHECKOUT)
    os.execve(dev.PYTHON, [str(dev.PYTHON), "-B", "-m", "pytest", *sys.argv[1:]], environment)


if __name__ == "__main__":
    main()
