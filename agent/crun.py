"""The only gateway to the crun binary: runs one command of it, and turns its words into our errors.

Knows how crun is called and how it speaks; must not know what a container is to us.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal

from agent.files import read
from rpc.errors import (
    CasemateError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    NotFound,
    PermissionDenied,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent.reaper import Reaper


BINARY = "/usr/bin/crun"
TIMEOUT_S = 60.0
MAX_WORDS_BYTES = 4096
_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    # Lest a container write to it, crun copies itself into memory and executes the copy, at every call.
    # Told this, it first looks whether it lies on a read-only file system, as in the guest image; then not.
    "_LIBCONTAINER_CLONED_BINARY": "1",
}
_RESET = [signal.SIGPIPE, signal.SIGXFSZ]  # what Python ignores; ignored signals survive exec

# crun's words -> (error, what we say). The first that fits its last words.
_TRANSLATIONS: tuple[tuple[str, type[CasemateError], str], ...] = (
    (
        r"executable file `(.*)` not found in \$PATH",
        NotFound,
        r'exec: "\1": executable file not found in $PATH',
    ),
    (r"executable file `(.*)` not found", NotFound, r'exec: "\1": stat \1: no such file or directory'),
    (r"the path `(.*)` exists but it is not executable", PermissionDenied, r'exec: "\1": permission denied'),
    (r"the path `(.*)` is not a regular file", PermissionDenied, r'exec: "\1": is a directory'),
    (r"chdir to `(.*)`: No such file or directory", NotFound, r'cwd "\1": no such file or directory'),
    (r"chdir to `(.*)`: Not a directory", FailedPrecondition, r'cwd "\1": not a directory'),
    (r"chdir to `(.*)`: Permission denied", PermissionDenied, r'cwd "\1": permission denied'),
)
_SILENT = "sync socket"


class Crun:
    def __init__(self, reaper: Reaper, state_dir: str, binary: str = BINARY) -> None:
        self._reaper = reaper
        self._binary = binary
        self._state_dir = state_dir
        self._base = [binary, "--root", state_dir, "--cgroup-manager=cgroupfs", "--log-format=json"]

    def state(self, container_id: str) -> str:
        """The directory in which crun keeps what it knows of a container."""
        return f"{self._state_dir}/{container_id}"

    async def run(
        self, log: str, *arguments: str, stdio: Sequence[int] = (), timeout_s: float = TIMEOUT_S
    ) -> None:
        """Runs `crun ARGUMENTS` to its end; raises what it said if it failed.

        stdio: descriptors for 0, 1, 2; without them its output joins its log.
        """
        argv = [*self._base, f"--log={log}", *arguments]
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            streams = stdio or (null_fd, log_fd, log_fd)
            pid = self._spawn(argv, streams)
        except OSError as error:
            raise Internal(f"{self._binary} cannot be run", os.strerror(error.errno or 0)) from error
        finally:
            os.close(null_fd)
            os.close(log_fd)
        ended = self._reaper.watch(pid)
        try:
            async with asyncio.timeout(timeout_s):
                result = await asyncio.shield(ended)
        except TimeoutError:
            raise DeadlineExceeded(f"crun {arguments[0]} did not end within {timeout_s:g} s") from None
        finally:
            if not ended.done():
                os.kill(pid, signal.SIGKILL)
        if result.status:
            raise translate(words(log), arguments[0], result.status)

    def _spawn(self, argv: list[str], streams: Sequence[int]) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(streams)]
        return os.posix_spawn(
            self._binary, argv, _ENVIRONMENT, file_actions=actions, setsigdef=_RESET, setsigmask=[]
        )


def words(log: str) -> str:
    """The errors in a log of crun's, one line each; empty if it is empty."""
    text = read(log, MAX_WORDS_BYTES).decode(errors="replace")
    logged = []
    other = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if entry["level"] == "error":
                logged.append(str(entry["msg"]))
        except (ValueError, KeyError, TypeError):
            other.append(line)  # not its log: what it, or the dynamic linker, wrote to stderr
    return "\n".join(line for line in logged or other if line.strip())


def translate(said: str, command: str, status: int) -> CasemateError:
    for pattern, error, brief in _TRANSLATIONS:
        match = re.search(pattern, said)
        if match:
            return error(match.expand(brief))
    return CrunFailed(f"crun {command} failed", said or f"it ended with status {status} and said nothing")


class CrunFailed(Internal):
    """crun failed for a reason that we have no words of our own for."""

    @property
    def silent(self) -> bool:
        """The container's side died before it could say why."""
        return _SILENT in (self.details or "")
