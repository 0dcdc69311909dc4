"""Where a machine comes from. One source now, the boot; restoring from a template is to come beside it.

Nothing else in the shim can tell one from another: it asks for a machine and gets one that answers.
"""

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import programs
from config.settings import Profile, Settings
from images.store import ImageStore
from rpc.api import agent as api
from rpc.client import Client
from rpc.errors import DeadlineExceeded, Disconnected, FailedPrecondition
from shim import phases, system
from shim.helper import Helper, Watched, in_thread
from shim.paths import PodPaths
from shim.spec import GUEST_SHARE
from shim.trace import Trace, printable
from shim.vm import accel as acceleration
from shim.vm import designer, virtiofsd
from shim.vm.console import Console, listen
from shim.vm.guest import Facts, Machine, files_failure, why_ended
from shim.vm.hello import greet, listen_vsock
from shim.vm.host import Host
from shim.vm.share import bounded_directory, shared_directories
from shim.vm.users import qemu_user
from shim.vm.versions import check_qemu

# From a child's last system call to the shim's knowledge of its end.
REAP_S = 0.2
THREAD_END_S = 5.0
STOPPED_S = 2.0
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
    check_qemu(qemu, request.cache / "qemu.json")
    user = undo.enter_context(
        qemu_user(settings.qemu_user, request.cache.parent / "users", kvm=accel.kind == "kvm")
    )
    transport = designer.transport_of(settings.transport)
    sockets = socket_paths(paths)
    with trace.span(phases.VIRTIOFSD, phases.POD_READY):
        undo.enter_context(shared_directories(paths))
        undo.enter_context(bounded_directory(paths.libvirt))
        files = virtiofsd.start(
            programs.virtiofsd(settings),
            paths.served,
            sockets.share,
            paths.libvirt / "log" / "virtiofsd.log",
            user.uid,
            request.cache / "virtiofsd.json",
            profile.memory_bytes,
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
    pid = await _created(host, domain.xml(), trace, files, user.uid, settings.timeouts.boot_s * factor)
    created_s = time.monotonic()
    process = Watched("QEMU", pid)
    undo.push_async_callback(_libvirt_done, host)
    undo.push_async_callback(process.end)
    cid = await asyncio.to_thread(host.vsock_cid, designer.NAME) if transport == "vsock" else None
    waiting = greet(request.pod_id, request.hostname, listener, cid, settings.timeouts.boot_s * factor)
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


async def _created(host: Host, xml: str, trace: Trace, files: Helper, uid: int, limit_s: float) -> int:
    """QEMU's pid, or at once why there is none: libvirt itself waits for ever for a QEMU that is mute."""
    making = in_thread(partial(_create, host, xml, trace))
    gone = asyncio.create_task(files.exited.wait())
    try:
        waits: list[asyncio.Future[Any]] = [making, gone]
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        if making.done() and making.exception() is None:
            return making.result()
        if making.done():
            # A QEMU that could not reach virtiofsd says so before virtiofsd's own end is known.
            await asyncio.wait([gone], timeout=REAP_S)
        if gone.done():
            raise files_failure(files)
        if making.done():
            return making.result()
        words = host.log_tail(designer.NAME)
        raise DeadlineExceeded(
            f"QEMU did not answer libvirt within {limit_s:.0f} s",
            details=words or None,
            hint="casemate check",
        )
    except BaseException:
        # The thread waits for what runs as this user, and must not make files that we have removed.
        system.kill_processes_of(uid)
        await asyncio.wait([making], timeout=THREAD_END_S)
        raise
    finally:
        gone.cancel()


def _create(host: Host, xml: str, trace: Trace) -> int:
    """In a thread: libvirt's calls block."""
    host.prepare()
    with trace.span(phases.LIBVIRT_IMPORT, phases.POD_READY):
        host.load()
    with trace.span(phases.LIBVIRT_OPEN, phases.POD_READY):
        host.open()
    with trace.span(phases.LIBVIRT_CREATE, phases.POD_READY):
        return host.create(xml, designer.NAME)


async def _libvirt_done(host: Host) -> None:
    if not await in_thread(partial(host.wait_stopped, STOPPED_S)):
        log.warning("libvirt did not say within %.0f s that the domain has stopped", STOPPED_S)


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
    taken: tuple[Client, api.HelloResponse] | None = None
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
            taken = answer.result()
        except Disconnected:
            raise await why_ended(qemu, files, console, qemu_words) from None
        return taken
    finally:
        for task in (answer, *ends):
            task.cancel()
        await asyncio.gather(answer, *ends, return_exceptions=True)
        if taken is None and not answer.cancelled() and answer.exception() is None:
            await answer.result()[0].close()  # it came together with the end


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


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    Answered = Coroutine[Any, Any, tuple[Client, api.HelloResponse]]
    QemuWords = Callable[[], str]
