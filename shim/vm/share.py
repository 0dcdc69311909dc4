"""The directory that a pod's files are mounted in, and what of it the guest is served.

It must not know what is mounted there (rootfs.py), nor by what it is served (virtiofsd.py).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from shim import system
from shim.paths import PodPaths


@contextmanager
def shared_directories(paths: PodPaths) -> Iterator[None]:
    """paths.shared for the shim to mount into, paths.served for virtiofsd to serve.

    Both are one peer group, so that what is mounted in the first appears in the second, also in virtiofsd's
    own mount namespace later. The second is read-only but for what is mounted in it: a guest that could
    write there would put a symbolic link where the shim is about to make a directory.
    """
    shared, served = str(paths.shared), str(paths.served)
    with ExitStack() as undo:
        # No way in for QEMU: a guest cannot connect to the host's sockets, nor shall what breaks out of it.
        paths.files.mkdir(mode=0o700, exist_ok=True)
        for path in (paths.shared, paths.served):
            # Root of a container's user namespace is none that owns it. exist_ok: another try at this machine
            path.mkdir(mode=0o711, exist_ok=True)
        system.mount(shared, shared, None, system.MS_BIND)
        undo.callback(system.umount, shared, system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
        system.mount("none", shared, None, system.MS_SHARED)
        system.mount(shared, served, None, system.MS_BIND)
        undo.callback(system.umount, served, system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
        system.mount("none", served, None, system.MS_BIND | system.MS_REMOUNT | system.MS_RDONLY)
        yield


@contextmanager
def bounded_directory(path: Path) -> Iterator[None]:
    """What QEMU, libvirt and virtiofsd write: a file system of its own, so that a guest that has QEMU log
    without end fills that and not the host's /run. The log has another one, so that it cannot fill libvirt's.
    """
    options = system.MS_NOSUID | system.MS_NODEV | system.MS_NOEXEC
    with ExitStack() as undo:
        for directory, size in ((path, "8m"), (path / "log", "2m")):
            directory.mkdir(mode=0o711, exist_ok=True)  # of another try
            data = f"size={size},nr_inodes=2k,mode=0711"
            system.mount("casemate", str(directory), "tmpfs", options, data)
            undo.callback(system.umount, str(directory), system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
        yield
