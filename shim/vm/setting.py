"""What surrounds a machine, wherever it comes from: its image, its user, its directories, libvirt, a console.

Everything here is undone by the exit stack it was made with. It must not know how the machine comes to run.
"""

import asyncio
import logging
import os
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

from config import places, programs
from config.settings import Profile, Settings
from images.image import GuestImage
from images.store import ImageStore
from rpc.api import agent as api
from rpc.errors import DeadlineExceeded, FailedPrecondition
from shim import phases, system
from shim.helper import Helper, Watched, in_thread
from shim.paths import PodPaths
from shim.trace import Trace
from shim.vm import accel as acceleration
from shim.vm import cpu_models, designer, files, reach
from shim.vm.accel import Acceleration
from shim.vm.console import Console, listen
from shim.vm.crowding import crowding
from shim.vm.designer import Files, Places, Way
from shim.vm.domain import Domain
from shim.vm.files import FileServer
from shim.vm.guest import files_failure
from shim.vm.hello import accept, dial
from shim.vm.host import Host
from shim.vm.share import bounded_directory, shared_directories
from shim.vm.template import TemplateStore
from shim.vm.users import QemuUser, qemu_user
from shim.vm.versions import check_qemu

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from shim.vm.backing import Backing
    from shim.vm.passthrough import Access, Function
    from shim.vm.pinning import Pinning

# From a child's last system call to the shim's knowledge of its end.
REAP_S = 0.2
THREAD_END_S = 5.0
STOPPED_S = 2.0
log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class MachineRequest:
    """What a pod wants of its machine, and where its files may be.

    tenant: whose templates may serve it. own_files, shares_directories: as the functions of spec.py have it.
    functions: of the host's devices that it is to have; backing: what its RAM is of then. pinning: if it has
    CPUs of its own.
    """

    pod_id: str
    hostname: str
    profile: Profile
    settings: Settings
    paths: PodPaths
    cache: Path
    tenant: str = ""
    own_files: bool = False
    shares_directories: bool = False
    functions: "tuple[Function, ...]" = ()
    backing: "Backing | None" = None
    pinning: "Pinning | None" = None

    @classmethod
    def of_nobody(
        cls,
        profile: Profile,
        settings: Settings,
        paths: PodPaths,
        tenant: str = "",
        functions: "tuple[Function, ...]" = (),
        backing: "Backing | None" = None,
    ) -> Self:
        """For a machine that is no pod's: a template's, or one that is measured."""
        cache = Path(places.cache_dir())
        about = ("", "casemate", profile, settings, paths, cache, tenant)
        return cls(*about, functions=functions, backing=backing)


@dataclass(frozen=True, slots=True)
class Setting:
    """What does not change when one way to a machine fails and another is tried."""

    request: MachineRequest
    accel: Acceleration
    image: GuestImage
    qemu: str
    firmware: str
    transport: str
    files: Files
    user: QemuUser
    host: Host
    ram: Path
    qemu_version: "tuple[int, int] | None" = None

    @property
    def factor(self) -> float:
        """What time limits are multiplied by."""
        return self.request.settings.timeouts.tcg_factor if self.accel.kind == "tcg" else 1.0

    @property
    def boot_s(self) -> float:
        """How long a boot may take that begins now. On a crowded host each machine has little of a CPU."""
        request, more_s = self.request, 0.0
        if request.functions:
            from shim.vm.passthrough import more_s_of

            more_s = more_s_of(request.functions, request.profile.memory_bytes)
        return (request.settings.timeouts.boot_s + more_s) * self.factor * crowding()

    @property
    def access(self) -> "Access | None":
        """How its devices are reached, once libvirt is loaded; None without any."""
        if not self.request.functions:
            return None
        from shim.vm.passthrough import access_of

        return access_of(self.request.functions, self.qemu_version, self.host.version)

    @property
    def places(self) -> Places:
        directory = self.request.paths.directory
        console, agent, share = (directory / f"{name}.sock" for name in ("console", "agent", "share"))
        return Places(console, agent, share, self.ram / "ram")

    @property
    def has_to_boot(self) -> bool:
        """Whether no template would do."""
        request = self.request
        if not request.functions or request.profile.template == "off":
            return request.profile.template == "off"
        from shim.vm.plugging import has_to_boot

        return has_to_boot(request)

    @property
    def maps_ram(self) -> bool:
        """Whether a restored machine maps its template's RAM, or has a copy."""
        return self.files is Files.NINEP and not self.request.functions

    @property
    def page_bytes(self) -> int:
        """Of the huge pages that its RAM is of, if it is."""
        return self.request.backing.page_bytes if self.request.backing is not None else 0

    @property
    def ram_file(self) -> Path:
        """Where the RAM of the next machine is, if that is a file."""
        if self.maps_ram:
            return self.places.ram
        backing = self.request.backing
        return self.host.memory_file(designer.NAME, in_a_cell=backing is not None and bool(backing.cells))

    def words(self) -> str:
        """QEMU's own, of late."""
        return self.host.log_tail(designer.NAME)

    @property
    def templates(self) -> TemplateStore:
        return TemplateStore(Path(self.request.settings.template_dir), self.request.cache / "templates")

    def design(self, way: Way, places: Places | None = None) -> Domain:
        return designer.design(
            self.request.profile,
            self.image,
            self.accel,
            self.transport,
            self.files,
            places or self.places,
            self.qemu,
            self.firmware,
            way,
            self.request.functions,
            self.access,
            self.request.backing,
            self.request.pinning,
        )


