"""containerd-shim-casemate-v2: what containerd executes. `start`, `delete` and `-info`.

`start` binds the socket, forks the daemon and prints the address with almost nothing imported: a
connection waits in the backlog while the daemon imports. The contract (working directory is the bundle,
stdout carries the answer and nothing else) is containerd's core/runtime/v2/README.md.
"""

import os
import sys
import time

FIRST_LINE_S = time.monotonic()

# The clock is read before anything is imported.
from shim.bundle import read_config  # noqa: E402
from shim.paths import JOURNAL, LOG, PodPaths, sha256_hex  # noqa: E402

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from config.settings import Settings

SOCKET_DIR = "/run/containerd/s"
# In this order: the first is set by containerd alone, the second may come from a pod's annotations.
GROUP_ANNOTATIONS = ("io.kubernetes.cri.sandbox-id", "io.containerd.runc.v2.group")
CONTAINER_TYPE = "io.kubernetes.cri.container-type"
MOST_STDIN_BYTES = 4 << 20


class Arguments:
    """What stands on the command line: containerd's flags with one dash, then the action."""

    def __init__(self, argv: list[str]) -> None:
        self.namespace = ""
        self.address = ""
        self.publish_binary = ""
        self.id = ""
        self.bundle = ""
        self.debug = False
        self.info = False
        self.action = ""
        words = iter(argv)
        for word in words:
            if not word.startswith("-"):
                self.action = word
                continue
            name, equals, value = word.lstrip("-").partition("=")
            if name in ("debug", "info", "v"):
                # As Go's flag package: alone it is true, and it may be said to be false.
                said = not equals or value.lower() in ("1", "t", "true")
                setattr(self, "info" if name in ("info", "v") else name, said)
            elif name in ("namespace", "address", "publish-binary", "id", "bundle"):
                setattr(self, name.replace("-", "_"), value if equals else next(words, ""))
            else:
                raise SystemExit(f"containerd-shim-casemate-v2: unknown flag {word}")


class Start:
    """Everything that the daemon is told by `start`."""

    def __init__(self, arguments: Arguments, bundle: str, pod_id: str, spec: "dict[str, Any] | None") -> None:
        self.namespace = arguments.namespace
        self.address = arguments.address
        self.ttrpc_address = os.environ.get("TTRPC_ADDRESS") or arguments.address + ".ttrpc"
        self.publish_binary = arguments.publish_binary
        self.debug = arguments.debug
        self.bundle = bundle
        self.pod_id = pod_id
        self.spec = spec
        self.paths = PodPaths(arguments.namespace, pod_id)
        self.socket_path = socket_path(arguments.address, arguments.namespace, pod_id)
        self.created_at = time.time()
        self.first_line_s = FIRST_LINE_S
        self.remarks: list[str] = []

    def words(self) -> "dict[str, Any]":
        """For another process that is to serve this request (shim/forkserver.py), as plain values."""
        return {name: value for name, value in vars(self).items() if name != "paths"}

    @classmethod
    def from_words(cls, words: "dict[str, Any]") -> "Start":
        """What words() gave, in a process with the same environment."""
        start = cls.__new__(cls)
        vars(start).update(words)
        start.paths = PodPaths(start.namespace, start.pod_id)
        return start


def main() -> "NoReturn":
    os.umask(0o022)  # containerd's may be anything; what is secret says so itself
    try:
        arguments = Arguments(sys.argv[1:])
        if arguments.info:
            from shim.contract import print_info

            print_info()
        elif arguments.action == "start" and arguments.id:
            start(arguments)
        elif arguments.action == "delete" and arguments.id:
            delete(arguments)
        else:
            raise SystemExit(
                "usage: containerd-shim-casemate-v2 -namespace NS -address A -id ID start|delete"
            )
    except Exception as error:
        from rpc.errors import CasemateError

        # containerd shows the client what a failed `start` printed: one line for what we understand,
        # the whole traceback for what we do not.
        if not isinstance(error, (CasemateError, OSError)):
            raise
        sys.stderr.write(f"casemate: {error}\n")
        raise SystemExit(1) from error
    sys.stdout.flush()
    raise SystemExit(0)


