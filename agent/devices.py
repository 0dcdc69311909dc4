"""Devices that a container is given: disks of the machine, found by their serials, and the kernel's own.

Must not know where they come from.
"""

from __future__ import annotations

import os
import stat
from contextlib import ExitStack, contextmanager
from functools import partial

from agent import boot
from agent.files import read
from agent.uevents import appearance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from rpc.api.agent import Disk

DISKS = "/sys/block"
FEATURES = {(10, 229): "fuse", (10, 200): "tun"}
"""What a guest image calls the modules of a character device, by its numbers."""
NODES = "/dev/casemate"
USUAL_MODE = 0o666
PLUGGED_S = 10.0  # from QEMU's word that a disk is plugged in to the guest's driver


def make_there(spec: dict[str, Any]) -> None:
    """The drivers of an OCI config.json's devices are loaded. Raises FailedPrecondition if there is none."""
    for device in spec["linux"].get("devices") or ():
        feature = FEATURES.get((device.get("major"), device.get("minor")))
        if device.get("type") != "b" and feature is not None:
            boot.load_feature(feature)


async def add_disks(spec: dict[str, Any], disks: Sequence[Disk]) -> None:
    """Adds them, with the numbers that they have here, to an OCI config.json. Raises Unavailable for one that
    does not appear."""
    linux = spec.setdefault("linux", {})
    devices = linux.setdefault("devices", [])
    rules = linux.setdefault("resources", {}).setdefault("devices", [])
    for disk in disks:
        look = partial(find, disk.serial)
        major, minor = await appearance(look, f"disk {disk.serial}", PLUGGED_S)
        number = {"type": "b", "major": major, "minor": minor}
        devices.append({"path": disk.path, "fileMode": disk.mode, "uid": disk.uid, "gid": disk.gid, **number})
        rules.append({"allow": True, "access": "rm" if disk.read_only else "rwm", **number})


@contextmanager
def nodes_of(spec: dict[str, Any], directory: str) -> Iterator[None]:
    """What is in an OCI config.json's linux.devices is bound into the container, while the block runs, from
    nodes in a directory that is there meanwhile.

    For a user namespace, where nobody makes nodes: crun would bind what has their names in the guest's own
    /dev, be it another device or none.
    """
    linux = spec["linux"]
    devices, linux["devices"] = linux.get("devices") or (), []
    mounts = spec.setdefault("mounts", [])
    with ExitStack() as undo:
        for number, device in enumerate(devices):
            if not number:
                os.makedirs(directory, 0o711)
                undo.callback(os.rmdir, directory)
            path = f"{directory}/{number}"
            kind = stat.S_IFBLK if device.get("type") == "b" else stat.S_IFCHR
            os.mknod(path, kind | 0o600, os.makedev(device["major"], device["minor"]))
            undo.callback(os.unlink, path)
            os.chown(path, device.get("uid") or 0, device.get("gid") or 0)
            mode = device.get("fileMode")
            os.chmod(path, USUAL_MODE if mode is None else mode & 0o777)
            mounts.append(
                {"destination": device["path"], "type": "bind", "source": path, "options": ["bind"]}
            )
        yield


def find(serial: str, disks: str = DISKS) -> tuple[int, int] | None:
    """The numbers of the disk of this serial, if there is one."""
    for name in os.listdir(disks):
        try:
            if read(f"{disks}/{name}/serial").decode(errors="replace").strip() != serial:
                continue
            major, _, minor = read(f"{disks}/{name}/dev").decode().partition(":")
        except OSError:  # it has none, or has just gone
            continue
        return int(major), int(minor)
    return None
