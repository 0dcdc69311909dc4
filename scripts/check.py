"""`make check`: every check of CI that runs nothing of ours on a machine; all of them, then the verdict."""

import subprocess
import sys

from rpc.errors import CasemateError
from scripts import dev
from scripts.host import CHECKOUT, main_guard

# What is held -> how it is asked; the first word is a program of .venv/bin.
CHECKS = {
    "lint": ["ruff", "check", "--quiet", "."],
    "format": ["ruff", "format", "--quiet", "--check", "."],
    "types": ["mypy", "--no-error-summary"],
    "arrows": ["lint-imports", "--no-logo"],
    "locks": ["python", "-B", "-m", "scripts.lock", "--check"],
    "project": [
        "python",
        "-B",
        "-m",
        "pytest",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "tests/unit/project",
    ],
}


def main() -> int:
    failed = []
    try:
        environment = dev.ensure().parent
    except CasemateError as error:
        return main_guard(error)
    for name, (program, *arguments) in CHECKS.items():
        argv = [str(environment / program), *arguments]
        done = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
        print(f"{name:<10} {'ok' if done.returncode == 0 else 'FAILED'}", flush=True)
        if done.returncode != 0:
            failed.append(name)
            print(done.stdout + done.stderr, flush=True)
    if failed:
        print(f"make check: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
