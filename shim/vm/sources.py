"""Where a machine comes from: restored from a template where there is one, else booted.

Nothing else in the shim can tell one from another: it asks for a machine and gets one that answers.
"""

import asyncio
import logging
import os
import time
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from rpc.api import agent as api
from rpc.api.types import Empty
from rpc.client import Client
from rpc.errors import (
    CasemateError,
    DataLoss,
    DeadlineExceeded,
    Disconnected,
    NotFound,
    PermissionDenied,
    Unavailable,
    printable,
)
from shim import phases, shortage
from shim.helper import Helper, Watched, in_thread
from shim.trace import MOST_WORDS, Trace
from shim.vm import designer, ram
from shim.vm.blame import TemplateUnusable, is_excused
from shim.vm.console import Console
from shim.vm.crowding import crowding
from shim.vm.designer import Way
from shim.vm.domain import FileSystem
from shim.vm.filling import Filling
from shim.vm.guest import Facts, Machine, unanswered, why_ended
from shim.vm.hello import greet
from shim.vm.setting import (
    AgentLine,
    MachineRequest,
    Setting,
    make_setting,
    open_console,
    open_libvirt,
    run_qemu,
    serve_files,
)
from shim.vm.spare import Reserve, Spare
from shim.vm.template import Opened, TemplateStore
from shim.vm.template_key import template_key

# A restored guest answers in tens of milliseconds; one that does not is booted instead.
ANSWER_S = 5.0
LOAD_S = 5.0
log = logging.getLogger("casemate")


async def obtain(request: MachineRequest, trace: Trace, wanted: "Wanted") -> Machine:
    """A machine whose agent has answered and whose share is mounted.

    wanted: told of the key of a template that is not there and should be. Raises a CasemateError that says
    which part failed and in whose words; nothing is left then.

    A template that does not work costs a boot and a line in the log, never the pod. What would fail a boot as
    well (no virtiofsd, no QEMU) is raised, and not the template's fault.
    """
    async with AsyncExitStack() as undo:
        return await _obtain(make_setting(request, trace, undo), trace, undo, wanted)


async def _obtain(setting: Setting, trace: Trace, undo: AsyncExitStack, wanted: "Wanted") -> Machine:
    if setting.has_to_boot:
        return await _boot(setting, trace, undo)
    store, key = setting.templates, template_key(setting)
    version = store.version(key)
    blamed: CasemateError | None = None
    if version:
        try:
            return await _restore_from(key, setting, trace, undo)
        except (TemplateUnusable, NotFound, DataLoss) as error:
            if shortage.has_killed():
                raise  # no fault of the template's, and a boot takes more
            blamed = error
            _say_why(key, error)
        except (OSError, PermissionDenied) as error:
            _say_why(key, error)  # the host's trouble, which a boot may do without
    begun_s = time.monotonic()
    machine = await _boot(setting, trace, undo)
    if blamed is not None and is_excused(blamed, time.monotonic() - begun_s):
        log.warning("template %s is kept: the boot was no faster than what was waited for", key)
    elif blamed is not None:
        _discard(store, key, version, blamed)
        _wish(store, key, wanted)
    elif not version:
        _wish(store, key, wanted)
    return machine


async def make_spare(request: MachineRequest, trace: Trace) -> Spare:
    """A machine that is restored, has met its agent and waits, paused, for the pod that it is to be of.

    Raises NotFound where there is no template, TemplateUnusable, or why no machine can be made at all;
    nothing is left then.
    """
    async with AsyncExitStack() as undo:
        setting = make_setting(request, trace, undo)
        key = template_key(setting)
        version = setting.templates.version(key)
        if request.profile.template == "off" or not version:
            raise NotFound(f"there is no template {key}", hint="the first pod of its kind has one made")
        async with AsyncExitStack() as nothing:
            machine = await _restore_from(key, setting, trace, nothing)
        try:
            # What a first container costs more than the next is paid while nobody waits.
            await machine.call(api.REHEARSE, Empty())
            await in_thread(setting.host.suspend)
            return Spare(setting, key, version, machine, undo.pop_all())
        except BaseException:
            await machine.stop()
            raise


async def take_spare(spare: Spare, pod_id: str, hostname: str, trace: Trace, wanted: "Wanted") -> Machine:
    """The machine of the pool as this pod's, or, should it have ended meanwhile, another one, as obtain()."""
    try:
        return await spare.take(pod_id, hostname, trace)
    except CasemateError as error:
        log.warning("the pod's machine is not the one of the pool: %s", error)
    except BaseException:
        await spare.stop()
        raise
    async with spare.undo as undo:
        await spare.machine.stop()
        return await _obtain(spare.setting_of(pod_id, hostname), trace, undo, wanted)


