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

import fcntl
import json
import os
import select
import socket
from typing import NoReturn

from shim import system
from shim.bootstrap import listen
from shim.hookrun import run_all, state_of
from shim.oci import Document, Spec, parse
from shim.paths import hooks_socket
from shim.spec import HOST_HOOKS

MOST_FDS = 1 << 20
MOST_QUESTION_BYTES = 256
LISTENER, LIFELINE = 3, 4
# runtime.md, "Lifecycle": in which state of the container they are run.
STATUS = {"prestart": "creating", "createRuntime": "creating", "poststart": "running", "poststop": "stopped"}


def offer(namespace: str, container_id: str, bundle: str, spec: Document, pod_socket: str, log: int) -> None:
    """Before `start` is answered, if the container has hooks of the host's.

    pod_socket: of the pod's shim, whose end is the end. log: a descriptor for what goes wrong. Raises
    InvalidArgument for hooks that are none, OSError where there can be no process or socket.
    """
    wanted = parse(spec)
    if wanted.hooks.keys().isdisjoint(HOST_HOOKS):
        return
    path = hooks_socket(namespace, container_id)
    system.unlink_if_there(path)
    with listen(path) as listener, socket.socket(socket.AF_UNIX) as lifeline:
        try:
            lifeline.connect(pod_socket)
            child = os.fork()
        except BaseException:
            system.unlink_if_there(path)
            raise
        if child == 0:
            _be_server(wanted, container_id, bundle, path, (listener.fileno(), lifeline.fileno()), log)


def _be_server(
    spec: Spec, container_id: str, bundle: str, path: str, fds: tuple[int, int], log: int
) -> NoReturn:
    """Holds nothing of `start`'s but these: whoever waits for `start`'s output must not wait for us."""
    status = 1
    try:
        os.setsid()
        system.set_process_name("casemate-hooks")
        os.dup2(log, 2)
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(null, 1)
        above = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LIFELINE + 1) for fd in fds]
        for fd, target in zip(above, (LISTENER, LIFELINE), strict=True):
            os.dup2(fd, target, inheritable=False)
        os.closerange(LIFELINE + 1, MOST_FDS)
        os.chdir("/")
        with socket.socket(fileno=LISTENER) as waiting, socket.socket(fileno=LIFELINE) as pod:
            asked = _asked(waiting, pod, path)
        if asked is not None:
            with asked:
                _serve(asked, spec, container_id, bundle)
        status = 0
    except BaseException:  # noqa: BLE001 - the pod's log is the only place left to say it
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _asked(waiting: socket.socket, pod: socket.socket, path: str) -> socket.socket | None:
    """The one connection that there will be; None if the pod has ended without."""
    own = os.stat(path).st_ino
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    poll.register(pod, select.POLLRDHUP)
    ready = {fd for fd, _ in poll.poll()}
    try:
        if os.stat(path).st_ino == own:  # not that of a `start` which came later
            os.unlink(path)
    except FileNotFoundError:
        pass
    return waiting.accept()[0] if waiting.fileno() in ready else None


def _serve(asked: socket.socket, spec: Spec, container_id: str, bundle: str) -> None:
    """Until the shim has no more questions, or is gone. poststop hooks that were begun go on then."""
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
