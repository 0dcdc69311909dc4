"""Times a container's life as its client has it: run, first byte, exec, deletion, kill; to nothing left.

Each turn gives values in seconds; who takes turns with whom is turns.py's, what they mean measures.py's.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from bench import measures
from bench.ctr import CtrFailed, CtrTimeout, Running
from bench.document import Life
from bench.pod import read_waterfall
from bench.stand import RUN_S, Runner, Say, Stand
from bench.turns import Action, Sample, Value, take_turns
from rpc.errors import CasemateError, DeadlineExceeded
from shim import phases

BYTE = b"x"
ENDED_S = 60.0


@dataclass(frozen=True, slots=True)
class Client:
    """One ctr: monotonic seconds of its exec, of the first byte that was waited for, and of its exit."""

    name: str
    exec_s: float
    first_byte_s: float
    exit_s: float


@dataclass(frozen=True, slots=True)
class Timed:
    """lives: of each way the run that took the median time."""

    samples: tuple[Sample, ...]
    lives: tuple[Life, ...] = ()


def boot(stand: Stand, rounds: int) -> Timed:
    """A container's whole life, and the first byte of one that says something; one at a time."""
    lives: dict[str, list[Life]] = {name: [] for name in stand.runners}

    def whole(runner: Runner) -> list[Value]:
        before = runner.look()
        (client,) = together(runner, 1, ("true",))
        gone_s = max(runner.wait_gone(before), client.exit_s)
        facts = runner.note(client.name)
        values = [
            Value(measures.RUN, client.exit_s - client.exec_s, facts.source),
            Value(measures.RUN_GONE, gone_s - client.exec_s, facts.source),
        ]
        life = Life(runner.way.name, 0, client.exec_s, client.exit_s, gone_s)
        if runner.way.is_casemate:
            waterfall = read_waterfall(runner.paths(client.name).ended / "trace.json")
            life = Life(life.way, 0, life.exec_s, life.exit_s, life.gone_s, waterfall.spans)
            if waterfall.seconds(phases.GUEST_BOOT):
                inside_s = waterfall.guest_boot_s + waterfall.guest_run_s
                values.append(Value(measures.GUEST_BOOT, waterfall.guest_boot_s, facts.source))
                outside_s = client.exit_s - client.exec_s - inside_s
                values.append(Value(measures.OUTSIDE, outside_s, facts.source))
        lives[runner.way.name].append(life)
        return values

    def first(runner: Runner) -> list[Value]:
        before = runner.look()
        (client,) = together(runner, 1, ("echo", BYTE.decode()))
        runner.wait_gone(before)
        source = runner.note(client.name).source
        return [Value(measures.FIRST_BYTE, client.first_byte_s - client.exec_s, source)]

    samples = in_turns(stand, whole, rounds, "a container's whole life")
    samples += in_turns(stand, first, rounds, "the first byte of output", samples)
    return Timed(tuple(samples), tuple(_typical(of, samples) for of in lives.values()))


def execute(stand: Stand, rounds: int, parallel: int) -> Timed:
    """A second process in a container that runs already."""
    with contextlib.ExitStack() as running:
        names = {way: running.enter_context(runner.sleeping()) for way, runner in stand.runners.items()}

        def each(measure: str, command: tuple[str, ...], runner: Runner) -> list[Value]:
            name = names[runner.way.name]
            clients = together(runner, parallel, command, container=name)
            source = runner.note(name).source
            ends = [c.first_byte_s if c.first_byte_s else c.exit_s for c in clients]
            return [Value(measure, end - c.exec_s, source) for end, c in zip(ends, clients, strict=True)]

        for way, runner in stand.runners.items():
            runner.execute(names[way], "true")
        plain = partial(each, measures.EXEC, ("true",))
        samples = in_turns(stand, plain, rounds, "exec in a running container")
        said = partial(each, measures.EXEC_FIRST_BYTE, ("echo", BYTE.decode()))
        samples += in_turns(stand, said, rounds, "the first byte of an exec", samples)
    return Timed(tuple(samples))


