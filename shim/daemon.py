"""From a forked `start` to a running event loop: detached, in namespaces of its own.

The daemon is the first process of a PID namespace, so that its death, however it dies, is the death of
QEMU, virtiofsd and all else of the pod, and in a mount namespace, so that no mount of a pod is ever seen
on the host. It must not know what a pod is.
"""

import os
import resource
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from rpc import lean
from rpc.errors import CasemateError
from shim import phases, seclusion, system
from shim.apprentice import stand_by
from shim.bundle import is_containers
from shim.cgroup import Place
from shim.journal import Journal
from shim.namespaces import HostNamespaces
from shim.network import enter_network, open_pod_network
from shim.paths import run_dir
from shim.trace import Trace

# Of containerd's environment: for containerd itself, or changing what programs load.
MOST_OOM_SCORE = 1000  # OOM_SCORE_ADJ_MAX of linux/oom.h
NOT_FOR_CHILDREN = ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LD_LIBRARY_PATH", "LD_PRELOAD")

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Iterable
    from typing import Any, NoReturn

    from config.settings import Settings
    from shim.bootstrap import Start
    from shim.paths import PodPaths


def run(
    request: "Start",
    settings: "Settings",
    listener: "socket.socket",
    started_ticks: int,
    bound_s: float,
    forked_by: str = "start",
) -> "NoReturn":
    """Never returns. started_ticks: when `start` was executed, as /proc counts. forked_by: for the trace.

    An error before the event loop runs ends the process, its text in the pod's log.
    """
    system.keep_little_memory()
    try:
        trace = trace_of_start(request, started_ticks, bound_s)
        detach()
        os.environ["CASEMATE_POD"] = pod_name(request)
        standby = stand_by(settings, request.namespace, request.spec, listener.fileno())
        host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        host = HostNamespaces.current()
        network_fd, refusal = open_network(request)  # its path may be one of the host's /proc
        with trace.span(phases.OWN_NAMESPACES, phases.DETACH):
            system.unshare(system.CLONE_NEWNS | system.CLONE_NEWPID)
            if os.fork():
                os._exit(0)
            enter_namespaces(request.paths)
        journal = Journal(request.paths.journal)
        journal.add_process(system.host_pid(host_proc), host_proc)
        with trace.span(phases.POD_NETWORK, phases.DETACH):
            enter_network(network_fd)
        place = Place(request.paths.key)
        # Where the kernel takes its time, beside the imports.
        with trace.span(phases.POD_CGROUP, phases.DETACH), ThreadPoolExecutor(1) as beside:
            moving = beside.submit(place.enter, own_spec(request), journal, (os.getpid(),))
            lean.for_shim()
            from shim.anchor import Anchors
            from shim.main import Daemon, serve
        try:
            moving.result()
        except CasemateError as error:
            refusal = refusal or error
        trace.add(phases.DETACH, bound_s, time.monotonic(), detail=forked_by)
        serve(
            Daemon(
                request=request,
                paths=request.paths,
                settings=settings,
                listener=listener,
                trace=trace,
                journal=journal,
                host_proc=host_proc,
                host=host,
                anchors=Anchors(host_proc, run_dir() / "users", request.paths.homes[0]),
                place=place,
                standby=standby,
                refusal=refusal,
            )
        )
    except BaseException:  # noqa: BLE001
        # Not swallowed: this process is the daemon, and its log is the only place left to say it.
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def own_spec(request: "Start") -> "dict[str, Any] | None":
    """The config.json of the container that the pod begins with; None where it begins with none, and is
    described later (sandboxlife.py)."""
    return request.spec if is_containers(request.spec) else None


def trace_of_start(request: "Start", started_ticks: int, bound_s: float) -> Trace:
    """With what has passed before there was a daemon. Arguments as run()'s."""
    trace = Trace(request.namespace, request.pod_id, request.created_at)
    exec_s = exec_time_s(started_ticks, request.first_line_s)
    trace.add(phases.INTERPRETER, exec_s, request.first_line_s, parent=phases.START)
    trace.add(phases.BIND, request.first_line_s, bound_s, parent=phases.START)
    trace.add(phases.START, exec_s, bound_s)
    return trace


def pod_name(request: "Start") -> str:
    """What the environment of a pod's processes says of whose they are (CASEMATE_POD)."""
    return f"{request.namespace}/{request.pod_id}"


def exec_time_s(started_ticks: int, latest_s: float) -> float:
    """When the kernel started a process, on CLOCK_MONOTONIC, to 10 ms (proc(5): starttime in ticks).

    The tick counts from boot and includes suspended time, CLOCK_MONOTONIC does not.
    """
    ticks = started_ticks / os.sysconf("SC_CLK_TCK")
    return min(ticks - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic(), latest_s)


def detach() -> None:
    """A session of its own, and nothing of the caller's that would tie it to it."""
    os.setsid()
    os.chdir("/")
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    raise_oom_score()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump would hold what a guest put into memory
    for name in NOT_FOR_CHILDREN:
        os.environ.pop(name, None)


def raise_oom_score() -> None:
    """One more than the parent's, as every shim does: the kernel takes a pod before its containerd."""
    with open("/proc/self/oom_score_adj") as file:
        score = int(file.read())
    set_oom_score(min(score + 1, MOST_OOM_SCORE), ("self",))


def set_oom_score(score: int, pids: "Iterable[int | str]") -> None:
    """Where the kernel does not let us, it stays, with a line in the log."""
    for pid in pids:
        try:
            with open(f"/proc/{pid}/oom_score_adj", "w") as file:
                file.write(str(score))
        except PermissionError as error:
            sys.stderr.write(f"oom_score_adj of process {pid} stays as it is: {error}\n")


def open_network(request: "Start") -> tuple[int | None, CasemateError | None]:
    """As open_pod_network(), and why the pod cannot have the network that it asks for; the client is told
    when it asks for a container."""
    if own_spec(request) is None:
        return None, None
    try:
        return open_pod_network(request.spec), None
    except CasemateError as error:
        return None, error


def enter_namespaces(paths: "PodPaths") -> None:
    """As first process of the PID namespace."""
    seclusion.enter(paths)
    system.set_process_name("casemate-shim")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
