"""The file systems of the share that a container is on, kept mounted for as long as the container is there.

virtiofsd announces what is mounted below the shared directory, and the kernel mounts each of it where it is
first walked through: in the container alone, if the agent does not come first. Then the death of the
container's last process unmounts it, while the kernel still tells virtiofsd of the files that the process had
open, and a kernel that finds such inodes busy stops there ("VFS: Busy inodes after unmount of virtiofs", seen
with 6.12, once in hundreds of kills).
"""

from __future__ import annotations

import os
from contextlib import suppress

from agent import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def take_volumes_from(spec: dict[str, Any], share: str, volumes: str) -> None:
    """What is bound into a container from below `share` is the same below `volumes`, if there is such."""
    if not volumes:
        return
    for mount in spec.get("mounts") or ():
        source = mount.get("source")
        if mount.get("type") == "bind" and isinstance(source, str) and source.startswith(f"{share}/"):
            mount["source"] = volumes + source.removeprefix(share)


class Submounts:
    def __init__(self, spec: dict[str, Any], share: str) -> None:
        """Of a container's root and of what is bound into it, if it is below the directory `share`.

        Walks through each, which mounts it here.
        """
        binds = (mount.get("source") for mount in spec.get("mounts") or () if mount.get("type") == "bind")
        paths = (path for path in (spec["root"].get("path"), *binds) if isinstance(path, str))
        self._paths = [path for path in paths if share and path.startswith(f"{share}/")]
        for path in self._paths:
            # What is wrong with it is for crun to say; a file is on its directory's file system.
            with suppress(OSError, ValueError):
                os.close(os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))

    def release(self) -> None:
        """Once nothing of the container runs. Raises OSError."""
        while self._paths:
            path = self._paths.pop()
            if os.path.ismount(path):
                os.statvfs(path)  # a question that virtiofsd answers after those that it was asked before
                libc.umount(path)