async def take_reserved(
    reserve: Reserve, pod_id: str, hostname: str, trace: Trace, wanted: "Wanted"
) -> Machine:
    """As take_spare(), once its processes are where the pod's belong, too. Raises why they cannot be."""
    machine = await take_spare(reserve.spare, pod_id, hostname, trace, wanted)
    try:
        await reserve.placed
    except BaseException:
        await machine.stop()
        raise
    return machine


def _say_why(key: str, error: Exception) -> None:
    log.warning("the guest is booted, as it cannot be restored from template %s: %s", key, error)


def _discard(store: TemplateStore, key: str, version: str, error: CasemateError) -> None:
    """Only once the same host has booted a guest is it known that the template was to blame."""
    if isinstance(error, TemplateUnusable):
        store.note_useless(key)
    try:
        store.remove(key, version)
    except OSError as error:
        log.warning("template %s cannot be removed: %s", key, error)


def _wish(store: TemplateStore, key: str, wanted: "Wanted") -> None:
    if store.failed_lately(key):
        log.warning("no template %s is made: it failed lately. `casemate template build` tries again", key)
    else:
        wanted(key)


async def _restore_from(key: str, setting: Setting, trace: Trace, outer: AsyncExitStack) -> Machine:
    async with AsyncExitStack() as undo:
        with setting.templates.opened(key) as template:
            return await _restore(setting, trace, template, undo, outer)


async def _restore(
    setting: Setting, trace: Trace, template: Opened, undo: AsyncExitStack, outer: AsyncExitStack
) -> Machine:
    attempt = Attempt(setting, trace, undo)
    create = partial(_create_restored, setting, trace, template.state, attempt.files.device)
    if setting.maps_ram:
        undo.enter_context(ram.mapped(template.ram, setting.ram_file))
        await attempt.run(create)
    elif setting.page_bytes:
        from shim.vm.plugging import fill_pages

        undo.enter_context(ram.ram_directory(setting.ram, ram.SLACK_BYTES))
        size_bytes = setting.request.profile.memory_bytes
        await attempt.run(partial(create, lambda pid: fill_pages(template.ram, pid, size_bytes)))
    else:
        await _run_on_copy(setting, trace, template, create, attempt, undo)
    limit_s = _patience_s(ANSWER_S, setting)
    try:
        client, hello = await attempt.meet(phases.GUEST_RESUME, limit_s, waits_already=True)
    except CasemateError as error:
        if attempt.files_failed:
            raise
        raise TemplateUnusable.because("the restored guest does not answer", error, limit_s) from error
    try:
        await attempt.await_devices(client)
    except Unavailable as error:
        raise TemplateUnusable("the restored guest has not all of its devices", str(error)) from error
    return attempt.machine(Way.RESTORE, client, hello, outer)


def _patience_s(limit_s: float, setting: Setting) -> float:
    """On a crowded host everybody waits, and a boot instead would only add to it."""
    return min(limit_s * setting.factor * crowding(), setting.boot_s)


async def _run_on_copy(
    setting: Setting,
    trace: Trace,
    template: Opened,
    create: "Callable[[Callable[[int], None]], int]",
    attempt: "Attempt",
    undo: AsyncExitStack,
) -> None:
    """QEMU starts while its RAM is being written."""
    shortage.check_room(ram.data_bytes(template.ram))
    memory, memory_bytes = setting.ram_file, setting.request.profile.memory_bytes
    undo.enter_context(ram.ram_directory(setting.ram, memory_bytes + ram.SLACK_BYTES))
    target = ram.make_ram(memory, memory_bytes, setting.user.uid)
    try:
        filling = Filling(template.ram, target, trace)
        filling.start()
        try:
            await attempt.run(partial(create, lambda _: filling.wait()))
        finally:
            if filling.is_alive():
                await in_thread(filling.join)
    finally:
        os.close(target)
    _check_ram(setting, memory)
    memory.unlink()  # QEMU's end gives it back, and nobody has to wait for that


