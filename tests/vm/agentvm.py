"""A guest with nothing around it: QEMU by hand, the agent on a virtio-serial port, a disk with busybox on it.

What speaks to the agent directly, without shim and containerd. What should come out is the tests' business.
"""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from images.image import GuestImage
from rpc.api import agent as api
from rpc.client import Client
from rpc.errors import Unavailable
from shim.vm.designer import EMULATED_CMDLINE

T = TypeVar("T")
Json = dict[str, Any]

SHARED = "/run/casemate/shared"
BOOT_S = 120.0
CALL_S = 60.0
NAMESPACES = ("pid", "ipc", "uts", "mount", "cgroup", "network")
CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID"]
MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {
        "destination": "/dev",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "strictatime", "mode=755"],
    },
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["newinstance", "ptmxmode=0666"],
    },
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
]
FOREIGN_ELF = bytes.fromhex("7f454c46020101000000000000000000 0200b700 01000000") + bytes(40)


def make_disk(directory: Path) -> Path:
    """An ext4 image: busybox under all its names, and the things that cannot be executed."""
    root = directory / "root"
    for name in ("bin", "proc", "sys", "dev", "tmp", "etc"):
        (root / name).mkdir(parents=True)
    busybox = root / "bin/busybox"
    shutil.copy("/bin/busybox", busybox)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/text").write_text("not a program\n")
    for name, content in (
        ("foreign", FOREIGN_ELF),
        ("garbage", b"neither\n"),
        ("lost-script", b"#!/bin/nosuch\n"),
    ):
        (root / "bin" / name).write_bytes(content)
        (root / "bin" / name).chmod(0o755)
    (root / "bin/root-only").symlink_to("/etc/root-only")
    shutil.copy("/bin/busybox", root / "etc/root-only")
    (root / "etc/root-only").chmod(0o700)
    disk = directory / "disk.ext4"
    with disk.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", root, disk], check=True)
    return disk


def process(*args: str, **changes: Any) -> Json:
    """An OCI process of the busybox root."""
    value: Json = {
        "user": {"uid": 0, "gid": 0},
        "args": list(args),
        "env": ["PATH=/bin", "HOME=/"],
        "cwd": "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        "noNewPrivileges": True,
    }
    return value | changes


def spec(*args: str, resources: Json | None = None, without: str = "", **changes: Any) -> Json:
    """An OCI configuration; `without` leaves a namespace out, changes are the process's."""
    return {
        "ociVersion": "1.0.2",
        **({} if without == "uts" else {"hostname": "inside"}),
        "process": process(*args, **changes),
        "root": {"path": SHARED, "readonly": False},
        "mounts": list(MOUNTS),
        "linux": {
            "resources": resources or {},
            "namespaces": [{"type": name} for name in NAMESPACES if name != without],
        },
    }


def privileged(*args: str) -> Json:
    """A container that sees the guest's files, at /guest, and may load modules."""
    may = [*CAPABILITIES, "CAP_SYS_MODULE", "CAP_SYSLOG", "CAP_SYS_ADMIN"]
    what = spec(*args, capabilities=dict.fromkeys(("bounding", "effective", "permitted"), may))
    guest = {"destination": "/guest", "type": "bind", "source": "/", "options": ["rbind", "ro"]}
    what["mounts"] = [*what["mounts"], guest]
    return what


