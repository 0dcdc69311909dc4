"""The measurements: a container's whole run, an exec, a deletion, an idle pod, against runc in the same run.

Each gives numbers; bench/report.py says them.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from bench.ctr import Ctr
from bench.instance import RUNTIME
from bench.measure import Series, take_turns
from bench.pod import ProcessMemory, Waterfall, memory_of, read_waterfall
from bench.supervisor import descendants
from shim.paths import PodPaths

RUNC = "io.containerd.runc.v2"
RUNTIMES = {"runc": RUNC, "casemate": RUNTIME}


@dataclass(frozen=True, slots=True)
class Idle:
    """A pod that sleeps."""

    processes: tuple[ProcessMemory, ...]
    guest_memory_bytes: int
    guest_total_bytes: int
    guest_used_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    run: dict[str, Series]
    waterfalls: tuple[Waterfall, ...]
    outside: Series
    guest_boot: Series
    first_byte: dict[str, Series]
    execute: dict[str, Series]
    delete: dict[str, Series]
    kill: dict[str, Series]
    idle: Idle


class Bench:
    def __init__(self, ctr: Ctr, image: str, rounds: int, say: Callable[[str], None]) -> None:
        self.ctr = ctr
        self.image = image
        self.rounds = rounds
        self.say = say

    def all(self) -> Measured:
        for runtime in RUNTIMES.values():
            self._run(runtime)  # not measured: it fills caches (pages, accelerator, QEMU's capabilities)
        waterfalls: list[Waterfall] = []
        outside: list[float] = []

        def casemate_run() -> float:
            name, seconds = self._run(RUNTIME)
            waterfall = self.waterfall(name)
            waterfalls.append(waterfall)
            outside.append(seconds - waterfall.guest_boot_s - waterfall.guest_run_s)
            return seconds

        self.say("a container's whole run")
        run = take_turns({"runc": lambda: self._run(RUNC)[1], "casemate": casemate_run}, self.rounds)
        turns = run["casemate"].turns
        self.say("the first byte of output")
        first_byte = self._each(self._first_byte, self.rounds)
        with contextlib.ExitStack() as running:
            names = {short: running.enter_context(self._sleeping(long)) for short, long in RUNTIMES.items()}
            self.say("exec in a running container")
            execute = take_turns(
                {short: partial(self._exec, name) for short, name in names.items()}, self.rounds
            )
            self.say("memory of an idle pod")
            idle = self.idle(names["casemate"])
        self.say("deletion")
        delete = self._each(self._delete, self.rounds)
        self.say("kill")
        kill = self._each(self._kill, self.rounds)
        return Measured(
            run=run,
            waterfalls=tuple(waterfalls),
            outside=Series("outside the guest", tuple(outside), turns),
            guest_boot=Series("guest boot", tuple(fall.guest_boot_s for fall in waterfalls), turns),
            first_byte=first_byte,
            execute=execute,
            delete=delete,
            kill=kill,
            idle=idle,
        )

    def _each(self, measure: Callable[[str], float], rounds: int) -> dict[str, Series]:
        return take_turns({short: partial(measure, long) for short, long in RUNTIMES.items()}, rounds)

    def _run(self, runtime: str) -> tuple[str, float]:
        name = self.ctr.new_id("bench")
        return name, self.ctr("run", "--rm", "--runtime", runtime, self.image, name, "true").ok().seconds

    def _first_byte(self, runtime: str) -> float:
        name = self.ctr.new_id("bench")
        argv = ("run", "--rm", "--runtime", runtime, self.image, name, "echo", "x")
        began = time.monotonic()
        with self.ctr.start(*argv) as running:
            running.read_until(b"x", 120)
            seconds = time.monotonic() - began
            running.finish(60).ok()
        return seconds

    @contextlib.contextmanager
    def _sleeping(self, runtime: str) -> Iterator[str]:
        name = self.ctr.new_id("bench")
        self.ctr(
            "run", "--detach", "--runtime", runtime, self.image, name, "sleep", "100000", timeout_s=120
        ).ok()
        try:
            yield name
        finally:
            self.ctr("task", "delete", "--force", name)
            self.ctr("container", "delete", name).ok()

    def _exec(self, name: str) -> float:
        return self.ctr("task", "exec", "--exec-id", self.ctr.new_id("exec"), name, "true").ok().seconds

    def _delete(self, runtime: str) -> float:
        """`ctr task delete` of a task that has ended."""
        name = self.ctr.new_id("bench")
        self.ctr("run", "--detach", "--runtime", runtime, self.image, name, "true", timeout_s=120).ok()
        deadline = time.monotonic() + 30
        while f"{name} " in (listed := self.ctr("task", "list").ok().out) and "STOPPED" not in listed:
            if time.monotonic() > deadline:
                raise AssertionError(f"{name} does not end: {listed}")
            time.sleep(0.02)  # ctr can wait for a task only by being its client from the start
        seconds = self.ctr("task", "delete", name).ok().seconds
        self.ctr("container", "delete", name).ok()
        return seconds

    def _kill(self, runtime: str) -> float:
        """`ctr task delete --force` of a task that runs: SIGKILL, the wait for its end, and its deletion."""
        name = self.ctr.new_id("bench")
        self.ctr(
            "run", "--detach", "--runtime", runtime, self.image, name, "sleep", "1000", timeout_s=120
        ).ok()
        result = self.ctr("task", "delete", "--force", name)
        self.ctr("container", "delete", name).ok()
        return result.seconds

    def waterfall(self, name: str) -> Waterfall:
        return read_waterfall(self._paths(name).ended / "trace.json")

    def idle(self, name: str) -> Idle:
        state = self._state(name)
        shim = int(state["pid"])
        meminfo = self.ctr(
            "task", "exec", "--exec-id", self.ctr.new_id("exec"), name, "cat", "/proc/meminfo"
        ).ok()
        facts = {line.split(":")[0]: int(line.split()[1]) << 10 for line in meminfo.out.splitlines()}
        memory_bytes = int(state["memory_bytes"])
        return Idle(
            processes=memory_of({shim} | descendants(shim), memory_bytes),
            guest_memory_bytes=memory_bytes,
            guest_total_bytes=facts["MemTotal"],
            guest_used_bytes=facts["MemTotal"] - facts["MemAvailable"],
        )

    def _paths(self, name: str) -> PodPaths:
        return PodPaths(self.ctr.namespace, name, self.ctr.instance.path("/run/casemate"))

    def _state(self, name: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self._paths(name).state.read_text())
        return state
