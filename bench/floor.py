"""`casemate bench floor`: what libvirt costs a restored start, beside the same QEMU started by hand.

A machine of the default profile is restored in turns: through libvirt, as a pod's shim does, and with the
command line that libvirt wrote into its log (by_hand.py). No containerd, no container: from before QEMU is
started to the agent's answer. It must not know how a pod is made.
"""

import asyncio
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, NoReturn

from bench import stats
from bench.by_hand import ANSWER_S, ByHand, CommandLine
from bench.turns import Sample, Value, take_turns
from config.settings import Profile, Settings
from rpc.errors import Unavailable
from shim import apprentice, seclusion, system
from shim.helper import Watched, in_thread, reap_orphans
from shim.paths import PodPaths
from shim.trace import Trace
from shim.vm import designer, ram
from shim.vm.designer import Files, Way
from shim.vm.hello import dial, greet
from shim.vm.setting import AgentLine, MachineRequest, Setting, make_setting, open_console, open_libvirt
from shim.vm.template import Opened
from shim.vm.template_key import template_key

LIBVIRT, BY_HAND = "libvirt", "by hand"
OPENED, STARTED, LOADED, RESUMED, ANSWERED, ALL, ENDED = (
    "opened",
    "started",
    "loaded",
    "resumed",
    "answered",
    "all",
    "ended",
)
STEPS = {
    OPENED: "libvirt imported and opened",
    STARTED: "QEMU started, its monitor answers",
    LOADED: "the state is loaded",
    RESUMED: "the guest runs",
    ANSWERED: "its agent has answered",
    ALL: "from QEMU's start to the answer",
    ENDED: "QEMU killed, until all is over",
}


@dataclass(frozen=True, slots=True)
class Row:
    """Medians in seconds; ratio is libvirt's to that by hand, with its confidence interval. None: no such."""

    step: str
    by_hand_s: float | None
    libvirt_s: float
    ratio: stats.Ratio | None


def measure(settings: Settings, rounds: int) -> list[Row]:
    """Raises CasemateError. Makes the template of the default profile if there is none."""
    profile = settings.profiles[settings.default_profile]
    if profile.template == "off":
        raise Unavailable(f"pods of profile {profile.name} are never restored")
    status, paths = apprentice.make(settings, profile, "")
    if status:
        raise Unavailable("no template to restore from", (paths.ended / "shim.log").read_text())
    place = PodPaths("casemate.bench", f"floor-{os.getpid()}")
    once = partial(_in_own_process, settings, profile, place)
    line = CommandLine(*once(LIBVIRT, None)["line"])

    def turn(way: str) -> list[Value]:
        steps = once(way, line if way == BY_HAND else None)["steps"]
        return [Value(step, seconds) for step, seconds in steps.items()]

    samples = take_turns({way: partial(turn, way) for way in (BY_HAND, LIBVIRT)}, rounds)
    return [_row(samples, step) for step in STEPS]


def _row(samples: list[Sample], step: str) -> Row:
    found = {
        way: [sample.value for sample in samples if (sample.way, sample.measure) == (way, step)]
        for way in (BY_HAND, LIBVIRT)
    }
    by_hand = stats.summary(found[BY_HAND]).median if found[BY_HAND] else None
    ratio = stats.ratio(samples, step, LIBVIRT, BY_HAND) if found[BY_HAND] else None
    return Row(step, by_hand, stats.summary(found[LIBVIRT]).median, ratio)


