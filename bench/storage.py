"""How fast a container reads, from beginning to end: a file of its image, one of a bind-mounted volume, and a
block device.

The guest has never seen the file, so that it always comes from the host: from its disk, where the host's
page cache could be emptied of it, or from that cache. The device is a loop device whose own buffers are
empty, as it is a new one, and whose file is in the host's page cache; it is read past the reader's page cache
and through it. What goes through a guest's page cache touches memory of the guest for the first time.
"""

import subprocess
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench import measures, payload
from bench.stand import RUN_S, Runner, Stand
from bench.timing import progress
from bench.turns import Action, Sample, Value, take_turns
from rpc.errors import DataLoss, FailedPrecondition

READER = """\
import mmap, os, sys, time
buffer = mmap.mmap(-1, 1 << 20)
buffer.write(bytes(len(buffer)))
for word in sys.argv[1:]:
    path, _, direct = word.partition("=")
    file, got = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0)), 0
    began = time.monotonic()
    while count := os.readv(file, [buffer]):
        got += count
    print(got, time.monotonic() - began)
"""
"""Runs in the container; its clock is the guest's. A path with "=direct" is read past the page cache."""
IN_ROOTFS, IN_VOLUME = f"/{payload.NAME}", f"/volume/{payload.NAME}"


def read_sequentially(stand: Stand, rounds: int, size_bytes: int) -> tuple[Sample, ...]:
    """The stand's image must hold the payload, of size_bytes. Values are bytes per second."""
    for runner in stand.runners.values():
        directory = _volume(runner)
        if not directory.exists():
            directory.mkdir()
            payload.random_file(directory / payload.NAME, size_bytes)

    def turn(runner: Runner) -> list[Value]:
        volume = _volume(runner) / payload.NAME
        cold = [payload.evict(path) for path in (*in_snapshots(runner), volume)]
        values = _read(runner, size_bytes, (measures.ROOTFS_COLD, measures.VOLUME_COLD))
        if not all(cold):
            stand.say("files cannot be taken out of this host's page cache: no reading from its disk")
            values = []
        values += _read(runner, size_bytes, (measures.ROOTFS_WARM, measures.VOLUME_WARM))
        return values + _read_device(runner, volume, size_bytes)

    actions: dict[str, Action] = {way: partial(turn, runner) for way, runner in stand.runners.items()}
    what = f"reading {size_bytes // measures.MIB} MiB"
    return tuple(take_turns(actions, rounds, on_round=progress(stand.say, what, rounds)))


def _read(runner: Runner, size_bytes: int, names: Sequence[str]) -> list[Value]:
    """One container that reads both files."""
    before = runner.look()
    name = runner.ctr.new_id("b")
    mount = f"type=bind,src={_volume(runner)},dst=/volume,options=rbind:ro"
    argv = runner.argv(
        name, "python3", "-c", READER, IN_ROOTFS, IN_VOLUME, options=("--rm", "--mount", mount)
    )
    output = runner.ctr(*argv, timeout_s=RUN_S).ok().out
    runner.wait_gone(before)
    return _values(runner, name, output, size_bytes, names)


def _read_device(runner: Runner, file: Path, size_bytes: int) -> list[Value]:
    """A container that reads a loop device with this file below it."""
    before = runner.look()
    name = runner.ctr.new_id("b")
    device = losetup("--find", "--show", "--read-only", file)
    try:
        words = ("python3", "-c", READER, f"{device}=direct", device)
        argv = runner.argv(name, *words, options=("--rm", "--device", device))
        output = runner.ctr(*argv, timeout_s=RUN_S).ok().out
        runner.wait_gone(before)
    finally:
        losetup("--detach", device)
    return _values(runner, name, output, size_bytes, (measures.BLOCK, measures.BLOCK_BUFFERED))


def losetup(*words: str | Path) -> str:
    """losetup(8). Raises FailedPrecondition."""
    done = subprocess.run(["losetup", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise FailedPrecondition("losetup failed", done.stderr.strip())
    return done.stdout.strip()


def _values(runner: Runner, name: str, output: str, size_bytes: int, names: Sequence[str]) -> list[Value]:
    source = runner.note(name).source
    values = []
    for measure, line in zip(names, output.splitlines(), strict=True):
        got, seconds = line.split()
        if int(got) != size_bytes:
            raise DataLoss(f"{runner.way.name} read {got} bytes of a file of {size_bytes}")
        values.append(Value(measure, size_bytes / float(seconds), source))
    return values


def _volume(runner: Runner) -> Path:
    return runner.instance.work / "volume"


def in_snapshots(runner: Runner) -> list[Path]:
    """Where the image's file is on the host."""
    snapshots = runner.instance.base / "root/io.containerd.snapshotter.v1.overlayfs/snapshots"
    found = list(snapshots.glob(f"*/fs/{payload.NAME}"))
    if not found:
        raise FailedPrecondition("containerd has not unpacked the image with overlayfs", hint=str(snapshots))
    return found
