"""A QEMU of the command line that libvirt wrote into its log, executed and restored without libvirt.

The same user, files, sockets and state, the same commands on QEMU's monitor. It must not know how a machine
is designed, nor what times it.
"""

import errno
import fcntl
import json
import os
import re
import shlex
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpc.errors import DataLoss, Unavailable
from shim.helper import tail
from shim.vm.designer import VSOCK_DEVICE
from shim.vm.host import FILE_SINCE, LOG_HEAD
from shim.vm.users import QemuUser

ANSWER_S = 60.0
FIRST_CID = 3  # vsock(7): those below are taken
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # linux/vhost.h


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What libvirt executed: its words, its environment, and the files of libvirt's own that QEMU reads."""

    words: list[str]
    environment: dict[str, str]
    files: dict[str, str]

    @classmethod
    def of_log(cls, log: str) -> "CommandLine":
        """While the domain runs: its files are read, too. Raises DataLoss if there is none in the log."""
        _, _, started = log.rpartition(LOG_HEAD)
        lines: list[str] = []
        for line in started.splitlines()[1:]:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        words = shlex.split(" ".join(lines))
        first = next((number for number, word in enumerate(words) if word.startswith("/")), None)
        if first is None:
            raise DataLoss("libvirt's log has no command line of QEMU's")
        environment = dict(word.split("=", 1) for word in words[:first])
        key = re.search(r'/[^",]*/master-key\.aes', " ".join(words))
        files = {key[0]: Path(key[0]).read_bytes().hex()} if key else {}
        return cls(words[first:], environment, files)


class Monitor:
    """QEMU's own protocol on a unix socket. Blocking."""

    def __init__(self, address: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_S)
        self._socket.connect(str(address))
        self._file = self._socket.makefile("rb")

    def next(self) -> "dict[str, Any]":
        """The next message. Raises Unavailable if there will be none, TimeoutError."""
        line = self._file.readline()
        if not line:
            raise Unavailable("QEMU closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message

    def ask(self, command: str, arguments: "dict[str, Any]", *descriptors: int) -> "Any":
        """The command's answer. Raises Unavailable if QEMU refuses."""
        request = json.dumps({"execute": command, "arguments": arguments}).encode()
        socket.send_fds(self._socket, [request], descriptors)
        while "return" not in (message := self.next()):
            if "error" in message:
                raise Unavailable(f"QEMU refuses {command}", str(message["error"]))
        return message["return"]

    def wait_migrated(self) -> None:
        """Raises Unavailable if it failed."""
        while (status := self._migration()) != "completed":
            if status == "failed":
                raise Unavailable("QEMU does not take the state")

    def _migration(self) -> str:
        message = self.next()
        return str(message["data"]["status"]) if message.get("event") == "MIGRATION" else ""

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class ByHand:
    """Descriptors of our own stand for those that libvirt had opened. directory: where QEMU may write."""

    def __init__(self, line: CommandLine, user: QemuUser, directory: Path) -> None:
        self._line = line
        self._user = user
        self._address = directory / "monitor.sock"
        self._log = directory / "by-hand.log"
        self._passed: list[int] = []
        self._monitor: Monitor | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.cid = 0

    def prepare(self) -> None:
        """What libvirt would have written before QEMU's start."""
        for name, content in self._line.files.items():
            path = Path(name)
            path.parent.mkdir(parents=True)
            path.write_bytes(bytes.fromhex(content))
            for made in (path, path.parent):
                os.chown(made, self._user.uid, -1)

    def start(self) -> int:
        """QEMU's pid, once its monitor has answered. Raises Unavailable with QEMU's words."""
        group = self._user.group
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._with_descriptors(word) for word in self._line.words],
                env=self._line.environment,
                pass_fds=self._passed,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._user.uid,
                group=int(group) if group.startswith("+") else group,
                extra_groups=(),
            )
        while self._passed:
            os.close(self._passed.pop())
        self._monitor = Monitor(self._address)
        try:
            self._monitor.next()
        except Unavailable as error:
            raise Unavailable("QEMU did not start", tail(str(self._log))) from error
        self._monitor.ask("qmp_capabilities", {})
        return self._process.pid

    def _with_descriptors(self, word: str) -> str:
        if word.startswith("socket,id=charmonitor,"):
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.bind(str(self._address))
            listener.listen(1)
            return self._renumbered(word, r"\bfd=\d+", "fd={}", listener.detach())
        if "vhost-vsock" in word:
            device = self._open_vsock()
            word = re.sub(r'"guest-cid":\d+', f'"guest-cid":{self.cid}', word)
            return self._renumbered(word, r'"vhostfd":"\d+"', '"vhostfd":"{}"', device)
        return word

    def _renumbered(self, word: str, old: str, new: str, fd: int) -> str:
        self._passed.append(fd)
        changed, count = re.subn(old, new.format(fd), word)
        if count != 1:
            raise DataLoss(f"QEMU's command line has no descriptor in {word}")
        return changed

    def _open_vsock(self) -> int:
        """With a context id that no other machine has, as libvirt looks for one."""
        device = os.open(VSOCK_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        self.cid = FIRST_CID
        while True:
            try:
                fcntl.ioctl(device, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", self.cid))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    os.close(device)
                    raise
                self.cid += 1
                continue
            return device

    def load_state(self, state: int) -> None:
        """As Host.load_state()."""
        monitor = self._monitor
        assert monitor is not None
        wanted = [{"capability": name, "state": True} for name in ("x-ignore-shared", "events")]
        monitor.ask("migrate-set-capabilities", {"capabilities": wanted})
        version = monitor.ask("query-version", {})["qemu"]
        if (version["major"], version["minor"]) < FILE_SINCE:
            monitor.ask("getfd", {"fdname": "state"}, state)
            monitor.ask("migrate-incoming", {"uri": "fd:state"})
            monitor.wait_migrated()
        else:
            fdset = monitor.ask("add-fd", {}, state)["fdset-id"]
            monitor.ask("migrate-incoming", {"uri": f"file:/dev/fdset/{fdset}"})
            monitor.wait_migrated()
            monitor.ask("remove-fd", {"fdset-id": fdset})

    def resume(self) -> None:
        assert self._monitor is not None
        self._monitor.ask("cont", {})

    def close(self) -> None:
        """QEMU gone, and reaped."""
        if self._monitor is not None:
            self._monitor.close()
        while self._passed:
            os.close(self._passed.pop())
        if self._process is not None:
            self._process.kill()
            self._process.wait()
