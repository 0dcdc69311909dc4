"""Where a machine comes from. One source now, the boot; restoring from a template is to come beside it.

Nothing else in the shim can tell one from another: it asks for a machine and gets one that answers.
"""

import asyncio
import logging
import os
import socket
import time
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import programs
from config.settings import Profile, Settings
from images.store import ImageStore
from rpc.api import agent as api
from rpc.channel import BUFFER_BYTES
from rpc.client import Client
from rpc.errors import DeadlineExceeded, Disconnected, FailedPrecondition
from shim import phases, system
from shim.helper import Helper, Watched
from shim.paths import PodPaths
from shim.spec import GUEST_SHARE
from shim.trace import Trace, printable
from shim.vm import accel as acceleration
from shim.vm import designer, virtiofsd
from shim.vm.console import Console, listen
from shim.vm.guest import Facts, Machine, why_ended
from shim.vm.host import Host
from shim.vm.users import qemu_user

ENTROPY_BYTES = 64
log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class MachineRequest:
    """What a pod wants of its machine, and where its files may be."""

    pod_id: str
    hostname: str
    profile: Profile
    settings: Settings
    paths: PodPaths
    cache: Path


async def boot(request: MachineRequest, trace: Trace) -> Machine:
    """Boots a machine and returns when its agent has answered and the share is mounted.

    Raises a CasemateError that says which part failed and in whose words; nothing is left then.
    """
    async with AsyncExitStack() as undo:
        machine = await _boot(request, trace, undo)
        undo.pop_all()
    return machine


async def _boot(request: MachineRequest, trace: Trace, undo: AsyncExitStack) -> Machine:
    settings, profile, paths = request.settings, request.profile, request.paths
    accel = acceleration.choose(settings.accel, request.cache / "accel.json")
    trace.accel = accel.kind
    if accel.kind != "kvm":
        hide_kvm(paths)
        log.warning(f"TCG, not KVM: {accel.reason}; the guest is emulated, which is slow")
    factor = settings.timeouts.tcg_factor if accel.kind == "tcg" else 1.0
    with trace.span(phases.IMAGE, phases.POD_READY):
        store = ImageStore(Path(settings.image_dir))
        image = undo.enter_context(store.lease(store.resolve(profile.image)))
        store.verify(image)
    qemu = programs.qemu(settings)
    if not os.access(qemu, os.X_OK):
        raise FailedPrecondition(f"QEMU: {qemu} cannot be executed")
    user = undo.enter_context(
        qemu_user(settings.qemu_user, request.cache.parent / "users", kvm=accel.kind == "kvm")
    )
    transport = designer.transport_of(settings.transport)
    sockets = socket_paths(paths)
    with trace.span(phases.VIRTIOFSD, phases.POD_READY):
        undo.enter_context(shared_directories(paths))
        files = virtiofsd.start(
            programs.virtiofsd(settings),
            paths.served,
            sockets.share,
            paths.directory / "virtiofsd.log",
            user.uid,
            request.cache / "virtiofsd.json",
        )
        undo.push_async_callback(files.end)
    console = Console(sockets.console, paths.console, settings.console_bytes, user.uid)
    undo.callback(console.close)
    reading = asyncio.create_task(console.read(), name="console")
    undo.callback(reading.cancel)
    listener = listen(sockets.agent, user.uid) if transport == "serial" else listen_vsock()
    undo.callback(listener.close)
    port = 0 if transport == "serial" else listener.getsockname()[1]
    domain = designer.design(
        profile, image, accel, transport, sockets, qemu, programs.firmware(settings), port
    )
    host = Host(paths.libvirt, user, request.cache / f"libvirt-{accel.kind}")
    pid = await asyncio.to_thread(_create, host, domain.xml(), trace)
    created_s = time.monotonic()
    process = Watched("QEMU", pid)
    undo.push_async_callback(process.end)
    cid = await asyncio.to_thread(host.vsock_cid, designer.NAME) if transport == "vsock" else None
    waiting = _answered(request, listener, cid, settings.timeouts.boot_s * factor)
    client, hello = await _unless_ended(
        waiting,
        process,
        files,
        console,
        partial(host.log_tail, designer.NAME),
        settings.timeouts.boot_s * factor,
    )
    undo.push_async_callback(client.close)
    answered_s = time.monotonic()
    trace.add(phases.GUEST_BOOT, created_s, answered_s, parent=phases.POD_READY)
    trace.add_guest(
        [(span.name, span.start_ns, span.end_ns) for span in hello.spans],
        hello.monotonic_ns,
        answered_s,
        phases.GUEST_BOOT,
    )
    facts = Facts(
        "boot", accel, transport, image.digest, printable(hello.kernel_release), hello.memory_used_bytes
    )
    machine = Machine(
        facts,
        client,
        process,
        files,
        console,
        paths.shared,
        partial(host.log_tail, designer.NAME),
        settings.timeouts.agent_call_s * factor,
        undo.pop_all(),
    )
    try:
        with trace.span(phases.GUEST_SHARE, phases.POD_READY):
            await machine.call(
                api.MOUNT_SHARE,
                api.MountShareRequest(tag=designer.SHARE_TAG, path=GUEST_SHARE, fstype="virtiofs"),
            )
    except BaseException:
        await machine.stop()
        raise
    return machine


