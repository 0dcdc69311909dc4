"""Processes of a pod that are killed at each step of its life: the client is told, all goes, the next starts.

A shim halts at each step (halting.py) until this test has killed whom it wants to, and says so: what is dead
when the shim goes on does not depend on who is faster. In CI each step is met once, its victims taking turns;
CASEMATE_TEST_STEPS=all kills everybody at each (a quarter of an hour without KVM), =task.delete at each of
that name.
"""

import contextlib
import os
import shutil
import signal
import socket
import struct
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest

from bench import supervisor
from bench.ctr import CtrFailed, Result
from bench.instance import CHECKOUT, SYSTEM_PYTHON_PACKAGES, Instance
from bench.netns import Namespace, connect, namespace
from shim import phases
from shim.anchor import NAME as ANCHOR
from shim.interfaces import TAP_PREFIX
from tests.vm import census, faults
from tests.vm.operator import casemate
from tests.vm.pods import Pods

ASKED = os.environ.get("CASEMATE_TEST_STEPS", "")
UP_S = 240.0
"""Of a machine that cannot be restored and is booted, on a host that is busy with others."""
TOLD_S = 120.0
"""From the kill to the end of `ctr run`."""

ELSEWHERE = {
    phases.DEVICES_ASK: "tests/unit/shim/test_giving_kills.py, tests/testbed/test_kill_cycles.py",
    phases.DEVICES_CLAIM: "the same",
    phases.DEVICES_PLUG: "the same",
    phases.DEVICES_READY: "the same",
    phases.DEVICES_RELEASE: "the same",
    phases.POOL_RESUME: "tests/vm/test_pool.py",
    phases.POOL_GREET: "tests/vm/test_pool.py",
    phases.GUEST_BOOT: "tests/vm/test_killed.py; what surrounds it is here, with GUEST_RESUME in its place",
    phases.DISK_PLUG: "tests/vm/test_disks.py",
    phases.HOOKS: "tests/vm/test_hooks.py",
}
"""Phases that this pod's life does not have, and what is killed in them."""

LAUNCHER = """\
#!{python} -IS
import sys
sys.path[1:1] = {path!r}
from tests.vm.halting import halt_at_steps
halt_at_steps({address!r})
from shim.bootstrap import main
main()
"""
OF_A_MACHINE = {"qemu-system": "QEMU", "virtiofsd": "virtiofsd"}
"""And the word for them."""
CONFIG = """
template_dir = "{templates}"
[profiles.default]
files = "virtiofs"
"""
"""virtiofs: the way with the most phases, whatever this QEMU may have by default."""
STATUS = 6
KILLED = 128 + signal.SIGKILL
"""An anchor stands for its container: who kills it has killed that."""
PROGRAM = f"echo up; read go && exit {STATUS}; exec sleep 1000"


@dataclass(frozen=True, slots=True)
class Kill:
    """victim: "shim" stands for the process that is at this step, which may be `start`."""

    step: str
    victim: str


class Steps:
    """A runtime whose shims halt at each step, and who is killed there."""

    def __init__(self, instance: Instance) -> None:
        self.address = str(instance.work / "steps")
        program = instance.base / "bin" / "containerd-shim-halting-v2"
        path = [str(CHECKOUT), sysconfig.get_path("purelib"), SYSTEM_PYTHON_PACKAGES]
        program.write_text(
            LAUNCHER.format(python=os.path.realpath(sys.executable), path=path, address=self.address)
        )
        program.chmod(0o755)
        self.runtime = "io.containerd.halting.v2"
        self.passed: dict[str, tuple[str, ...]] = {}
        """In their order, and who could be killed there."""
        self.wanted: Kill | None = None
        self.done = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        os.unlink(self.address)

    def next(self, wanted: Kill | None) -> None:
        self.passed, self.wanted = {}, wanted
        self.done.clear()

    def check(self) -> None:
        """Raises what went wrong beside."""
        if self._error is not None:
            raise self._error

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # shut down
                return
            with connection:
                try:
                    self._meet(connection)
                except BaseException as error:  # noqa: BLE001
                    self._error = error  # check() raises it

    def _meet(self, connection: socket.socket) -> None:
        step = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        victims = victims_of(pid)
        self.passed.setdefault(step, tuple(victims))
        wanted = self.wanted
        if wanted is not None and wanted.step == step and not self.done.is_set():
            if wanted.victim in victims:
                self.done.set()  # first: whoever was killed may be missed at once
                faults.kill_and_wait(victims[wanted.victim])
            if wanted.victim == "shim":
                return
        with contextlib.suppress(BrokenPipeError):  # somebody was killed by another one's end
            connection.sendall(b".")


def victims_of(shim: int) -> dict[str, int]:
    found = {"shim": shim}
    for pid in sorted(supervisor.descendants(shim)):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            for name in OF_A_MACHINE:
                if faults.is_of_a_pod(pid, name):
                    found.setdefault(name, pid)
            if words.rstrip(b"\0") == ANCHOR.encode() and faults.runs(pid):
                found.setdefault("anchor", pid)
    return found


@dataclass(frozen=True, slots=True)
class Life:
    """What a client saw of a pod."""

    name: str
    up: bool
    run: Result
    told: str
    """All that casemate said, and to whom."""


