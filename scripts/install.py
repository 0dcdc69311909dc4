"""`make install`: the product, its executables and its guest image; nothing is done twice."""

import argparse
import sys

from rpc.errors import CasemateError
from scripts import product
from scripts.host import main_guard, require_root, say


def main() -> int:
    parser = argparse.ArgumentParser(prog="make install", description=__doc__)
    parser.add_argument("--prefix", default=str(product.DEFAULT_PREFIX))
    arguments = parser.parse_args()
    try:
        require_root("install")
        prefix = product.checked_prefix(arguments.prefix)
        changed = product.install(prefix)
        product.ensure_image()
        product.ensure_template()
    except CasemateError as error:
        return main_guard(error)
    say(f"installed in {prefix}" if changed else f"up to date in {prefix}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
