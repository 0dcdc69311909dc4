"""`make bench` and `make bench-compare`: install what measuring needs, then become bench/.

bench/ starts its containerds and writes its pages itself; here is only what stands before it.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpc.errors import CasemateError
from scripts import dev
from scripts.host import CHECKOUT, main_guard, run, say
from scripts.test import become, prepare


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of `commit` beside this one, for as long as it is compared."""
    with tempfile.TemporaryDirectory(prefix="casemate-base-", dir="/var/tmp") as scratch:
        path = Path(scratch) / "checkout"
        git: list[str | Path] = ["git", "-c", f"safe.directory={CHECKOUT}", "-C", CHECKOUT]
        run([*git, "worktree", "add", "--detach", path, commit], quiet=True, hint=f"is {commit} a commit?")
        try:
            yield path
        finally:
            run([*git, "worktree", "remove", "--force", path], quiet=True)


def compare(base: str, arguments: list[str]) -> int:
    """Measure this checkout and another commit in turns. bench's exit code."""
    try:
        environment = prepare()
        with worktree(base) as path:
            say(f"comparing with {base}")
            argv: list[str | Path] = [
                dev.PYTHON,
                "-B",
                "-m",
                "bench",
                "compare",
                f"--base={path}",
                *arguments,
            ]
            return subprocess.run(argv, cwd=CHECKOUT, env=environment, check=False).returncode
    except CasemateError as error:
        return main_guard(error)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--base"]:
        sys.exit(compare(sys.argv[2], sys.argv[3:]))
    become("bench", ["performance", *sys.argv[1:]])