def live(pods: Pods, steps: Steps, outside: Namespace, wanted: Kill | None) -> Life:
    """A container that is run with an exec in it, in a network with an interface, and ends by itself; or does
    not, as somebody was killed. A machine that cannot be restored is booted: so that pod may go on."""
    steps.next(wanted)
    name = pods.ctr.new_id("k")
    with namespace() as net:
        connect(net, "eth0", outside, name, ("10.77.0.2/24", "10.77.0.1/24"))
        with pods.start("sh", "-c", PROGRAM, options=net.options, name=name) as running:
            try:
                running.read_until(b"up\n", UP_S)
                up = True
            except CtrFailed:
                up = False
            booted_again = up and steps.done.is_set() and wanted is not None and wanted.victim in OF_A_MACHINE
            words = pods.exec(name, "true").err if up else ""
            if booted_again or (up and not steps.done.is_set()):
                running.write(b"go\n")
            result = running.finish(TOLD_S)
        wait_no_tap(net)
    steps.check()
    kept = pods.ended_directory(name)
    for path in (kept / "shim.log", kept / "state.json"):
        words += path.read_text() if path.exists() else ""
    return Life(name, up, result, result.err + words)


def wait_no_tap(net: Namespace) -> None:
    """It ends with its QEMU, which may take longer than its client: hence a bounded poll."""
    deadline = time.monotonic() + TOLD_S
    while TAP_PREFIX in (links := net.ip("-brief", "link")):
        assert time.monotonic() < deadline, links
        time.sleep(0.05)


def check(kill: Kill, life: Life, started: bool) -> list[str]:
    """One end that somebody can understand; a success is none. What speaks against it.

    started: whether Start was answered, if not well. From then on ctr is told an exit status only: the words
    are in what is kept of the pod.
    """
    code, said = life.run.code, life.run.err.strip()
    wrong = []
    if "Traceback" in life.told:
        wrong.append("a traceback")
    if code == 0 or (code == STATUS and not life.up):
        wrong.append("a success")
    if not (said or started or (kill.victim, code) == ("anchor", KILLED)):
        wrong.append("nothing said")
    words = OF_A_MACHINE.get(kill.victim)
    if words and code != STATUS and words not in (life.told if started else said):
        wrong.append(f"no word of {words}")
    return [f"{kill}: {', '.join(wrong)}: {life.run}\n{life.told}"] if wrong else []


def left_of(pods: Pods, early: bool, name: str, before: census.Census) -> list[str]:
    """Once whoever is told of such an end has done what is theirs.

    early: before the shim answers. containerd follows a `start` that failed, or a shim that it cannot connect
    to, with no `delete`: that is up to the operator's command, later.
    """
    directory = pods.paths(name).directory
    if early and directory.exists():
        os.utime(directory, (0, 0))
        cleaned = casemate(pods.ctr.instance, "gc")
        assert cleaned.returncode == 0, cleaned
    return census.left_after(pods.ctr, before)


def chosen(passed: dict[str, tuple[str, ...]]) -> list[Kill]:
    """Everybody at each step that was asked for; or each phase, entry and step of the end once, with victims
    in turns."""
    if ASKED:
        steps = [step for step in passed if ASKED == "all" or ASKED in step]
        return [Kill(step, victim) for step in steps for victim in passed[step]]
    kills: dict[str, Kill] = {}
    for turn, (step, victims) in enumerate(passed.items()):
        about = step.removeprefix("end ").removeprefix("begin ")
        kills.setdefault(about, Kill(step, victims[turn % len(victims)]))
    return list(kills.values())


@pytest.fixture
def outside() -> Iterator[Namespace]:
    with namespace() as found:
        yield found


@pytest.fixture
def templates(image_store: Path) -> Iterator[Path]:
    """Those of the other tests, but what is removed here is only removed here."""
    with tempfile.TemporaryDirectory(prefix="killed-", dir=image_store.parent) as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def relink(source: Path, templates: Path) -> None:
    """A template from which no machine could be restored, and a boot made one, is removed."""
    for each in source.iterdir():
        if not (templates / each.name).exists():
            shutil.copytree(each, templates / each.name, copy_function=os.link)


@pytest.mark.timeout(2 * 3600 if ASKED else 1200)
def test_whoever_is_killed_at_any_step(
    pods: Pods, outside: Namespace, image_store: Path, templates: Path
) -> None:
    kept = image_store.parent / "test-templates"
    pods.ctr.instance.configure(CONFIG.format(templates=templates))
    relink(kept, templates)
    before = census.take(pods.ctr)
    with Steps(pods.ctr.instance) as steps:
        halting = Pods(pods.ctr, steps.runtime, pods.image)
        life = live(halting, steps, outside, None)
        assert life.run.code == STATUS, life
        passed = steps.passed
        seen = {word.partition(" ")[2].removesuffix("/exec") for word in passed}
        declared = {value for name, value in vars(phases).items() if name.isupper()}
        assert seen & declared == declared - ELSEWHERE.keys()
        order = list(passed)
        wrong: list[str] = []
        for kill in chosen(passed):
            relink(kept, templates)
            life = live(halting, steps, outside, kill)
            assert steps.done.is_set(), f"{kill} was not met: {list(steps.passed)}"
            started = life.up or order.index(kill.step) >= order.index(f"end {phases.START_TASK}")
            wrong += check(kill, life, started)
            early = order.index(kill.step) < order.index(f"end {phases.SERVE}")
            left = left_of(halting, early, life.name, before)
            assert not left, (kill, left, life)
    assert not wrong, "\n\n".join(wrong)