def _create_restored(
    setting: Setting,
    trace: Trace,
    state: int,
    device: FileSystem | None,
    fill: "Callable[[int], None] | None" = None,
) -> int:
    """In a thread: libvirt's calls block. device: what the template's machine could not have. fill: returns
    when the RAM of the QEMU of this pid is whole."""
    host = setting.host
    open_libvirt(host, trace)
    if setting.request.functions:
        from shim.vm import plugging

        plugging.make_reachable(setting)
    with trace.span(phases.LIBVIRT_CREATE, phases.POD_READY):
        pid = host.create(setting.design(Way.RESTORE).xml(), designer.NAME, paused=True)
    with trace.span(phases.STATE_LOAD, phases.POD_READY):
        try:
            if fill is not None:
                fill(pid)
        except OSError as error:
            raise TemplateUnusable("the template's RAM cannot be copied", str(error)) from error
        limit_s = _patience_s(LOAD_S, setting)
        try:
            host.load_state(state, limit_s)
        except CasemateError as error:
            raise TemplateUnusable.because(
                "QEMU does not take the template's state", error, limit_s
            ) from error
    try:
        if device is not None:
            with trace.span(phases.SHARE_PLUG, phases.POD_READY):
                host.attach(device.xml())
        if setting.request.functions:
            from shim.vm import plugging

            plugging.plug(setting, trace)
        host.resume()
    except CasemateError as error:
        raise TemplateUnusable("the restored guest cannot be completed", str(error)) from error
    return pid


def _check_ram(setting: Setting, memory: Path) -> None:
    """A file in the wrong place would be made anew, empty, and the guest would run on nothing."""
    files = [path for path in setting.ram.rglob("*") if path.is_file()]
    if files != [memory]:
        raise TemplateUnusable("libvirt keeps a guest's RAM elsewhere", f"{files}, expected {memory}")


async def _boot(setting: Setting, trace: Trace, outer: AsyncExitStack) -> Machine:
    async with AsyncExitStack() as undo:
        # RAM is no file, and yet libvirt gives QEMU's user directories there: not of the host's /run.
        undo.enter_context(ram.ram_directory(setting.ram, ram.SLACK_BYTES))
        attempt = Attempt(setting, trace, undo)
        await attempt.run(partial(_create_booting, setting, trace))
        client, hello = await attempt.meet(phases.GUEST_BOOT, setting.boot_s)
        await attempt.await_devices(client)
        return attempt.machine(Way.BOOT, client, hello, outer)


def _create_booting(setting: Setting, trace: Trace) -> int:
    """In a thread: libvirt's calls block."""
    open_libvirt(setting.host, trace)
    domain = setting.design(Way.BOOT)
    if setting.request.functions:
        from shim.vm import plugging

        plugging.make_reachable(setting)
    made_of = str(setting.request.backing or "")
    with trace.span(phases.LIBVIRT_CREATE, phases.POD_READY, made_of):
        return setting.host.create(domain.xml(), designer.NAME)


