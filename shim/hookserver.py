"""The process that runs a container's hooks on the host: forked by `start`, for a shim that asks for them.

The shim is in a PID namespace of its own, where a program of the host's would take its own pid, and that in
the state it reads, for other processes' (CNI's plug-ins open /proc/THEIR-PID/ns/net), and would end with the
pod, as would what it left behind. `start` is where containerd's own programs are, has its environment and
its limits, and is executed for every container, also of a pod that runs, or of one that a machine of the
pool becomes.

It has read the hooks itself, before there was a guest: the shim can say which are due, and of which pid, and
nothing else. It ends with the connection that it is asked over, or when the pod ends that never asked. It
must not know when hooks are due.
"""

import json
import os
import select
import socket

from shim.paths import hooks_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from shim.oci import Spec

MOST_FDS = 1 << 20
MOST_QUESTION_BYTES = 256
LISTENER, LIFELINE = 3, 4
# The kinds that are run on the host, and in which state of the container (runtime.md, "Lifecycle").
STATUS = {"prestart": "creating", "createRuntime": "creating", "poststart": "running", "poststop": "stopped"}
HOST_HOOKS = frozenset(STATUS)


def offer(
    namespace: str, container_id: str, bundle: str, spec: "dict[str, Any]", pod_socket: str, log: int
) -> None:
    """Before `start` is answered, if the container has hooks of the host's. Imports nothing: `start` waits.

    pod_socket: of the pod's shim, whose end is the end. log: a descriptor for what goes wrong. Raises
    OSError where there can be no process or socket. Hooks that are none the shim will refuse.
    """
    from shim.bootstrap import listen

    hooks = spec.get("hooks")
    if not isinstance(hooks, dict) or not any(hooks.get(kind) for kind in HOST_HOOKS):
        return
    path = hooks_socket(namespace, container_id)
    if os.path.lexists(path):
        os.unlink(path)  # an earlier one's, which nobody asked
    with listen(path) as listener, socket.socket(socket.AF_UNIX) as lifeline:
        try:
            inode = os.stat(path).st_ino
            lifeline.connect(pod_socket)
            child = os.fork()
        except BaseException:
            os.unlink(path)
            raise
        if child == 0:
            _be_server(spec, container_id, bundle, (path, inode), (listener.fileno(), lifeline.fileno()), log)


def _be_server(
    document: "dict[str, Any]",
    container_id: str,
    bundle: str,
    place: tuple[str, int],
    fds: tuple[int, int],
    log: int,
) -> "NoReturn":
    """Holds nothing of `start`'s but these: whoever waits for `start`'s output must not wait for us."""
    status = 1
    try:
        os.setsid()
        os.dup2(log, 2)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        _keep(fds)
        os.chdir("/")
        with socket.socket(fileno=LISTENER) as waiting, socket.socket(fileno=LIFELINE) as pod:
            try:
                spec = _parsed(document)  # while the pod is being made
                asked = _asked(waiting, pod) if spec is not None else None
            finally:
                _withdraw(*place)
        if spec is not None and asked is not None:
            with asked:
                _serve(asked, spec, container_id, bundle)
        status = 0
    except BaseException:  # noqa: BLE001 - the pod's log is the only place left to say it
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _keep(fds: tuple[int, int]) -> None:
    """These become LISTENER and LIFELINE; all others but the standard ones are closed."""
    import fcntl

    above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LIFELINE + 1) for fd in fds]
    for fd, target in zip(above, (LISTENER, LIFELINE), strict=True):
        os.dup2(fd, target, inheritable=False)
    os.closerange(LIFELINE + 1, MOST_FDS)


def _parsed(document: "dict[str, Any]") -> "Spec | None":
    """None where they are no hooks: the shim reads the same document, and says why."""
    from rpc.errors import InvalidArgument
    from shim import oci, system

    system.set_process_name("casemate-hooks")
    try:
        return oci.parse(document)
    except InvalidArgument:
        return None


def _asked(waiting: socket.socket, pod: socket.socket) -> socket.socket | None:
    """The one connection that there will be; None if the pod has ended without."""
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    poll.register(pod, select.POLLRDHUP)
    ready = {fd for fd, _ in poll.poll()}
    return waiting.accept()[0] if waiting.fileno() in ready else None


def _withdraw(path: str, inode: int) -> None:
    try:
        if os.stat(path).st_ino == inode:  # not that of a `start` which came later
            os.unlink(path)
    except FileNotFoundError:
        return


def _serve(asked: socket.socket, spec: "Spec", container_id: str, bundle: str) -> None:
    """Until the shim has no more questions, or is gone. poststop hooks that were begun go on then."""
    from shim.hookrun import run_all, state_of

    with asked.makefile("rb") as questions:
        while question := questions.readline(MOST_QUESTION_BYTES):
            words = json.loads(question)
            kind = words["kind"]
            state = state_of(spec, container_id, bundle, STATUS[kind], int(words["pid"]))
            last = kind == "poststop"
            hangup = -1 if last else asked.fileno()
            outcomes = run_all(spec.hooks.get(kind, ()), state, go_on=last, hangup=hangup)
            told = [[outcome.path, outcome.failure, outcome.words] for outcome in outcomes]
            try:
                asked.sendall(json.dumps(told).encode() + b"\n")
            except BrokenPipeError:
                return  # the shim has ended meanwhile
