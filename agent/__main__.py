"""PID 1 of the guest: boots the machine, connects to the shim, serves it until the end, powers off.

Only puts the parts together. `--listen=PATH --directory=DIR` serves on a unix socket instead, as an ordinary
process that owns no machine: the same agent, for trying it out.
"""

from time import monotonic_ns

FIRST_BYTE_NS = monotonic_ns()

import os  # noqa: E402 - the first thing this file does is look at the clock
import signal  # noqa: E402
import sys  # noqa: E402

if not __package__:  # run as a file, as the guest image does: make its neighbours importable
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import gc  # noqa: E402

gc.disable()  # nothing that is imported is garbage

from rpc import lean  # noqa: E402

lean.for_agent()  # before anything imports asyncio

import asyncio  # noqa: E402
import logging  # noqa: E402

from agent import boot, sysctls, system  # noqa: E402
from agent.cgroups import OomWatch  # noqa: E402
from agent.containers import Guest  # noqa: E402
from agent.crun import Crun  # noqa: E402
from agent.reaper import Reaper  # noqa: E402
from agent.services import AgentService  # noqa: E402
from agent.spans import MARKS_VARIABLE, Spans, early_spans  # noqa: E402
from agent.transport import Line  # noqa: E402
from rpc.errors import DeadlineExceeded  # noqa: E402
from rpc.server import Server  # noqa: E402

DIRECTORY = "/run/casemate"
MAX_REQUESTS = 4096  # a long poll for each stream of each process is one
_log = logging.getLogger("casemate.agent")


async def serve_shim(spans: Spans, settings: dict[str, str]) -> None:
    """Serves the one connection of this machine's life, and before it, where the machine is to be saved as a
    template, that of its maker. Powers off when it is over or SHUTDOWN came."""
    async with asyncio.TaskGroup() as tasks:
        guest = make_guest(tasks, DIRECTORY, sysctls.ROOT)
        line = Line(settings)
        while await serve_connection(guest, spans, line, tasks):
            line.say_waiting()
        guest.kill_all()
        try:
            await system.sync(system.LAST_SYNC_S)
        except DeadlineExceeded as error:
            _log.warning("powering off all the same: %s", error)
        system.power_off()


async def serve_connection(guest: Guest, spans: Spans, line: Line, tasks: asyncio.TaskGroup) -> bool:
    """Until it ends; whether another one is to come."""
    reader, writer = await line.connect()
    spans.done("agent connect")
    service = AgentService(guest, spans, line)
    server = Server(max_requests=MAX_REQUESTS)
    service.register(server)
    serving = tasks.create_task(server.serve(reader, writer))
    ending = tasks.create_task(service.ending.wait())
    await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
    if service.prepared:
        await serving  # until the maker has hung up, or it would be taken for the next one
    await server.close()  # gives the shim the answer to SHUTDOWN
    ending.cancel()
    await serving
    return service.prepared


async def serve_socket(spans: Spans, path: str, directory: str) -> None:
    """Serves whoever connects to a unix socket, until SHUTDOWN."""
    import socket

    async with asyncio.TaskGroup() as tasks:
        guest = make_guest(tasks, directory, None)
        service = AgentService(guest, spans, None)
        server = Server(max_requests=MAX_REQUESTS)
        service.register(server)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            await server.listen_unix(listener)
            await service.ending.wait()
            await server.close()
        sys.exit(0)


def make_guest(tasks: asyncio.TaskGroup, directory: str, sysctl_root: str | None) -> Guest:
    loop = asyncio.get_running_loop()
    reaper = Reaper()
    reaper.install(loop)
    crun = Crun(reaper, f"{directory}/crun")
    return Guest(
        crun, reaper, OomWatch(loop), tasks, f"{directory}/containers", boot.CGROUP_ROOT, sysctl_root
    )


def boot_machine(spans: Spans) -> dict[str, str]:
    """Everything before the event loop; returns the kernel command line's settings for us."""
    boot.mount_all()
    boot.enable_controllers()
    boot.raise_limits()
    boot.rest()
    boot.loopback_up()
    settings = boot.command_line()
    if settings.get("transport") == "vsock":
        boot.load_feature("vsock")
    spans.done("agent boot")
    return settings


def main() -> None:
    """Never returns where it is PID 1."""
    if os.getpid() != 1:
        run()
        return
    # Python would raise KeyboardInterrupt; left alone, the kernel drops what is sent to its init.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        run()
    except BaseException as error:  # noqa: BLE001 - nobody is left to catch it
        die(error)


def run() -> None:
    spans = Spans(FIRST_BYTE_NS)
    for name, start_ns, end_ns in early_spans(FIRST_BYTE_NS, os.environ.pop(MARKS_VARIABLE, None)):
        spans.add(name, start_ns, end_ns)
    gc.freeze()
    gc.enable()
    spans.done("agent imports")
    # The kernel hands words of its command line that it does not know to us: what is not ours is ignored.
    options = dict(word.split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
    if "--listen" in options:
        asyncio.run(serve_socket(spans, options["--listen"], options.get("--directory", DIRECTORY)))
    else:
        asyncio.run(serve_shim(spans, boot_machine(spans)))


def die(error: BaseException) -> None:
    """The end of PID 1 is a kernel panic: say why where the panic will be read, and be quick about it."""
    import termios
    import traceback

    text = "casemate agent: PID 1 failed\n" + "".join(traceback.format_exception(error))
    for path in ("/dev/console", "/dev/stderr"):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NOCTTY)
        except OSError:
            continue
        os.write(fd, text.encode(errors="replace"))
        if os.isatty(fd):
            termios.tcdrain(fd)  # a kernel that panics sends nothing any more that it still held
        break
    os._exit(1)


if __name__ == "__main__":
    main()
