"""A program of its own in the guest: gives a container's root what it lacks to find libraries that were
mounted there.

crun runs it in the container's mount namespace, before the container's root is its root, with the guest's
files around it (createContainer). It makes the root its own first, so that no link of the container's leads
out of it. What NVIDIA's hooks create-symlinks, enable-cuda-compat and update-ldcache do, in one run.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

LDCONFIG = "/usr/bin/ldconfig"
_CACHE, _CONFIG, _MORE = "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d"
_OURS = f"{_MORE}/00-casemate.conf"
# Where images of CUDA have a libcuda that is newer than a driver may be.
_COMPAT = "/usr/local/cuda/compat"


def main(arguments: list[str]) -> None:
    """--root=DIRECTORY --driver=VERSION --folder=DIRECTORY... --link=TARGET::PATH... [--readonly]"""
    given: dict[str, list[str]] = {"root": [], "driver": [], "folder": [], "link": [], "readonly": []}
    for word in arguments:
        name, _, value = word.removeprefix("--").partition("=")
        given[name].append(value)
    remount = _remount() if given["readonly"] else None
    ldconfig = os.open(LDCONFIG, os.O_RDONLY | os.O_CLOEXEC)
    os.chroot(given["root"][-1])
    os.chdir("/")
    for text in given["link"]:
        target, _, path = text.partition("::")
        make_link(target, path)
    folders = [*compat_folders(given["driver"][-1]), *given["folder"]]
    write_config(folders)
    run(ldconfig, ["ldconfig", "-f", _CONFIG, "-C", _CACHE, *folders])
    if remount is not None:
        remount()


def run(program: int, words: list[str]) -> None:
    """An open program, to its end. Exits as it does, if that is not well."""
    pid = os.fork()
    if pid == 0:
        os.execve(program, words, {"PATH": "/usr/bin:/bin"})
    _, status = os.waitpid(pid, 0)
    if status != 0:
        sys.exit(f"{words[0]} ended with status {os.waitstatus_to_exitcode(status)}")


def _remount() -> Callable[[], None]:
    """Makes the root, once it is this process's, read-only, as the container asked for (cdi.py)."""
    if not __package__:  # run as a file, as in a guest
        sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from agent import libc

    flags = libc.MS_REMOUNT | libc.MS_BIND | libc.MS_RDONLY

    def remount() -> None:
        kept = os.statvfs("/").f_flag & (libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC)  # of ST_* the same
        libc.mount("", "/", None, flags | kept)

    return remount


def make_link(target: str, path: str) -> None:
    """What the container has there itself stays, if it is no link."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(path):
        if os.readlink(path) == target:
            return
        os.unlink(path)
    elif os.path.exists(path):
        return
    os.symlink(target, path)


def compat_folders(driver: str, directory: str = _COMPAT) -> list[str]:
    """That of the image's own libcuda, if it is of a later major version than the driver."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    versions = [name.removeprefix("libcuda.so.") for name in names if name.startswith("libcuda.so.")]
    majors = [int(major) for each in versions if (major := each.partition(".")[0]).isdigit() and "." in each]
    return [directory] if majors and max(majors) > int(driver.partition(".")[0]) else []


def write_config(folders: list[str]) -> None:
    """So that the container's own ldconfig keeps them."""
    os.makedirs(_MORE, exist_ok=True)
    with open(_OURS, "w") as file:
        file.writelines(f"{folder}\n" for folder in folders)


if __name__ == "__main__":
    main(sys.argv[1:])
