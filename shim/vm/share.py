"""The directory that a pod's files are mounted in, and what of it the guest is served.

It must not know what is mounted there (rootfs.py), nor by what it is served (virtiofsd.py).
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

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
        for path in (paths.shared, paths.served):
            path.mkdir(mode=0o700)
        system.mount(shared, shared, None, system.MS_BIND)
        undo.callback(system.umount, shared, system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
        system.mount("none", shared, None, system.MS_SHARED)
        system.mount(shared, served, None, system.MS_BIND)
        undo.callback(system.umount, served, system.MNT_DETACH | system.UMOUNT_NOFOLLOW)
        system.mount("none", served, None, system.MS_BIND | system.MS_REMOUNT | system.MS_RDONLY)
        yield
