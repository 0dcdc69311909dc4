"""What a pod's processes see of other pods' files: nothing. Works in the pod's own mount namespace.

It must not know what the processes are.
"""

import os

from shim import system
from shim.paths import PodPaths


def enter(paths: PodPaths) -> None:
    """As first process of a PID namespace, in a new mount namespace: mounts no longer propagate out, /proc
    shows this namespace, nothing gains privileges, and of all pods' directories there is only this one's."""
    system.no_new_privileges()
    system.mount("none", "/", None, system.MS_REC | system.MS_SLAVE)
    hide_other_pods(paths)
    system.mount("proc", "/proc", "proc", system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC)


def hide_other_pods(paths: PodPaths) -> None:
    """What breaks out of this pod's QEMU finds no socket of another's, nor of a machine of the pool."""
    own = paths.directory
    held = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    options = system.MS_NOSUID | system.MS_NODEV
    for home in paths.homes:
        home.mkdir(mode=0o711, exist_ok=True)
        system.mount("none", str(home), "tmpfs", options, "mode=0711,size=64k")
    own.mkdir(mode=0o711)
    system.mount(f"/proc/self/fd/{held}", str(own), None, system.MS_BIND | system.MS_REC)
    os.close(held)


def step_out(paths: PodPaths) -> None:
    """As show_other_pods(), for the calling thread alone, in a mount namespace of its own.

    libvirt's threads stay behind, where the directory may be removed while they write to it: what they would
    make anew, they make in a directory that is no more, and cannot. Nobody has to wait until they are done.
    """
    system.unshare(system.CLONE_NEWNS)
    show_other_pods(paths)


def show_other_pods(paths: PodPaths) -> None:
    """The way back, for a shim that ends: it has to remove its directory where everybody sees it."""
    for path in (paths.directory, *paths.homes):
        system.umount(str(path), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
