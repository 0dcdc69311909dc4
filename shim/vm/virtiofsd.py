"""Serves a directory of the host to one guest: starts virtiofsd, C (QEMU 7.2) or Rust, sandboxed.

It must not know what is in the directory.
"""

import os
import resource
from pathlib import Path

from rpc.errors import Unavailable
from shim.helper import Helper, spawn
from shim.vm.console import listen
from shim.vm.versions import version_text

SOCKET_FD = 3
MOST_FILES = 1 << 20  # virtiofsd's own default
REMEMBERED_S = 1  # for how long a guest takes names and attributes for granted


def start(
    program: str,
    directory: Path,
    socket_path: Path,
    log: Path,
    owner: int,
    cache: Path,
    memory_bytes: int,
    *,
    own_files: bool,
) -> Helper:
    """Listens on socket_path, which belongs to the user QEMU runs as, and hands it to virtiofsd.

    memory_bytes: the guest's. own_files: nobody but the guest is expected to change them, so that it may keep
    what it read of a file until the file's size or time is another. QEMU connects whenever it is ready; there
    is nothing to wait for. Raises Unavailable if the program is not there.
    """
    if not os.access(program, os.X_OK):
        raise Unavailable(
            f"virtiofsd: {program} cannot be executed",
            hint="apt install virtiofsd (Debian 13) or qemu-system-common (Debian 12)",
        )
    with listen(socket_path, owner) as listener:
        listener.setblocking(True)
        options = _c_options(directory, own_files) if is_c(program, cache) else _rust_options(directory)
        options.append(f"--rlimit-nofile={allowed(open_files(memory_bytes))}")
        return spawn("virtiofsd", [program, *options], fds={SOCKET_FD: listener.fileno()}, log=str(log))


def open_files(memory_bytes: int) -> int:
    """How many files virtiofsd may hold open: one, with its inode, for each that the guest remembers.

    Linux spends about a KiB on each (struct fuse_inode and a dentry): one that says it remembers more lies.
    """
    return min(memory_bytes >> 10, MOST_FILES)


def allowed(files: int) -> int:
    """As many of them as this process may have its children open: the Rust virtiofsd ends where it may not.

    More than the hard limit takes CAP_SYS_RESOURCE, which root in a container or a VM of a cloud may lack.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or files <= hard:
        return files
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, files))
    except ValueError:  # how Python tells EPERM here
        return hard
    return files


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
