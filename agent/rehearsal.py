"""What a guest does before it is saved as a template: runs a container, and leaves its free memory empty.

The rehearsal has files in the page cache and Python's code warm that the first container of every restored
guest needs. Nothing of it stays: its container and its events are deleted.
"""

from __future__ import annotations

import json
import mmap
import os

from agent import boot, libc, network, system
from agent.containers import Guest

NAME = "rehearsal"
ROOT = "/run/casemate/rehearsal"
SHARES = ("virtiofs", "9p")  # by which the host's files may come
# Of the free memory: taking all of it would have the kernel look for more, at the cost of what was cached.
SHARE_TO_EMPTY = 0.85
# The host has to have it all at once. In a larger guest, most of what is free was never written to.
MOST_TO_EMPTY_BYTES = 1 << 30
CHUNK_BYTES = 4 << 20
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
_SAFE = ["nosuid", "noexec", "nodev"]
_SPEC = {
    "ociVersion": "1.0.2",
    "hostname": NAME,
    "process": {
        "user": {"uid": 0, "gid": 0},
        "args": ["/usr/bin/crun", "--version"],
        "env": ["PATH=/usr/bin"],
        "cwd": "/",
        "capabilities": {},
        "noNewPrivileges": True,
    },
    "root": {"path": ROOT, "readonly": True},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": _SAFE},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": _SAFE},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_SAFE, "ro"]},
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev"]},
    ],
    "linux": {
        "resources": {},
        "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")],
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
    },
}


async def rehearse(guest: Guest) -> None:
    """Runs a container of the guest's own files from create to delete. Raises what its steps raise."""
    for file_system in SHARES:
        if file_system in boot.features():
            system.ensure_file_system(file_system)
    boot.load_feature(network.DRIVER)
    os.makedirs(ROOT)
    libc.mount("/", ROOT, None, libc.MS_BIND)
    try:
        await _run(guest)
    finally:
        libc.umount(ROOT)
        os.rmdir(ROOT)


async def _run(guest: Guest) -> None:
    await guest.create(NAME, json.dumps(_SPEC).encode(), terminal=False, stdin=False)
    container = guest.container(NAME)
    process = container.init
    try:
        await container.start()
        for stream in (1, 2):
            while await process.stdio.output(stream).read(0):
                pass
        await process.settled.wait()
    finally:
        container.cgroup.kill()
        await process.settled.wait()
        await guest.delete(NAME, "", kill=True)
        guest.events.forget()


def empty_free_memory(free_bytes: int) -> None:
    """Has the kernel write zeros to what is free: pages that are all zeros are not in a template."""
    taken = []
    try:
        for _ in range(min(int(free_bytes * SHARE_TO_EMPTY), MOST_TO_EMPTY_BYTES) // CHUNK_BYTES):
            taken.append(mmap.mmap(-1, CHUNK_BYTES, flags=_ANONYMOUS))
    finally:
        for chunk in taken:
            chunk.close()