def _create(host: Host, xml: str, trace: Trace) -> int:
    """In a thread: libvirt's calls block."""
    host.prepare()
    with trace.span(phases.LIBVIRT_IMPORT, phases.POD_READY):
        host.load()
    with trace.span(phases.LIBVIRT_OPEN, phases.POD_READY):
        host.open()
    with trace.span(phases.LIBVIRT_CREATE, phases.POD_READY):
        return host.create(xml, designer.NAME)


async def _answered(
    request: MachineRequest, listener: socket.socket, cid: int | None, timeout_s: float
) -> tuple[Client, api.HelloResponse]:
    """The agent's connection and its first answer. On virtio-serial the question waits for the guest."""
    connection = await _accept(listener, cid)
    reader, writer = await asyncio.open_connection(sock=connection, limit=BUFFER_BYTES)
    client = Client(reader, writer, "the guest's agent")
    try:
        hello = await client.call(
            api.HELLO,
            api.HelloRequest(
                protocol=api.PROTOCOL,
                pod_id=request.pod_id,
                hostname=request.hostname,
                realtime_ns=time.time_ns(),
                entropy=os.urandom(ENTROPY_BYTES),
            ),
            timeout_s=timeout_s,
        )
        if hello.protocol != api.PROTOCOL:
            raise FailedPrecondition(
                f"the guest image's agent speaks protocol {hello.protocol}, this casemate {api.PROTOCOL}",
                hint="casemate image build",
            )
    except BaseException:
        await client.close()
        raise
    return client, hello


async def _accept(listener: socket.socket, cid: int | None) -> socket.socket:
    """The guest's connection. Any VM of the host can reach a vsock port: another's is turned away."""
    loop = asyncio.get_running_loop()
    while True:
        connection, peer = await loop.sock_accept(listener)
        if cid is None or peer[0] == cid:
            return connection
        connection.close()
        log.warning(f"refused a connection from vsock context {peer[0]}: this pod's is {cid}")


async def _unless_ended(
    waiting: "Answered",
    qemu: Watched,
    files: Helper,
    console: Console,
    qemu_words: "QemuWords",
    timeout_s: float,
) -> tuple[Client, api.HelloResponse]:
    """The agent's answer, or at once why there will be none."""
    answer = asyncio.ensure_future(waiting)
    ends = [asyncio.create_task(watched.exited.wait()) for watched in (qemu, files)]
    try:
        await asyncio.wait([answer, *ends], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if files.exited.is_set() or qemu.exited.is_set():
            raise await why_ended(qemu, files, console, qemu_words)
        if not answer.done() or isinstance(answer.exception(), DeadlineExceeded):
            raise DeadlineExceeded(
                f"the guest's agent did not answer within {timeout_s:.0f} s of QEMU's start",
                details=console.words(),
                hint="timeouts.boot_s in the configuration; casemate logs shows the whole console",
            )
        try:
            return answer.result()
        except Disconnected:
            raise await why_ended(qemu, files, console, qemu_words) from None
    finally:
        for task in (answer, *ends):
            task.cancel()
        await asyncio.gather(answer, *ends, return_exceptions=True)


@contextmanager
def shared_directories(paths: PodPaths) -> "Iterator[None]":
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


def hide_kvm(paths: PodPaths) -> None:
    """A QEMU that emulates needs no /dev/kvm. libvirt asks QEMU anew for its capabilities at every step
    when the device is there and KVM is not usable (20 times 300 ms, seen with 9.0)."""
    if os.path.exists("/dev/kvm"):
        nothing = paths.directory / "nothing"
        nothing.touch(mode=0)
        nothing.chmod(0)
        system.mount(str(nothing), "/dev/kvm", None, system.MS_BIND)


def socket_paths(paths: PodPaths) -> designer.Sockets:
    return designer.Sockets(*(paths.directory / f"{name}.sock" for name in ("console", "agent", "share")))


def listen_vsock() -> socket.socket:
    """On a port that nobody else has; _accept() checks who connects."""
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listener.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        listener.listen(4)
    except BaseException:
        listener.close()
        raise
    return listener


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from typing import Any

    Answered = Coroutine[Any, Any, tuple[Client, api.HelloResponse]]
    QemuWords = Callable[[], str]