async def _restore(setting: Setting, trace: Trace, line: CommandLine | None) -> "dict[str, Any]":
    """Seconds of each step; by libvirt if there is no line, which is among what comes back then."""
    steps: dict[str, float] = {}
    async with AsyncExitStack() as undo:
        console = open_console(setting, undo)
        agent = AgentLine(setting, console, undo)
        template = undo.enter_context(setting.templates.opened(template_key(setting)))
        _give_ram(setting, template, undo)
        host = setting.host
        hand: ByHand | None = None
        if line is None:
            begun_s = time.monotonic()
            await in_thread(partial(open_libvirt, host, trace))
            steps[OPENED] = time.monotonic() - begun_s
        else:
            hand = ByHand(line, setting.user, setting.request.paths.libvirt)
            undo.callback(hand.close)
            hand.prepare()
        xml = setting.design(Way.RESTORE).xml()
        marks = [time.monotonic()]

        def run() -> int:
            pid = hand.start() if hand else host.create(xml, designer.NAME, paused=True)
            marks.append(time.monotonic())
            hand.load_state(template.state) if hand else host.load_state(template.state, ANSWER_S)
            marks.append(time.monotonic())
            hand.resume() if hand else host.resume()
            marks.append(time.monotonic())
            return pid

        process = Watched("QEMU", await in_thread(run))
        undo.push_async_callback(process.end)
        client, _ = await greet("", "casemate", _connecting(hand, agent), ANSWER_S)
        marks.append(time.monotonic())
        await client.close()
        found: dict[str, Any] = {"steps": steps}
        if hand is None:
            log = setting.request.paths.libvirt / "log" / "qemu" / f"{designer.NAME}.log"
            found["line"] = astuple(CommandLine.of_log(log.read_text()))
        killed_s = time.monotonic()
        await process.end()
        if hand is None:
            await in_thread(partial(host.wait_stopped, ANSWER_S))
        steps[ENDED] = time.monotonic() - killed_s
    for step, begin_s, end_s in zip((STARTED, LOADED, RESUMED, ANSWERED), marks, marks[1:], strict=False):
        steps[step] = end_s - begin_s
    steps[ALL] = marks[-1] - marks[0]
    return found


def _connecting(hand: ByHand | None, agent: AgentLine) -> "Coroutine[Any, Any, Any]":
    return (
        dial(hand.cid, None, ANSWER_S) if hand is not None and hand.cid else agent.connect(waits_already=True)
    )


def _give_ram(setting: Setting, template: Opened, undo: AsyncExitStack) -> None:
    """Before anything is timed: a pod has it mapped in no time, or copied beside QEMU's start."""
    if setting.files is Files.NINEP:
        undo.enter_context(ram.mapped(template.ram, setting.ram_file))
        return
    size = setting.request.profile.memory_bytes
    undo.enter_context(ram.ram_directory(setting.ram, size + ram.SLACK_BYTES))
    target = ram.make_ram(setting.ram_file, size, setting.user.uid)
    try:
        ram.fill(template.ram, target)
    finally:
        os.close(target)


def _in_own_process(
    settings: Settings, profile: Profile, paths: PodPaths, way: str, line: CommandLine | None
) -> "dict[str, Any]":
    """One restore in a process that is what a pod's shim is, the first of a PID namespace. Nothing is left.

    Raises Unavailable in its words.
    """
    paths.directory.mkdir(mode=0o711, parents=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _seclude(partial(_work, settings, profile, paths, line), paths, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.rmtree(paths.directory)
    if status:
        raise Unavailable(f"the machine could not be restored ({way})", said.decode())
    found: dict[str, Any] = json.loads(said)
    return found


def _seclude(
    work: "Callable[[], Coroutine[Any, Any, dict[str, Any]]]", paths: PodPaths, answer: int
) -> "NoReturn":
    status = 1
    try:
        with open(os.devnull, "w") as nowhere:
            for fd in (1, 2):
                os.dup2(nowhere.fileno(), fd)
        os.setsid()
        system.unshare(system.CLONE_NEWNS | system.CLONE_NEWPID | system.CLONE_NEWNET)
        child = os.fork()
        if child:
            status = abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            seclusion.enter(paths)
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            _say(answer, json.dumps(asyncio.run(work())))
            status = 0
    except BaseException:  # noqa: BLE001 - the pipe is the only way to say it
        _say(answer, traceback.format_exc())
    finally:
        os._exit(status)


def _say(answer: int, text: str) -> None:
    with open(answer, "w", closefd=False) as pipe:
        pipe.write(text)


async def _work(
    settings: Settings, profile: Profile, paths: PodPaths, line: CommandLine | None
) -> "dict[str, Any]":
    asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, reap_orphans)
    trace = Trace("casemate.bench", paths.key, time.time())
    request = MachineRequest.of_nobody(profile, settings, paths)
    async with AsyncExitStack() as undo:
        return await _restore(make_setting(request, trace, undo), trace, line)
