"""The one way images/ runs other programs: checked, quiet, and a failure prints a line one can paste.

Must not know what the programs are for.
"""

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from rpc.errors import CasemateError, DeadlineExceeded, FailedPrecondition, NotFound

_SHOWN_BYTES = 2000  # of what a failed program said


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    stdin: bytes | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_s: float = 600.0,
    package: str | None = None,
) -> bytes:
    """Runs a program to its end and returns its standard output.

    environment is added to a small fixed one, so that a build does not depend on the caller's locale.
    package names the Debian package to install when the program is missing.
    Raises NotFound, DeadlineExceeded, or FailedPrecondition with the program's own last words.
    """
    words = [os.fspath(word) for word in command]
    added = dict(environment or {})
    settings = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    settings |= {"LC_ALL": "C.UTF-8", "TZ": "UTC"} | added
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            input=b"" if stdin is None else stdin,
            env=settings,
            capture_output=True,
            check=False,
            timeout=timeout_s,
        )
    except FileNotFoundError as error:
        raise NotFound(
            f"{words[0]} is not installed",
            hint=f"apt-get install {package or words[0]}",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(
            f"{words[0]} did not end within {timeout_s:.0f} s", pasteable(words, cwd, added)
        ) from error
    if done.returncode:
        raise _failure(words, cwd, added, done.returncode, done.stderr + done.stdout)
    return done.stdout


def pasteable(words: Sequence[str], cwd: Path | None, environment: Mapping[str, str]) -> str:
    """The line that repeats a command in a shell."""
    line = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items()) + shlex.join(words)
    return f"(cd {shlex.quote(os.fspath(cwd))} && {line})" if cwd else line


def _failure(
    words: Sequence[str], cwd: Path | None, environment: Mapping[str, str], status: int, said: bytes
) -> CasemateError:
    ended = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
    last_words = said.decode(errors="replace").strip()[-_SHOWN_BYTES:]
    return FailedPrecondition(
        f"{words[0]} {ended}",
        f"{last_words}\ncommand: {pasteable(words, cwd, environment)}",
    )
