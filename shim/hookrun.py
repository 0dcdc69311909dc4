"""Running hooks of a container's on the host: what they are told, their environment, their time limit.

Each is run by a process of its own, to which the kernel gives all that descends from the hook, whatever
session that is in: so a hook that is given up goes with its children, and what a hook that went well left
behind (a DHCP client, a port's holder) stays, as it would after runc. It must not know when hooks are due.

Its caller has one thread, and is in the namespaces that the hooks are to be in.
"""

import json
import os
import select
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from rpc.errors import printable
from shim import procfs, system
from shim.oci import Document, Hook, Spec

MOST_WORDS_BYTES = 4096
READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Outcome:
    """failure: what went wrong, empty if nothing did. words: the end of what it wrote, stdout and stderr."""

    path: str
    failure: str
    words: str


def state_of(spec: Spec, container_id: str, bundle: str, status: str, pid: int) -> Document:
    """What a hook reads from its stdin: runtime.md, "State". pid: as the host counts it; 0 for none."""
    state = {
        "ociVersion": spec.document.get("ociVersion", ""),
        "id": container_id,
        "status": status,
        "pid": pid,
        "bundle": bundle,
        "annotations": dict(spec.annotations),
    }
    if not pid:
        del state["pid"]
    return state


def run_all(hooks: Sequence[Hook], state: Document, *, go_on: bool, hangup: int = -1) -> list[Outcome]:
    """One after another; those after a failure only with go_on.

    hangup: a socket whose other end's closing ends the hook that runs, with its children.
    """
    told = json.dumps(state).encode()
    outcomes: list[Outcome] = []
    for hook in hooks:
        failure, words = _run(hook, told, str(state["bundle"]), hangup)
        outcomes.append(Outcome(hook.path, failure, words))
        if failure and not go_on:
            break
    return outcomes


def _run(hook: Hook, told: bytes, directory: str, hangup: int) -> tuple[str, str]:
    reading, writing = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        _keep(hook, told, directory, hangup, writing)
    os.close(writing)
    with open(reading, "rb") as report:
        text = report.read()
    os.waitpid(keeper, 0)
    if not text:
        return "the process that watched it has ended", ""
    failure, words = json.loads(text)
    return failure, words


def _keep(hook: Hook, told: bytes, directory: str, hangup: int, writing: int) -> NoReturn:
    """The process that has one hook run."""
    try:
        system.set_process_name("casemate-hook")
        system.adopt_orphans()
        said = _watch(hook, told, directory, hangup)
    except BaseException as error:  # noqa: BLE001 - whoever waits is told
        said = f"{type(error).__name__}: {error}", ""
    finally:
        with open(writing, "wb") as report:
            report.write(json.dumps(said).encode())
        os._exit(0)


def _watch(hook: Hook, told: bytes, directory: str, hangup: int) -> tuple[str, str]:
    """Until the hook has ended. Returns Outcome's failure and words."""
    ends_s = time.monotonic() + hook.timeout_s if hook.timeout_s else None
    output, into = os.pipe()
    os.set_blocking(output, False)
    try:
        os.chdir(directory)  # as runc's are; of a pod that was killed the bundle may be gone
    except FileNotFoundError:
        os.chdir("/")
    try:
        pid = _spawn(hook, told, into)
    except OSError as error:
        return f"cannot be executed: {error.strerror}", ""
    os.close(into)
    words = bytearray()
    poll = select.poll()
    ended = os.pidfd_open(pid)
    poll.register(ended, select.POLLIN)
    poll.register(output, select.POLLIN)
    if hangup >= 0:
        poll.register(hangup, select.POLLRDHUP)
    failure = ""
    while not failure:
        left_ms = None if ends_s is None else max(ends_s - time.monotonic(), 0) * 1000
        ready = {fd for fd, _ in poll.poll(left_ms)}
        if output in ready and not _read(output, words):
            poll.unregister(output)
        if ended in ready:
            _read(output, words)  # what it wrote last; a child of its may write for ever
            failure = _how(os.waitpid(pid, 0)[1])
            break
        if hangup in ready:
            failure = "given up: the pod's shim has ended"
        elif not ready:
            failure = f"killed: it did not end within {hook.timeout_s} s, its timeout"
    if failure:
        _kill_descendants()
    return failure, printable(words.decode("utf-8", "replace").strip(), keeping="\n")


def _spawn(hook: Hook, told: bytes, output: int) -> int:
    """Its stdin is a file that holds all it is told: it need not read it."""
    stdin = os.memfd_create("state")
    with open(stdin, "wb", closefd=False) as file:
        file.write(told)
    os.lseek(stdin, 0, os.SEEK_SET)
    actions = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((stdin, output, output))]
    try:
        return os.posix_spawn(
            hook.path,
            list(hook.args),
            dict(hook.env),
            file_actions=actions,
            setsigdef=sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}),
            setsigmask=[],
        )
    finally:
        os.close(stdin)


def _read(output: int, words: bytearray) -> bool:
    """What there is now, of which the end is kept. False at the end of file."""
    try:
        data = os.read(output, READ_BYTES)
    except BlockingIOError:
        return True
    words += data
    del words[:-MOST_WORDS_BYTES]
    return bool(data)


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"killed by signal {-code}" if code < 0 else f"exit status {code}" if code else ""


def _kill_descendants() -> None:
    """All of them: those that are forked meanwhile become our children when their parents have ended."""
    while pids := _descendants():
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants() -> list[int]:
    """Of this process, zombies included."""
    children: dict[int, list[int]] = {}
    for pid, (_, parent, *_) in procfs.processes():
        children.setdefault(int(parent), []).append(pid)
    found = list(children.get(os.getpid(), ()))
    for pid in found:  # which grows
        found += children.get(pid, ())
    return found
