"""How a container's root file system does: how fast it is read, walked and written to, and what it lacks.

Nothing but the container's own files is looked at, as what is bound into it may come another way. Times are
by the guest's clock. What programs expect of a file system is trials.py's.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import measures, payload
from bench.ctr import CtrFailed
from bench.document import Trials
from bench.stand import Runner, Stand
from bench.storage import in_snapshots
from bench.timing import progress
from bench.turns import Action, Sample, Value, take_turns
from rpc.errors import DataLoss

FILES, FILE_BYTES, WRITTEN_BYTES = 500, 4096, 16 * measures.MIB
WORKER = f"""\
import os, sys, time
def timed(function):
    began = time.monotonic()
    done = function()
    print(done, time.monotonic() - began)
def read():
    file, buffer, got = os.open({"/" + payload.NAME!r}, os.O_RDONLY), bytearray(1 << 20), 0
    while count := os.readv(file, [buffer]):
        got += count
    return got
def write():
    file, block = os.open("/written", os.O_WRONLY | os.O_CREAT), os.urandom(1 << 20)
    for _ in range({WRITTEN_BYTES} >> 20):
        os.write(file, block)
    os.fsync(file)
    return {WRITTEN_BYTES}
def walk():
    seen = 0
    for directory, directories, files in os.walk("/usr"):
        for name in directories + files:
            os.lstat(os.path.join(directory, name))
            seen += 1
    return seen
def make():
    os.mkdir("/made")
    for number in range({FILES}):
        with open(f"/made/{{number}}", "wb") as file:
            file.write(bytes({FILE_BYTES}))
    for number in range({FILES}):
        os.rename(f"/made/{{number}}", f"/made/{{number}}-renamed")
    for name in os.listdir("/made"):
        os.unlink("/made/" + name)
    os.rmdir("/made")
    return {FILES}
for function in (read, walk, walk, make, write):
    timed(function)
"""
RATES = (measures.FILES_READ, measures.FILES_WRITE)
ORDER = (
    *(measures.FILES_READ, measures.FILES_WALK, measures.FILES_WALK_AGAIN),
    *(measures.FILES_MAKE, measures.FILES_WRITE),
)
"""Of what the worker does."""
WORK_S = 900.0
"""Some thousands of calls, each of which may be tens of milliseconds on an emulated host that is busy."""
TRIED = Path(__file__).with_name("trials.py")


@dataclass(frozen=True, slots=True)
class Behaviour:
    samples: tuple[Sample, ...]
    trials: tuple[Trials, ...]


def behaviour(stand: Stand, rounds: int, size_bytes: int) -> Behaviour:
    """The stand's image must hold the payload, of size_bytes. What is tried is tried once of each way."""
    trials: dict[str, Trials] = {}

    def turn(runner: Runner) -> list[Value]:
        for path in in_snapshots(runner):
            path.read_bytes()  # into the host's page cache
        with runner.sleeping() as name:
            values = _values(runner, name, size_bytes)
            if runner.way.name not in trials:
                trials[runner.way.name] = try_all(runner, name)
        return values

    actions: dict[str, Action] = {way: partial(turn, runner) for way, runner in stand.runners.items()}
    samples = take_turns(actions, rounds, on_round=progress(stand.say, "root file systems", rounds))
    return Behaviour(tuple(samples), tuple(trials.values()))


def _values(runner: Runner, name: str, size_bytes: int) -> list[Value]:
    """Of a container that nothing else has run in."""
    source = runner.note(name).source
    lines = runner.execute(name, "python3", "-c", WORKER, timeout_s=WORK_S).splitlines()
    values = []
    for measure, line in zip(ORDER, lines, strict=True):
        done, seconds = line.split()
        if measure == measures.FILES_READ and int(done) != size_bytes:
            raise DataLoss(f"{runner.way.name} read {done} bytes of a file of {size_bytes}")
        value = int(done) / float(seconds) if measure in RATES else float(seconds)
        values.append(Value(measure, value, source))
    return values


def try_all(runner: Runner, name: str) -> Trials:
    """Raises CtrFailed if the trials themselves do not come to their end."""
    *differences, last = runner.execute(
        name, "python3", "-c", TRIED.read_text(), "/tried", timeout_s=WORK_S
    ).splitlines()
    count, _, word = last.partition(" ")
    if word != "tried":
        raise CtrFailed(f"{runner.way.name}: the trials of its files ended early", details=last)
    return Trials(runner.way.name, int(count), tuple(differences))