def delete(arguments: Arguments) -> None:
    """Answers at once where nothing is left, which containerd asks for at the end of every container."""
    from shim import absence

    if absence.is_gone(PodPaths(arguments.namespace, arguments.id)):
        sys.stdout.buffer.write(absence.answer())
    else:
        from shim.contract import delete

        delete(arguments)


def start(arguments: Arguments) -> None:
    """Prints the address of the pod's shim: a running one's, or that of a daemon forked here."""
    bundle = os.getcwd()
    spec = read_config(bundle)
    pod_id = pod_of(spec, arguments.id, arguments.namespace)
    params = sys.stdin.buffer.read(MOST_STDIN_BYTES)
    from config.load import load

    settings = load()
    request = Start(arguments, bundle, pod_id, spec)
    if is_served(request.socket_path):
        leave_hooks(request, arguments.id)
        answer(request, arguments, settings, params)
        return
    refuse_without_pod(spec, arguments.id, pod_id)
    from shim import forkserver
    from shim.procfs import start_time

    started_ticks = start_time("self")
    if settings.node.fork_server:
        offer = forkserver.ask(started_ticks, hand_over_words(request, settings))
    else:
        offer = forkserver.Offer(None)
    try:
        listener, log = prepare(request), -1
    except BaseException:
        offer.close()
        raise
    try:
        bound_s = time.monotonic()
        log = open_log(request.paths)
        leave_hooks(request, arguments.id)
        answer(request, arguments, settings, params)
        # Last: a `start` that fails is never followed by a `delete`, so that nobody would end the daemon.
        daemon = not offer.take({"bound_s": bound_s}, (listener.fileno(), log)) and os.fork() == 0
    except BaseException:
        from shim.cleanup import clean_pod

        offer.close()
        listener.close()
        if log >= 0:
            os.close(log)
        clean_pod(request.paths)
        raise
    if daemon:
        for fd in (1, 2):
            os.dup2(log, fd)  # first of all: containerd takes what it reads there for the pod's address
        os.close(log)
        if offer.remark:
            request.remarks.append(f"casemated's fork server was not used: {offer.remark}")
        from shim.daemon import run

        run(request, settings, listener, started_ticks, bound_s)
    listener.close()
    os.close(log)


def leave_hooks(request: Start, container_id: str) -> None:
    """A process that will run the container's hooks on the host, if it has any (shim/hookserver.py)."""
    if request.spec is None or not request.spec.get("hooks"):
        return
    from shim import hookserver

    log = open_log(request.paths)
    try:
        hookserver.offer(
            request.namespace, container_id, request.bundle, request.spec, request.socket_path, log
        )
    finally:
        os.close(log)


def hand_over_words(request: Start, settings: "Settings") -> "dict[str, Any]":
    """What run() is told, for another process to call it."""
    from config.load import unreported
    from config.settings import to_mapping

    return {
        "request": request.words(),
        "settings": to_mapping(settings),
        "unreported": unreported,
    }


def answer(request: Start, arguments: Arguments, settings: "Settings", params: bytes) -> None:
    """Tells containerd the address. It connects when this process has exited."""
    address = "unix://" + request.socket_path
    words = address_answer(arguments, settings, address, params)
    write_address_file(request.bundle, address)
    sys.stdout.buffer.write(words)
    sys.stdout.flush()


def pod_of(spec: "dict[str, Any] | None", container_id: str, namespace: str) -> str:
    """The id of the pod that a container belongs to: its sandbox's, that whose network it is to be in, or its
    own. Raises FailedPrecondition for a network that it cannot be in."""
    if group := group_of(spec):
        return group
    if path := network_of_a_process(spec):
        from shim import joining

        return joining.pod_of_network(namespace, path) or container_id
    return container_id


def group_of(spec: "dict[str, Any] | None") -> str:
    """What its client says that it belongs to, or ""."""
    annotations = (spec or {}).get("annotations")
    if not isinstance(annotations, dict):
        return ""
    for name in GROUP_ANNOTATIONS:
        group = annotations.get(name)
        if isinstance(group, str) and group:
            return group
    return ""


