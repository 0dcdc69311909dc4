"""Commands in another root file system, in mount, process, host and IPC name spaces that end with them.

Shares with this machine its network, the way to its package sources, /dev and /sys. Must not know what is
run there, nor how the file system was made.
"""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rpc.errors import CasemateError

# A way to a package source may be told by the environment. Nothing else of it gets in.
PASSED_ON = ("PIP_", "GOPROXY", "GOSUMDB", "GONOSUMDB", "GOFLAGS", "HTTP_", "HTTPS_", "NO_PROXY", "SSL_CERT_")
COPIED = ("/etc/resolv.conf", "/etc/pip.conf", "/root/.config/pip/pip.conf", "/root/.config/go/env")
PLAIN = {
    "HOME": "/root",
    "TERM": "dumb",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
SHOWN = 4000  # characters of what a failed command said
UNSHARE = (
    # unshare itself lets SIGTERM pass: whoever is killed in the middle leaves nothing running
    *("setpriv", "--pdeathsig", "KILL", "unshare"),
    *("--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"),
    *("--propagation", "private"),
)

# pivot_root and not chroot: in a chroot no user namespace can be made, and virtiofsd wants one.
# Takes the root, the commands that mount it and what is seen in it, the directory, the command.
ENTER = """\
set -e
root=$1
eval "$2"
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755,nosuid,nodev tmpfs "$root/run"
mount -t tmpfs -o mode=1777,nosuid,nodev tmpfs "$root/tmp"
hostname rootspace
cd "$root"
mkdir -p .outside
pivot_root . .outside
cd /
umount -l /.outside
rmdir /.outside
cd "$3"
shift 3
exec "$@"
"""


@dataclass(frozen=True, slots=True)
class Rootspace:
    """A root file system: the directory `root` itself; or, with `lower` trees (the uppermost first), an
    overlay over them that is mounted on the empty directory `root`, and whose changes go to `upper`.

    upper and work are directories of one file system, which keep nothing but changes between commands.
    shown, lent: directories of this machine that are seen in it, read-only and writable: path there -> here.
    """

    root: Path
    lower: tuple[Path, ...] = ()
    upper: Path | None = None
    work: Path | None = None
    shown: Mapping[str, Path] = field(default_factory=dict)
    lent: Mapping[str, Path] = field(default_factory=dict)

    def run(
        self, command: Sequence[str | Path], *, cwd: str = "/", niceness: int = 0, log: Path | None = None
    ) -> int:
        """Run a command to its end; every process of it ends with it. Its words go to the end of the file
        log, or else where ours go."""
        script = ["sh", "-c", ENTER, "enter", self.root, self._mounts(), cwd, *command]
        with ExitStack() as stack:
            words = stack.enter_context(log.open("ab")) if log else None
            return subprocess.run(
                [str(word) for word in ["nice", "-n", str(niceness), *UNSHARE, *script]],
                env={**self._passed_on(), **PLAIN},
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                check=False,
            ).returncode

    def check(
        self, command: Sequence[str | Path], *, cwd: str = "/", niceness: int = 0, log: Path | None = None
    ) -> None:
        """The same, for a command that must succeed. Raises CasemateError, with the last words in log."""
        if code := self.run(command, cwd=cwd, niceness=niceness, log=log):
            raise CasemateError(
                f"exit code {code} in {self.root} from: {shlex.join(map(str, command))}",
                details=log.read_text(errors="replace")[-SHOWN:].strip() if log else None,
            )

    def merge(self) -> list[str]:
        """The command that mounts the root."""
        if not self.lower:
            return ["mount", "--bind", str(self.root), str(self.root)]
        lower = ":".join(map(str, self.lower))
        options = f"lowerdir={lower},upperdir={self.upper},workdir={self.work}"
        return ["mount", "-t", "overlay", "-o", options, "overlay", str(self.root)]

    def _mounts(self) -> str:
        commands = [self.merge()]
        for there, here in {**self.shown, **self.lent}.items():
            point = str(self.root / there.lstrip("/"))
            commands += [["mkdir", "-p", point], ["mount", "--bind", str(here), point]]
            if there in self.shown:
                commands += [["mount", "-o", "remount,bind,ro", point]]
        return "\n".join(map(shlex.join, commands))

    def _passed_on(self) -> dict[str, str]:
        """Settings that lead to package sources; a path is passed on if it is there, too."""
        trees = [tree for tree in (self.upper, *self.lower) if tree] or [self.root]
        return {
            name: value
            for name, value in os.environ.items()
            if name.upper().startswith(PASSED_ON)
            and (
                not value.startswith("/") or any(os.path.lexists(tree / value.lstrip("/")) for tree in trees)
            )
        }


def copy_sources(target: Path) -> None:
    """Into a tree: the files by which this machine's name resolution, pip and Go find their way."""
    for name in COPIED:
        if os.path.exists(name):
            copy = target / name.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.unlink(missing_ok=True)
            shutil.copyfile(name, copy)