def make_setting(request: MachineRequest, trace: Trace, undo: AsyncExitStack) -> Setting:
    """Raises a CasemateError that says what the host lacks."""
    settings, profile, paths = request.settings, request.profile, request.paths
    accel = acceleration.choose(settings.accel, request.cache / "accel.json")
    trace.accel = accel.kind
    if accel.kind != "kvm":
        hide_kvm(paths)
        log.warning(f"TCG, not KVM: {accel.reason}; the guest is emulated, which is slow")
    with trace.span(phases.IMAGE, phases.POD_READY):
        store = ImageStore(Path(settings.image_dir))
        image = undo.enter_context(store.lease(store.resolve(image_name(request, store))))
        store.verify(image)
    qemu = programs.qemu(settings)
    if not os.access(qemu, os.X_OK):
        raise FailedPrecondition(f"QEMU: {qemu} cannot be executed")
    version = check_qemu(qemu, request.cache / "qemu.json")
    user = undo.enter_context(
        qemu_user(settings.qemu_user, request.cache.parent / "users", kvm=accel.kind == "kvm")
    )
    undo.enter_context(bounded_directory(paths.libvirt))
    ram = paths.directory / "ram"
    named = designer.cpu_model(profile, accel) not in cpu_models.NAMELESS
    if not named:
        cpu_models.hide(paths.directory)
    seeds = request.cache / f"libvirt-{accel.kind}{'' if named else '-lean'}"
    firmware = programs.firmware(settings, several_roots=_has_several_roots(request))
    readable = (str(image.kernel.parent), firmware)
    reached = reach.of(str(paths.directory), qemu, readable, settings.qemu_paths)
    host = Host(paths.libvirt, ram, user, seeds, cpu_models=named, reach=reached)
    transport = designer.transport_of(settings.transport)
    wanted = "virtiofs" if profile.files == "auto" and request.shares_directories else profile.files
    way = designer.files_of(wanted, transport, image, version)
    return Setting(request, accel, image, qemu, firmware, transport, way, user, host, ram, version)


def _has_several_roots(request: MachineRequest) -> bool:
    if request.backing is None:
        return False
    from shim.vm.slots import has_expanders

    return has_expanders(request.functions, request.backing)


def image_name(request: MachineRequest, store: ImageStore) -> str:
    """The profile's, or that of its variant with the drivers of what the machine is given."""
    if not request.functions:
        return request.profile.image
    from shim.vm import passthrough

    return passthrough.image_name(request.functions, request.profile.image, store.names())


def hide_kvm(paths: PodPaths) -> None:
    """A QEMU that emulates needs no /dev/kvm. libvirt asks QEMU anew for its capabilities at every step
    when the device is there and KVM is not usable (20 times 300 ms, seen with 9.0)."""
    if os.path.exists("/dev/kvm"):
        nothing = paths.directory / "nothing"
        nothing.touch(mode=0)
        nothing.chmod(0)
        system.mount(str(nothing), "/dev/kvm", None, system.MS_BIND)