class AgentVM:
    """A running guest and the connection to its agent; a context manager that leaves no QEMU behind."""

    def __init__(
        self,
        image: GuestImage,
        disk: Path,
        directory: Path,
        *,
        cmdline: str = "casemate.transport=serial",
        options: tuple[str, ...] = (),
        qemu: Sequence[str | Path] = ("qemu-system-x86_64",),
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self.socket = directory / "agent.sock"
        self.console = directory / "console.log"
        self.exits: dict[tuple[str, str], api.Event] = {}
        self.order: list[tuple[str, str]] = []
        self.ooms: list[str] = []
        self._happened = asyncio.Condition()
        self._listening: asyncio.Task[None] | None = None
        self._client: Client | None = None
        words = f"console=ttyS0 quiet panic=-1 pci=lastbus=0 {EMULATED_CMDLINE} {image.cmdline} {cmdline}"
        arguments = [
            # One thread for both CPUs: with one each, a kernel that patches its own code on the one may trap
            # on the other (int3 in sched_clock_cpu, one boot of some hundreds, QEMU 7.2).
            *("-accel", "tcg,thread=single"),
            *("-M", "q35,sata=off,smbus=off,i8042=off,vmport=off,hpet=off,usb=off,graphics=off"),
            *("-cpu", "max", "-smp", "2", "-m", "256M", "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", "-bios", "/usr/share/qemu/qboot.rom", "-kernel", image.kernel, "-append", words),
            *(("-initrd", image.initrd) if image.initrd else ()),
            *_disk("image", image.rootfs, "readonly=on,file.locking=off"),
            *_disk("shared", disk, "snapshot=on"),
            *("-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"),
            *("-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=agent,path={self.socket},server=on,wait=off"),
            *("-device", "virtserialport,chardev=agent,name=dev.casemate.agent"),
            *options,
        ]
        self.qemu = subprocess.Popen(
            [*map(str, qemu), *map(str, arguments)], stdin=subprocess.DEVNULL, cwd=directory
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._client is not None:
                self.loop.run_until_complete(self._leave(self._client))
        finally:
            self.loop.close()
            self.qemu.kill()
            self.qemu.wait()

    def run(self, scenario: Coroutine[Any, Any, T], timeout_s: float = 240.0) -> T:
        """Runs one scenario; a failure shows the guest's console."""
        try:
            return self.loop.run_until_complete(asyncio.wait_for(scenario, timeout_s))
        except BaseException as error:
            error.add_note(f"console:\n{self.console.read_text(errors='replace')[-4000:]}")
            raise

    @property
    def client(self) -> Client:
        assert self._client is not None
        return self._client

    # the agent's calls

    async def hello(self, **fields: Any) -> api.HelloResponse:
        request: Json = {"protocol": api.PROTOCOL, "pod_id": "pod", "hostname": "guest"} | fields
        return await self.client.call(api.HELLO, api.HelloRequest(**request), timeout_s=BOOT_S)

    async def connect(self) -> Client:
        """As soon as QEMU has made its socket."""
        deadline = time.monotonic() + BOOT_S
        while True:
            try:
                self._client = await Client.connect_unix(str(self.socket))
                return self._client
            except Unavailable:
                if time.monotonic() > deadline or self.qemu.poll() is not None:
                    raise
                await asyncio.sleep(0.02)  # a socket's appearance has no event short of inotify

    async def begin(self) -> api.HelloResponse:
        """Connect, say hello, mount the disk, listen to the events."""
        await self.connect()
        answer = await self.hello(realtime_ns=time.time_ns(), entropy=os.urandom(32))
        await self.client.call(
            api.MOUNT_SHARE, api.MountShareRequest(tag="/dev/vdb", path=SHARED, fstype="ext4")
        )
        self._listening = self.loop.create_task(self._listen())
        return answer

    async def create(self, name: str, what: Json, **flags: bool) -> int:
        request = api.CreateContainerRequest(
            container_id=name,
            spec_json=json.dumps(what).encode(),
            terminal=flags.get("terminal", False),
            stdin=flags.get("stdin", False),
        )
        return (await self.client.call(api.CREATE_CONTAINER, request, timeout_s=CALL_S)).pid

    async def start(self, name: str) -> None:
        await self.client.call(api.START_CONTAINER, api.ContainerRequest(container_id=name), timeout_s=CALL_S)

    async def exec(self, name: str, exec_id: str, what: Json, **flags: bool) -> int:
        request = api.ExecRequest(
            container_id=name, exec_id=exec_id, process_json=json.dumps(what).encode(), **flags
        )
        return (await self.client.call(api.EXEC, request, timeout_s=CALL_S)).pid

    async def signal(self, name: str, number: int, exec_id: str = "", *, everyone: bool = False) -> None:
        request = api.SignalRequest(container_id=name, exec_id=exec_id, signal=number, all=everyone)
        await self.client.call(api.SIGNAL, request, timeout_s=CALL_S)

    async def delete(self, name: str, exec_id: str = "", *, kill: bool = False) -> None:
        request = api.DeleteRequest(container_id=name, exec_id=exec_id, kill=kill)
        await self.client.call(api.DELETE, request, timeout_s=CALL_S)
        for key in [key for key in self.exits if key[0] == name and exec_id in ("", key[1])]:
            del self.exits[key]

    async def write(self, name: str, data: bytes, exec_id: str = "") -> None:
        request = api.WriteStdinRequest(container_id=name, exec_id=exec_id, data=data)
        await self.client.call(api.WRITE_STDIN, request)

    async def close_stdin(self, name: str, exec_id: str = "") -> None:
        request = api.CloseStdinRequest(container_id=name, exec_id=exec_id)
        await self.client.call(api.CLOSE_STDIN, request, timeout_s=CALL_S)

    async def chunks(
        self, name: str, exec_id: str = "", stream: int = api.STDOUT, max_bytes: int = 0
    ) -> AsyncIterator[bytes]:
        request = api.ReadOutputRequest(
            container_id=name, exec_id=exec_id, stream=stream, max_bytes=max_bytes
        )
        while True:
            answer = await self.client.call(api.READ_OUTPUT, request)
            if answer.eof:
                return
            yield answer.data

    async def output(self, name: str, exec_id: str = "", stream: int = api.STDOUT) -> bytes:
        return b"".join([chunk async for chunk in self.chunks(name, exec_id, stream)])

    async def exit_of(self, name: str, exec_id: str = "") -> int:
        async with asyncio.timeout(CALL_S), self._happened:
            await self._happened.wait_for(lambda: (name, exec_id) in self.exits)
        return self.exits[name, exec_id].exit_status

    async def oom_of(self, name: str) -> None:
        async with asyncio.timeout(CALL_S), self._happened:
            await self._happened.wait_for(lambda: name in self.ooms)

    async def finish(self, name: str) -> int:
        """Kill a container, wait for its end, delete it; its status."""
        with contextlib.suppress(Exception):
            await self.signal(name, 9)
        status = await self.exit_of(name)
        await self.delete(name)
        return status

    async def once(self, name: str, what: Json, **flags: bool) -> tuple[int, bytes, bytes]:
        """A container's whole life: status, stdout, stderr."""
        await self.create(name, what, **flags)
        await self.start(name)
        out, err = await asyncio.gather(self.output(name), self.output(name, stream=api.STDERR))
        status = await self.exit_of(name)
        await self.delete(name)
        return status, out, err

    async def exec_once(self, name: str, exec_id: str, what: Json) -> tuple[int, bytes]:
        await self.exec(name, exec_id, what)
        out = await self.output(name, exec_id)
        status = await self.exit_of(name, exec_id)
        await self.delete(name, exec_id)
        return status, out

    @contextmanager
    def sleeper(self, name: str, **options: Any) -> Iterator[str]:
        """A container that sleeps while the test does things with it."""

        async def begin() -> None:
            await self.create(name, spec("sleep", "1000", **options))
            await self.start(name)

        self.run(begin())
        try:
            yield name
        finally:
            if (name, "") not in self.exits:
                self.run(self.finish(name))
            else:
                self.run(self.delete(name))

    async def _listen(self) -> None:
        with contextlib.suppress(Unavailable):  # the guest is gone
            async with self.client.stream(api.EVENTS, api.EventsRequest()) as events:
                async for event in events:
                    async with self._happened:
                        self._note(event)
                        self._happened.notify_all()

    def _note(self, event: api.Event) -> None:
        if event.kind == api.EventKind.OOM:
            self.ooms.append(event.container_id)
            return
        key = (event.container_id, event.exec_id)
        assert key not in self.exits, f"a second exit of {key}"
        self.exits[key] = event
        self.order.append(key)

    async def _leave(self, client: Client) -> None:
        await client.close()
        if self._listening is not None:
            await self._listening


def _disk(name: str, path: Path, options: str) -> tuple[str, ...]:
    drive = f"if=none,id={name},format=raw,file={path},{options}"
    return ("-drive", drive, "-device", f"virtio-blk-pci,drive={name}")
