"""The process that serves a pod's files, and what the guest has to mount to see them: virtiofsd or our own.

It must not know what is in the directory that is served, nor how the machine comes to run.
"""

import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from config import programs
from rpc.api import agent as api
from rpc.errors import Unavailable
from shim.helper import Helper, spawn
from shim.spec import GUEST_SHARE
from shim.vm import designer, virtiofsd
from shim.vm.domain import FileSystem
from shim.vm.open_files import allowed, open_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from shim.vm.setting import Setting

Dial = Callable[[], Awaitable[socket.socket]]

GUEST_VOLUMES = "/run/casemate/volumes"
CONTROL_FD = 3
NINEP = Path(__file__).parent.parent / "ninep" / "__main__.py"
# Answers of 512 KiB: larger ones are no faster, and are kept for each request that is under way.
_9P = ("version=9p2000.L", "msize=524288", "access=client")
# A container's root is this pod's alone. What is bound into it others change, too.
NINEP_ROOTS = (*_9P, "cache=loose")
NINEP_VOLUMES = (*_9P, "cache=mmap")


class VirtioFs:
    """virtiofsd, by a device of the guest's."""

    def __init__(self, process: Helper, device: FileSystem) -> None:
        self.process = process
        self.device: FileSystem | None = device

    def close(self) -> None:
        """It has nothing of ours."""

    async def connect(self, dial: Dial) -> None:
        """QEMU has."""

    def mounts(self) -> list[api.MountShareRequest]:
        return [api.MountShareRequest(tag=designer.SHARE_TAG, path=GUEST_SHARE, fstype="virtiofs")]


class NineP:
    """casemate's own, by connections to the guest that it is handed. It ends when close() is called."""

    device: FileSystem | None = None

    def __init__(self, process: Helper, control: socket.socket) -> None:
        self.process = process
        self._control = control

    def close(self) -> None:
        self._control.close()

    async def connect(self, dial: Dial) -> None:
        """One connection for each of mounts(). Raises Unavailable if the server is gone."""
        for _ in self.mounts():
            with await dial() as connection:
                connection.setblocking(True)
                try:
                    socket.send_fds(self._control, [b"c"], [connection.fileno()])
                except OSError as error:
                    raise Unavailable("the file server takes no connection", str(error)) from error

    def mounts(self) -> list[api.MountShareRequest]:
        tag = designer.SHARE_TAG
        return [
            api.MountShareRequest(tag=tag, path=GUEST_SHARE, fstype="9p", options=list(NINEP_ROOTS)),
            api.MountShareRequest(
                tag=tag, path=GUEST_VOLUMES, fstype="9p", options=list(NINEP_VOLUMES), volumes=True
            ),
        ]


FileServer = VirtioFs | NineP


def start(setting: "Setting") -> FileServer:
    """Serves request.paths.served. Raises Unavailable if the program is not there."""
    request = setting.request
    most_files = allowed(open_files(request.profile.memory_bytes))
    log = request.paths.libvirt / "log"
    if setting.files is designer.Files.VIRTIOFS:
        process = virtiofsd.start(
            programs.virtiofsd(request.settings),
            request.paths.served,
            setting.places.share,
            log / "virtiofsd.log",
            setting.user.uid,
            request.cache / "virtiofsd.json",
            most_files,
            own_files=request.own_files,
        )
        return VirtioFs(process, designer.share(setting.places))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        argv = [
            sys.executable,
            "-IBSs",
            str(NINEP),
            f"--socket-fd={CONTROL_FD}",
            f"--most-files={most_files}",
        ]
        try:
            process = spawn(
                "casemate-files",
                [*argv, os.fspath(request.paths.served)],
                fds={CONTROL_FD: theirs.fileno()},
                log=str(log / "files.log"),
            )
        except BaseException:
            ours.close()
            raise
    return NineP(process, ours)