def serve_files(setting: Setting, trace: Trace, undo: AsyncExitStack) -> FileServer:
    """Starts serving the directory that the pod's files are mounted in."""
    with trace.span(phases.FILES, phases.POD_READY):
        undo.enter_context(shared_directories(setting.request.paths))
        undo.callback(system.unlink_if_there, setting.places.share)
        server = files.start(setting)
        undo.push_async_callback(server.process.end)
        undo.callback(server.close)
    return server


def open_console(setting: Setting, undo: AsyncExitStack) -> Console:
    request = setting.request
    console = Console(
        setting.places.console, request.paths.console, request.settings.console_bytes, setting.user.uid
    )
    undo.callback(console.close)
    reading = asyncio.create_task(console.read(), name="console")
    undo.callback(reading.cancel)
    return console


class AgentLine:
    """How the agent of one machine will be reached."""

    def __init__(self, setting: Setting, console: Console, undo: AsyncExitStack) -> None:
        self._setting = setting
        self._console = console
        self._listener: socket.socket | None = None
        self._cid = 0
        if setting.transport == "serial":
            self._listener = listen(setting.places.agent, setting.user.uid)
            undo.callback(system.unlink_if_there, setting.places.agent)
            undo.callback(self._listener.close)

    async def connect(self, *, waits_already: bool = False) -> "socket.socket":
        """waits_already: the guest is a saved one, whose agent waits since before it was saved."""
        if self._listener is not None:
            return await accept(self._listener)
        self._cid = await asyncio.to_thread(self._setting.host.vsock_cid, designer.NAME)
        waits = None if waits_already else self._console.agent_waits
        return await dial(self._cid, waits, self._setting.boot_s)

    async def connect_files(self) -> "socket.socket":
        """Once connect() has. One more, for files. Raises Unavailable."""
        return await dial(self._cid, None, self._setting.boot_s, api.FILES_PORT)


async def run_qemu(
    setting: Setting, start: "Callable[[], int]", files: Helper | None, undo: AsyncExitStack
) -> Watched:
    """QEMU once `start`, which runs in a thread, has returned its pid.

    Or at once why there is none: libvirt itself waits for ever for a QEMU that is mute.
    """
    making = in_thread(start)
    gone = asyncio.create_task(files.exited.wait() if files is not None else asyncio.Event().wait())
    limit_s = setting.boot_s
    try:
        waits: list[asyncio.Future[Any]] = [making, gone]
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        hung_up = files is not None and files.status == 0
        if hung_up:
            # It ends like that when QEMU has gone: libvirt is about to hear of it.
            await asyncio.wait([making], timeout=STOPPED_S)
        if making.done() and making.exception() is None:
            process = Watched("QEMU", making.result())
            undo.push_async_callback(_libvirt_done, setting.host)
            undo.push_async_callback(process.end)
            return process
        if making.done():
            # A QEMU that could not reach virtiofsd says so before virtiofsd's own end is known.
            await asyncio.wait([gone], timeout=REAP_S)
        if files is not None and gone.done() and not (hung_up and making.done()):
            raise files_failure(files)
        if making.done():
            making.result()  # raises
        raise DeadlineExceeded(
            f"QEMU did not answer libvirt within {limit_s:.0f} s",
            details=setting.words() or None,
            hint="casemate check",
        )
    except BaseException:
        # The thread waits for what runs as this user, and must not make files that we have removed.
        system.kill_processes_of(setting.user.uid)
        await asyncio.wait([making], timeout=THREAD_END_S)
        if making.done():
            system.kill_processes_of(setting.user.uid)  # what it has started since
            await _libvirt_done(setting.host)  # or it would refuse another domain of the name
        raise
    finally:
        gone.cancel()


async def _libvirt_done(host: Host) -> None:
    if not await in_thread(partial(host.wait_stopped, STOPPED_S)):
        log.warning("libvirt did not say within %.0f s that the domain has stopped", STOPPED_S)


def open_libvirt(host: Host, trace: Trace) -> None:
    """In a thread: libvirt's calls block. Once per host.

    Not while anything else of the machine is made: the driver makes directories where its RAM is to be, and
    gives up if it is disturbed.
    """
    if host.is_open:
        return
    host.prepare()
    with trace.span(phases.LIBVIRT_IMPORT, phases.POD_READY):
        host.load()
    with trace.span(phases.LIBVIRT_OPEN, phases.POD_READY):
        host.open()
