"""Serves a directory of the host to one guest: starts virtiofsd, C (QEMU 7.2) or Rust, sandboxed.

It must not know what is in the directory.
"""

import os
from pathlib import Path

from rpc.errors import Unavailable
from shim.helper import Helper, spawn
from shim.vm.console import listen
from shim.vm.versions import version_text

SOCKET_FD = 3
REMEMBERED_S = 1  # for how long a guest takes names and attributes for granted


def start(
    program: str,
    directory: Path,
    socket_path: Path,
    log: Path,
    owner: int,
    cache: Path,
    most_files: int,
    *,
    own_files: bool,
) -> Helper:
    """Listens on socket_path, which belongs to the user QEMU runs as, and hands it to virtiofsd.

    most_files: that it may hold open. own_files: nobody but the guest is expected to change them, so that it
    may keep what it read of a file until the file's size or time is another. QEMU connects whenever it is
    ready; there is nothing to wait for. Raises Unavailable if the program is not there.
    """
    if not os.access(program, os.X_OK):
        raise Unavailable(
            f"virtiofsd: {program} cannot be executed",
            hint="apt install virtiofsd (Debian 13) or qemu-system-common (Debian 12)",
        )
    with listen(socket_path, owner) as listener:
        listener.setblocking(True)
        options = _c_options(directory, own_files) if is_c(program, cache) else _rust_options(directory)
        options.append(f"--rlimit-nofile={most_files}")
        return spawn("virtiofsd", [program, *options], fds={SOCKET_FD: listener.fileno()}, log=str(log))


def _c_options(directory: Path, own_files: bool) -> list[str]:
    """QEMU's own virtiofsd, of 7.2 and before (docs/tools/virtiofsd.rst there).

    cache=auto has the guest drop a file's pages whenever it is opened, those that another process runs from,
    too. cache=always has it keep them, and alone would have it ask for attributes once a day.

    No thread pool: GLib's asks for the CPU affinity now and then, which virtiofsd's seccomp filter answers
    with SIGSYS (seen with Debian 12's, audit: syscall=204).
    """
    kept = ["cache=always", f"timeout={REMEMBERED_S}"] if own_files else ["cache=auto"]
    options = [f"source={directory}", *kept, "sandbox=namespace", "announce_submounts", "xattr"]
    return [f"--fd={SOCKET_FD}", *(word for option in options for word in ("-o", option))]


def _rust_options(directory: Path) -> list[str]:
    """gitlab.com/virtio-fs/virtiofsd, 1.7 and newer (its README).

    Its cache=always cannot be told to ask for attributes more than once a day.
    """
    return [
        f"--fd={SOCKET_FD}",
        f"--shared-dir={directory}",
        "--cache=auto",
        "--sandbox=namespace",
        "--announce-submounts",
        "--xattr",
        "--thread-pool-size=4",
    ]


def is_c(program: str, cache: Path) -> bool:
    """Which of the two it is: the Rust one says "virtiofsd 1.13.0"."""
    return "virtiofsd version" in version_text(program, cache)
