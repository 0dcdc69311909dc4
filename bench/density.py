"""What idle pods weigh: PSS of all their processes, alone and as one of many, and what their guests use.

PSS divides a page by the processes of the host that share it, this program's own Python among them. An
idle pod is one that has been left alone for a given time: how long is part of the measure.
"""

import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import measures
from bench.document import ProcessShare
from bench.pod import ProcessMemory, memory_of
from bench.stand import Runner, Stand
from bench.timing import progress
from bench.turns import Action, Sample, Value, take_turns

SHIM = "containerd-shim"
"""How the names of all shims begin; the kernel keeps 15 characters of them (TASK_COMM_LEN)."""
BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass(frozen=True, slots=True)
class Weighed:
    """processes: the shares of the last round."""

    samples: tuple[Sample, ...]
    processes: tuple[ProcessShare, ...]


def density(stand: Stand, rounds: int, pods: int, settle_s: float) -> Weighed:
    """Per turn: one pod alone, then `pods` of them up at once; each time left alone for settle_s."""
    shares: dict[str, tuple[ProcessShare, ...]] = {}

    def turn(runner: Runner) -> list[Value]:
        before = runner.look().processes
        with contextlib.ExitStack() as up:
            names = [up.enter_context(runner.sleeping())]
            time.sleep(settle_s)
            alone = sum(memory.pss_bytes for memory in _weigh(runner, before, names))
            names += [up.enter_context(runner.sleeping()) for _ in range(pods - 1)]
            time.sleep(settle_s)
            found = _weigh(runner, before, names)
            shares[runner.way.name] = _by_name(runner.way.name, found, pods)
            facts = runner.note(names[0])
            used = _guest_used(runner, names[0])
        values = [
            Value(measures.PSS_ALONE, alone, facts.source),
            Value(measures.PSS, sum(memory.pss_bytes for memory in found) / pods, facts.source),
        ]
        shims = [memory.pss_bytes for memory in found if memory.name.startswith(SHIM)]
        if shims:
            values.append(Value(measures.PSS_SHIM, sum(shims) / pods, facts.source))
        if facts.memory_bytes:
            beyond = sum(memory.pss_bytes - memory.guest_ram_bytes for memory in found)
            values.append(Value(measures.PSS_HOST, beyond / pods, facts.source))
        if used is not None:
            values.append(Value(measures.GUEST_USED, used, facts.source))
        return values

    actions: dict[str, Action] = {way: partial(turn, runner) for way, runner in stand.runners.items()}
    what = f"memory of {pods} idle pods"
    samples = take_turns(actions, rounds, on_round=progress(stand.say, what, rounds))
    return Weighed(tuple(samples), tuple(share for of in shares.values() for share in of))


def _weigh(runner: Runner, before: Collection[int], names: list[str]) -> list[ProcessMemory]:
    """The memory of every process that is there since `before`; casemate's shims by the shims' name."""
    facts = [runner.note(name) for name in names]
    shims = {fact.shim_pid for fact in facts}
    pids = runner.look().processes - set(before)
    found = memory_of(pids, max(fact.memory_bytes for fact in facts))
    return [
        ProcessMemory(SHIM, memory.pss_bytes, memory.guest_ram_bytes, memory.pid)
        if memory.pid in shims
        else memory
        for memory in found
    ]


def _by_name(way: str, found: list[ProcessMemory], pods: int) -> tuple[ProcessShare, ...]:
    """Largest first."""
    sums: dict[str, tuple[int, int]] = {}
    for memory in found:
        pss, ram = sums.get(memory.name, (0, 0))
        sums[memory.name] = (pss + memory.pss_bytes, ram + memory.guest_ram_bytes)
    shares = [ProcessShare(way, name, pss / pods, ram / pods) for name, (pss, ram) in sums.items()]
    return tuple(sorted(shares, key=lambda share: -share.pss_bytes))


def _guest_used(runner: Runner, name: str) -> int | None:
    """Bytes in use as the container's kernel counts them; None where that is the host's own kernel."""
    boot_id, _, meminfo = runner.execute(name, "cat", BOOT_ID, "/proc/meminfo").partition("\n")
    if boot_id == Path(BOOT_ID).read_text().strip():
        return None
    counts = {line.split(":")[0]: int(line.split()[1]) << 10 for line in meminfo.splitlines()}
    return counts["MemTotal"] - counts["MemAvailable"]
