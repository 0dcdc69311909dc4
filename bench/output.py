"""How fast a container's output reaches its client: what a program writes to its stdout.

The client is ctr, which copies it from containerd's FIFO into a pipe of ours. A logger (`logs -f` of
Docker's and nerdctl's) is in ctr's place there, with work of its own.
"""

import os
import time
from functools import partial

from bench import measures
from bench.stand import RUN_S, Runner, Stand
from bench.timing import progress
from bench.turns import Action, Sample, Value, take_turns
from rpc.errors import DataLoss

_PIECE_BYTES = 1 << 20


def speak(stand: Stand, rounds: int, size_bytes: int, first_turn: int) -> tuple[Sample, ...]:
    """Values are bytes per second. Raises DataLoss if not all of it arrives."""
    actions: dict[str, Action] = {
        way: partial(_turn, runner, size_bytes) for way, runner in stand.runners.items()
    }
    what = f"{size_bytes // measures.MIB} MiB of output"
    return tuple(
        take_turns(actions, rounds, first_turn=first_turn, on_round=progress(stand.say, what, rounds))
    )


def _turn(runner: Runner, size_bytes: int) -> list[Value]:
    before = runner.look()
    name = runner.ctr.new_id("b")
    argv = runner.argv(name, "head", "-c", str(size_bytes), "/dev/zero", options=("--rm",))
    with runner.ctr.start(*argv) as running:
        first = len(running.read_until(b"\0", RUN_S))
        began_s = time.monotonic()
        assert running.process.stdout is not None
        got = 0
        while piece := os.read(running.process.stdout.fileno(), _PIECE_BYTES):
            got += len(piece)
        seconds = time.monotonic() - began_s
        running.finish(RUN_S).ok()
    source = runner.note(name).source
    runner.wait_gone(before)
    if first + got != size_bytes:
        raise DataLoss(f"{runner.way.name}: {first + got} bytes of an output of {size_bytes}")
    return [Value(measures.OUTPUT, got / seconds, source)]