def delete(stand: Stand, rounds: int) -> Timed:
    """The end: of a task that has ended, and of one that has to be killed."""

    def ended(runner: Runner) -> list[Value]:
        before = runner.look()
        name = runner.ctr.new_id("b")
        runner.ctr(*runner.argv(name, "true", options=("--detach",)), timeout_s=RUN_S).ok()
        await_stopped(runner, name)
        source = runner.note(name).source
        seconds = runner.ctr("task", "delete", name, timeout_s=RUN_S).ok().seconds
        runner.ctr("container", "delete", name).ok()
        runner.wait_gone(before)
        return [Value(measures.DELETE, seconds, source)]

    def killed(runner: Runner) -> list[Value]:
        before = runner.look()
        name = runner.ctr.new_id("b")
        sleeping = runner.argv(name, "sleep", "1000000", options=("--detach",))
        runner.ctr(*sleeping, timeout_s=RUN_S).ok()
        source = runner.note(name).source
        began_s = time.monotonic()
        # ctr's exit code is the task's, 137: what counts is that nothing is left.
        seconds = runner.ctr("task", "delete", "--force", name, timeout_s=RUN_S).seconds
        gone_s = max(runner.wait_gone(before) - began_s, seconds)
        runner.ctr("container", "delete", name).ok()
        return [Value(measures.KILL, seconds, source), Value(measures.KILL_GONE, gone_s, source)]

    samples = in_turns(stand, ended, rounds, "deletion")
    samples += in_turns(stand, killed, rounds, "kill", samples)
    return Timed(tuple(samples))


def in_turns(
    stand: Stand,
    measure: Callable[[Runner], list[Value]],
    rounds: int,
    what: str,
    before: Sequence[Sample] = (),
) -> list[Sample]:
    """Every way once per round. before: the samples that the run has already."""

    def settled(runner: Runner) -> list[Value]:
        stand.settle()
        return measure(runner)

    actions: dict[str, Action] = {way: partial(settled, runner) for way, runner in stand.runners.items()}
    first_turn = max((sample.turn for sample in before), default=-1) + 1
    return take_turns(actions, rounds, first_turn=first_turn, on_round=progress(stand.say, what, rounds))


def progress(say: Say, what: str, rounds: int) -> Callable[[int], None]:
    return lambda number: say(f"{what}: round {number + 1} of {rounds}")


def together(
    runner: Runner, parallel: int, command: tuple[str, ...], *, container: str | None = None
) -> list[Client]:
    """So many clients at once, each with a container of its own, or each an exec in `container`.

    What is `echo`ed is waited for. Raises the error of the first client that does not end with 0.
    """
    clients = []
    for ended in at_once(runner, parallel, command, container=container):
        if isinstance(ended, CasemateError):
            raise ended
        clients.append(ended)
    return clients


def at_once(
    runner: Runner, parallel: int, command: tuple[str, ...], *, container: str | None = None
) -> list[Client | CasemateError]:
    """As together(), with each client's error in its place. Nothing is left of one that failed.

    Clients that share a CPU have the time of each.
    """
    barrier = threading.Barrier(parallel)
    limit_s = RUN_S * max(parallel / len(os.sched_getaffinity(0)), 1.0)

    def one(_: int) -> Client | CasemateError:
        name = runner.ctr.new_id("b")
        argv = (
            runner.argv(name, *command, options=("--rm",))
            if container is None
            else ("task", "exec", "--exec-id", name, container, *command)
        )
        barrier.wait()
        exec_s = time.monotonic()
        try:
            with runner.ctr.start(*argv) as running:
                first_byte_s = time.monotonic() if _speaks(running, command, limit_s) else 0.0
                result = running.finish(limit_s)
                exit_s = time.monotonic()
            result.ok()
        except (CtrFailed, CtrTimeout) as error:
            if container is None:
                runner.remove(name)
            return error
        return Client(name, exec_s, first_byte_s, exit_s)

    if parallel == 1:
        return [one(0)]
    with ThreadPoolExecutor(parallel) as pool:
        return list(pool.map(one, range(parallel)))


def _speaks(running: Running, command: tuple[str, ...], limit_s: float) -> bool:
    """Waits for the first byte, if the command says any. One that failed says why, in its own words."""
    if command[0] != "echo":
        return False
    try:
        running.read_until(BYTE, limit_s)
    except CtrFailed:
        running.finish(limit_s).ok()
        raise
    return True


def await_stopped(runner: Runner, name: str) -> None:
    """ctr can wait for a task only by being its client from the start: hence a bounded poll."""
    deadline = time.monotonic() + ENDED_S
    while True:
        rows = [line.split() for line in runner.ctr("task", "list").ok().out.splitlines()[1:]]
        status = next((row[-1] for row in rows if row[0] == name), None)
        if status == "STOPPED":
            return
        if status is None:
            raise CtrFailed(f"{runner.way.name}: the task {name} is gone before it was deleted")
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"{runner.way.name}: the task {name} does not end, it is {status}")
        time.sleep(0.02)


def _typical(lives: Sequence[Life], samples: Sequence[Sample]) -> Life:
    """The life of the median length, or the one just above, with the turn that it was."""
    way = lives[0].way
    turns = [sample.turn for sample in samples if (sample.way, sample.measure) == (way, measures.RUN)]
    found = sorted(zip(lives, turns, strict=True), key=lambda pair: pair[0].exit_s - pair[0].exec_s)
    life, turn = found[len(found) // 2]
    return Life(life.way, turn, life.exec_s, life.exit_s, life.gone_s, life.spans)
