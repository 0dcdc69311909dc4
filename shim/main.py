"""The daemon's event loop: serve the task API, make the pod's machine, and end without leaving anything.

Wires the parts together; each of them knows less than this.
"""

import asyncio
import logging
import os
import signal
import socket
import time
from dataclasses import dataclass
from functools import partial

from config.load import unreported
from rpc.errors import CasemateError
from rpc.server import Server
from shim import cgroup, creation, phases, system
from shim.anchor import Anchors
from shim.apprentice import Standby
from shim.bootstrap import Start
from shim.cgroup import Place
from shim.cleanup import retire
from shim.daemon import own_spec
from shim.devices import Devices
from shim.disks import Disks
from shim.helper import in_thread, reap_orphans
from shim.journal import Journal
from shim.logs import set_up_logging
from shim.namespaces import HostNamespaces
from shim.network import enter_network
from shim.paths import PodPaths
from shim.pod import Pod
from shim.record import Identity
from shim.seclusion import step_out
from shim.services.events import Listener, Publisher
from shim.services.task import TaskService
from shim.trace import Trace
from shim.vm.spare import Reserve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from config.settings import Settings
    from shim.oci import Document

PUBLISH_END_S = 3.0
SANDBOX_SERVICE = "containerd.runtime.sandbox.v1.Sandbox"
log = logging.getLogger("casemate")


@dataclass(frozen=True, slots=True)
class Daemon:
    """What the process is and has when its event loop begins. refusal: why there can be no machine.

    paths: where the process itself sees the pod's directory; everybody else does at request.paths. host_proc
    is a directory fd of the host's /proc, host the namespaces that containerd is in.
    """

    request: Start
    paths: PodPaths
    settings: "Settings"
    listener: socket.socket
    trace: Trace
    journal: Journal
    host_proc: int
    host: HostNamespaces
    anchors: Anchors
    place: Place
    standby: Standby
    refusal: CasemateError | None


def serve(daemon: Daemon) -> None:
    """Runs until containerd says Shutdown, a signal does, or the pod was empty for too long."""
    asyncio.run(serve_in_loop(daemon))


async def serve_in_loop(daemon: Daemon, reserve: Reserve | None = None) -> None:
    """As serve(), in an event loop that runs. reserve: a machine that the process has already.

    Ends the process, unless it raises why it cannot end as it should.
    """
    begun_s = time.monotonic()
    request = daemon.request
    set_up_logging(daemon.settings.log_level if not request.debug else "debug", request.bundle)
    for line in unreported:
        log.warning("%s", line)
    for line in request.remarks:
        log.info("%s", line)
    document = own_spec(request)
    if daemon.refusal is None and document is not None:
        _warn_without_cgroup(document)
    settings, trace = daemon.settings, daemon.trace
    loop = asyncio.get_running_loop()
    shutdown = asyncio.Event()
    loop.add_signal_handler(signal.SIGCHLD, reap_orphans)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, shutdown.set)
    pid = system.host_pid(daemon.host_proc)
    started = system.start_time(pid, daemon.host_proc)
    identity = Identity(request.namespace, request.pod_id, pid, started, daemon.host_proc, daemon.host)
    publisher = Publisher(request.namespace, request.ttrpc_address, request.address, request.publish_binary)
    listener = Listener(publisher)
    paths, disks = daemon.paths, Disks(daemon.paths.directory)
    devices = Devices(identity, settings, daemon.journal, trace)
    means = creation.Means(identity, daemon.anchors, paths, daemon.journal, trace, disks, devices)
    pod = Pod(means, settings, daemon.standby, listener)
    server = Server()
    TaskService(pod, shutdown.set).register(server)
    server.add_late(SANDBOX_SERVICE, partial(_serve_sandbox, daemon, pod, shutdown.set))
    publishing = asyncio.create_task(publisher.run(), name="publisher")
    sparing = asyncio.create_task(_spare_memory(pod), name="memory")
    leaving = asyncio.create_task(_step_out(pod, daemon.place, reserve), name="cgroups")
    ending = _end_if_abandoned(pod, settings.timeouts.empty_s, shutdown)
    watching = asyncio.create_task(ending, name="abandoned")
    if daemon.refusal is not None:
        pod.refuse(daemon.refusal)
    elif document is not None:
        pod.begin(document, begun_s, reserve)
    else:
        pod.write_state("starting")
    listening = await server.listen_unix(daemon.listener)
    trace.add(phases.SERVE, begun_s, time.monotonic())
    try:
        await shutdown.wait()
    finally:
        watching.cancel()
        sparing.cancel()
        await pod.stop()
        publisher.finish()
        try:
            async with asyncio.timeout(PUBLISH_END_S):
                await publishing
        except TimeoutError:
            log.error("events were left that containerd did not take")
        # While the journal is there: should one of these fail, `delete` or `casemate gc` does the rest.
        await leaving
        daemon.place.leave()
        listening.close()
        await server.close()
        system.unlink_if_there(request.socket_path)
        pod.write_state("ended")
        daemon.journal.close()
        step_out(daemon.paths)
        retire(request.paths, settings.traces_kept)  # from here on `delete` has nothing to do
    # What is left is this process's and its namespaces': the kernel takes it away faster than we could.
    os._exit(0)


def _warn_without_cgroup(document: object) -> None:
    if not cgroup.named(document):
        log.warning("the container names no cgroup: the pod's processes stay in containerd's")


def _serve_sandbox(daemon: Daemon, pod: Pod, on_shutdown: "Callable[[], None]", server: Server) -> None:
    """Most pods are never asked for it, and have none of it in their memory."""
    from shim.sandboxlife import SandboxLife
    from shim.services.sandbox import SandboxService
    from shim.usage import metrics_of

    life = SandboxLife(pod, daemon.request.spec, partial(_bring_up, daemon, pod))
    SandboxService(life, pod, lambda: metrics_of(daemon.place.directories), on_shutdown).register(server)


async def _bring_up(daemon: Daemon, pod: Pod, document: "Document", network: int | None) -> None:
    """What run() of daemon.py did before there was a loop, for a pod that is described only now.

    Raises as Place.enter(). Of this process there is one thread that counts, and no child yet.
    """
    begun_s = time.monotonic()
    _warn_without_cgroup(document)
    if network is not None:
        enter_network(network)
    with daemon.trace.span(phases.POD_CGROUP, phases.POD_READY):
        await in_thread(partial(daemon.place.enter, document, daemon.journal, (os.getpid(),)))
    pod.begin(document, begun_s)


async def _spare_memory(pod: Pod) -> None:
    """libvirt's and Python's parsers leave megabytes behind, which a pod then has for all its life."""
    await pod.begun.wait()
    try:
        await pod.machine()
    except CasemateError:
        return  # the client is told; the pod ends
    system.return_memory()


async def _step_out(pod: Pod, place: Place, reserve: Reserve | None) -> None:
    """Beside the machine's end: the kernel takes its time to move a process."""
    await pod.ending.wait()
    if reserve is not None:
        await asyncio.wait([reserve.placed])
    await in_thread(place.step_out)


async def _end_if_abandoned(pod: Pod, empty_s: float, shutdown: asyncio.Event) -> None:
    """containerd may be killed, and its state lost, between `start` and Create: nobody ends the pod then."""
    await pod.occupancy.abandoned(empty_s)
    log.warning("the pod ends: it has had no container for %.0f s (timeouts.empty_s)", empty_s)
    shutdown.set()