class Attempt:
    """One try at a machine, with what serves it: undone by its stack, unless it becomes a machine."""

    def __init__(self, setting: Setting, trace: Trace, undo: AsyncExitStack) -> None:
        self._setting = setting
        self._trace = trace
        self._undo = undo
        self.files = serve_files(setting, trace, undo)
        self._console = open_console(setting, undo)
        self._line = AgentLine(setting, self._console, undo)
        self._qemu: Watched | None = None
        self._running_s = 0.0

    @property
    def files_failed(self) -> bool:
        """What serves them has ended by itself: it ends with QEMU, too, and then well, perhaps before QEMU's
        own end is known."""
        process = self.files.process
        qemu_ended = self._qemu is not None and self._qemu.exited.is_set()
        return process.exited.is_set() and process.status != 0 and not qemu_ended

    async def run(self, start: "Callable[[], int]") -> None:
        self._qemu = await run_qemu(self._setting, start, self.files.process, self._undo)
        self._running_s = time.monotonic()

    async def meet(
        self, phase: str, limit_s: float, *, waits_already: bool = False
    ) -> tuple[Client, api.HelloResponse]:
        """The agent's connection and its answer, the share mounted; or at once why there is none."""
        assert self._qemu is not None
        setting, request = self._setting, self._setting.request
        connecting = self._line.connect(waits_already=waits_already)
        client, hello = await unless_ended(
            greet(request.pod_id, request.hostname, connecting, limit_s),
            self._qemu,
            self.files.process,
            self._console,
            setting.words,
            limit_s,
        )
        self._undo.push_async_callback(client.close)
        answered_s = time.monotonic()
        self._trace.add(phase, self._running_s, answered_s, parent=phases.POD_READY)
        spans = [(span.name, span.start_ns, span.end_ns) for span in hello.spans]
        self._trace.add_guest(spans, hello.monotonic_ns, answered_s, phase)
        with self._trace.span(phases.GUEST_SHARE, phases.POD_READY):
            await self.files.connect(self._line.connect_files)
            for share in self.files.mounts():
                await self._mount(client, share)
        return client, hello

    async def _mount(self, client: Client, share: api.MountShareRequest) -> None:
        await self._ask(client, api.MOUNT_SHARE, share)

    async def await_devices(self, client: Client) -> None:
        """The guest has made of each of the host's devices what it should. Raises Unavailable naming those of
        which it has not, and in the words of its kernel."""
        setting, functions = self._setting, self._setting.request.functions
        if not functions:
            return
        from shim.vm import passthrough, slots

        ready_s = setting.request.settings.vfio.ready_s * setting.factor * crowding()
        ports = slots.layout(functions, setting.request.backing, designer.LAST_BUS).addresses
        request = passthrough.request_of(functions, ports, ready_s, setting.request.backing)
        with self._trace.span(phases.DEVICES_READY, phases.POD_READY, str(setting.access)):
            # Found, the driver loaded, taken, and brought up one after the other.
            most_s = (4 + len(functions)) * ready_s
            passthrough.check(functions, await self._ask(client, api.DEVICES, request, most_s))

    async def _ask(self, client: Client, method: "Method[Q, R]", request: "Q", more_s: float = 0.0) -> "R":
        """The agent's answer, or at once why there will be none. more_s: what it may take by itself."""
        assert self._qemu is not None
        files = self.files.process
        timeouts = self._setting.request.settings.timeouts
        limit_s = timeouts.agent_call_s * self._setting.factor * crowding() + more_s
        asking = asyncio.ensure_future(client.call(method, request, timeout_s=limit_s))
        try:
            if await part_ended(asking, (self._qemu, files), None):
                raise Disconnected("a part of the machine ended")
            return asking.result()
        except Disconnected:
            raise await why_ended(self._qemu, files, self._console, self._setting.words) from None
        except DeadlineExceeded as error:
            raise unanswered(method.name, limit_s, self._console) from error
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def machine(self, way: Way, client: Client, hello: api.HelloResponse, outer: AsyncExitStack) -> Machine:
        """It owns all that both stacks would undo, from then on."""
        setting, request = self._setting, self._setting.request
        assert self._qemu is not None
        everything = outer.pop_all()
        everything.push_async_exit(self._undo.pop_all())
        facts = Facts(
            way.value,
            setting.accel,
            setting.transport,
            setting.image.digest,
            printable(hello.kernel_release, MOST_WORDS),
            hello.memory_used_bytes,
            setting.files.value,
            request.functions,
            setting.access,
            request.backing,
            request.pinning,
        )
        return Machine(
            facts,
            client,
            self._qemu,
            self.files.process,
            self._console,
            request.paths.shared,
            setting.words,
            request.settings.timeouts.agent_call_s * setting.factor,
            setting.host,
            everything,
        )


async def unless_ended(
    waiting: "Answered",
    qemu: Watched,
    files: Helper | None,
    console: Console,
    qemu_words: "QemuWords",
    timeout_s: float,
) -> tuple[Client, api.HelloResponse]:
    """The agent's answer, or at once why there will be none."""
    answer = asyncio.ensure_future(waiting)
    taken: tuple[Client, api.HelloResponse] | None = None
    parts = [part for part in (qemu, files) if part is not None]
    try:
        if await part_ended(answer, parts, timeout_s):
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
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        if taken is None and not answer.cancelled() and answer.exception() is None:
            await answer.result()[0].close()  # it came together with the end


async def part_ended(
    waiting: "asyncio.Future[Any]", parts: "Iterable[Watched]", timeout_s: float | None
) -> bool:
    """Waits until it is done, a part has ended, or the time is up. Whether a part has ended."""
    parts = tuple(parts)
    ends = [asyncio.create_task(part.exited.wait()) for part in parts]
    try:
        await asyncio.wait([waiting, *ends], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for end in ends:
            end.cancel()
    return any(part.exited.is_set() for part in parts)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from typing import Any, TypeVar

    from rpc.codec import Message
    from rpc.method import Method

    Q = TypeVar("Q", bound=Message)
    R = TypeVar("R", bound=Message)
    Answered = Coroutine[Any, Any, tuple[Client, api.HelloResponse]]
    QemuWords = Callable[[], str]
    Wanted = Callable[[str], None]