def network_of_a_process(spec: "dict[str, Any] | None") -> str:
    """The path of the network namespace that it is to be in, if that is named by a process's pid, else ""."""
    linux = (spec or {}).get("linux")
    namespaces = linux.get("namespaces") if isinstance(linux, dict) else None
    for entry in namespaces if isinstance(namespaces, list) else ():
        if isinstance(entry, dict) and entry.get("type") == "network":
            path = entry.get("path")
            return path if isinstance(path, str) and path.startswith("/proc/") else ""
    return ""


def refuse_without_pod(spec: "dict[str, Any] | None", container_id: str, pod_id: str) -> None:
    """Raises FailedPrecondition for a container of a pod that is gone: it gets no VM for itself."""
    annotations = (spec or {}).get("annotations")
    of_sandbox = isinstance(annotations, dict) and annotations.get(CONTAINER_TYPE) == "container"
    if of_sandbox or (pod_id != container_id and not group_of(spec)):
        from rpc.errors import FailedPrecondition

        raise FailedPrecondition(f"container {container_id}: pod {pod_id} has no virtual machine any more")


def socket_path(address: str, namespace: str, pod_id: str) -> str:
    """The path that `ctr shim --id` computes too (pkg/shim/util_unix.go, SocketAddress)."""
    return os.path.join(SOCKET_DIR, sha256_hex(os.path.join(address, namespace, pod_id)))


def is_served(path: str) -> bool:
    """Whether a shim accepts connections there; a socket that nobody serves is removed."""
    import socket

    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except FileNotFoundError:
            return False
        except ConnectionRefusedError:
            os.unlink(path)
            return False
    return True


def prepare(request: Start) -> "Any":
    """Pod directory, journal and listening socket. Removes again what it made if it fails half way."""
    from shim.journal import Entry, Journal, Kind

    paths = request.paths
    if os.path.exists(paths.in_words()):
        from shim.cleanup import clean_pod

        clean_pod(paths)  # of a shim that was killed and that nobody has deleted yet
    # Others may pass through to what they own in there (QEMU's sockets), and list nothing.
    try:
        pods = os.path.dirname(paths.in_words())
        for directory in (os.path.dirname(pods), pods, paths.in_words()):
            os.makedirs(directory, mode=0o711, exist_ok=True)
        journal = Journal(paths.in_words(JOURNAL))
        journal.add(Entry(Kind.SOCKET, request.socket_path))
        journal.close()
        os.makedirs(SOCKET_DIR, mode=0o711, exist_ok=True)
        listener = listen(request.socket_path)
    except BaseException as error:
        from shim.cleanup import clean_pod
        from shim.system import is_no_space

        clean_pod(paths)
        if isinstance(error, OSError) and is_no_space(error):
            from rpc.errors import ResourceExhausted

            raise ResourceExhausted(f"{paths.directory}: {error.strerror}", hint="casemate gc") from error
        raise
    return listener


def open_log(paths: PodPaths) -> int:
    """What becomes the daemon's stdout and stderr: opened while its caller can be told that it cannot be."""
    return os.open(paths.in_words(LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def listen(path: str) -> "Any":
    """A socket that nobody but root may connect to, not for the blink of an eye.

    What is bound has the mode that the socket had (unix_bind_bsd). A umask would be the whole process's, its
    threads', and that of a shim which is made like this process at the same time (node/likeness.py).
    """
    import socket

    listener = socket.socket(socket.AF_UNIX)
    try:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


def address_answer(arguments: Arguments, settings: "Settings", address: str, params: bytes) -> bytes:
    """In the newest form that the asking containerd certainly understands."""
    if params:
        from shim.contract import bootstrap_result

        result = bootstrap_result(arguments, address, params)
        if result is not None and settings.address_format == "auto":
            return result
    if settings.address_format == "json":
        most = os.environ.get("MAX_SHIM_VERSION", "")
        version = min(int(most), 3) if most.isdecimal() else 2 if most else 3
        return f'{{"version":{version},"address":"{address}","protocol":"ttrpc"}}'.encode()
    return address.encode()


def write_address_file(bundle: str, address: str) -> None:
    """containerd before 2.0 reads it to find the shim again after its own restart."""
    partial = os.path.join(bundle, ".address")
    with open(partial, "w") as file:
        file.write(address)
    os.rename(partial, os.path.join(bundle, "address"))


if __name__ == "__main__":
    main()
