"""Writes requirements/{build,product,dev}.txt from pyproject.toml: exact versions, hashes, no index named.

`make lock` changes what has to change and keeps the other pins; `make lock UPGRADE=1` takes the
newest of everything; `--check` changes nothing and fails when a lock is not what pyproject.toml asks.
"""

import argparse
import shutil
import sys
import tempfile
import tomllib
from pathlib import Path

from rpc.errors import CasemateError, FailedPrecondition
from scripts.host import CHECKOUT, main_guard, run

LOCKS = CHECKOUT / "requirements"
OLDEST_PYTHON = "3.11"


def compile_lock(name: str, arguments: list[str | Path], folder: Path, *, upgrade: bool) -> None:
    run(
        [
            Path(sys.executable).with_name("uv"),
            *("--no-progress", "--quiet", "pip", "compile"),
            *("--universal", "--python-version", OLDEST_PYTHON),
            *("--generate-hashes", "--no-emit-index-url", "--no-annotate"),
            *("--custom-compile-command", "make lock"),
            *(["--upgrade"] if upgrade else []),
            *("--output-file", folder / f"{name}.txt"),
            *arguments,
        ],
        cwd=CHECKOUT,
        quiet=True,
    )


def compile_all(folder: Path, *, upgrade: bool = False) -> None:
    project = CHECKOUT / "pyproject.toml"
    with tempfile.TemporaryDirectory() as scratch:
        build = Path(scratch) / "build.in"
        build.write_text("\n".join(tomllib.loads(project.read_text())["build-system"]["requires"]))
        compile_lock("build", [build], folder, upgrade=upgrade)
    compile_lock("product", [project], folder, upgrade=upgrade)
    # What is tested is what is shipped: the tests' lock starts from the product's.
    compile_lock(
        "dev", [project, "--extra", "dev", "--constraint", folder / "product.txt"], folder, upgrade=upgrade
    )


def check() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for lock in LOCKS.glob("*.txt"):
            shutil.copy(lock, folder)  # known pins are kept: a new release elsewhere does not fail a check
        compile_all(folder)
        stale = sorted(
            f"requirements/{lock.name}"
            for lock in folder.iterdir()
            if lock.read_bytes() != (LOCKS / lock.name).read_bytes()
        )
    if stale:
        raise FailedPrecondition(f"not what pyproject.toml asks for: {', '.join(stale)}", hint="make lock")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make lock", description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--upgrade", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.check:
            check()
        else:
            LOCKS.mkdir(exist_ok=True)
            compile_all(LOCKS, upgrade=arguments.upgrade)
    except CasemateError as error:
        return main_guard(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
