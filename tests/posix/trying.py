"""Runs the tests in one place of one container, and reads what they say. What it means is page.py's."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.stand import Runner
from rpc.errors import DataLoss
from tests.posix import beside
from tests.posix.places import Place

OK, SKIPPED = "ok", "skipped"
TRY_S = 900.0
"""Of one program, emulated on a busy machine."""
FSX_OPERATIONS = 3000
FSX_SEEDS = (1, 2, 3)
LINUX = Path(__file__).with_name("linux.py")
CONFIGS = "/etc"
PJDFSTEST_CONFIG = """\
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[settings]
naptime = 0.02
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"""
"""What Linux has. The tests that mount read-only are left out: no container may."""
FSX_CONFIG = """\
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 10
truncate = 5
fsync = 1
fdatasync = 1
posix_fallocate = 2
punch_hole = 2
sendfile = 2
posix_fadvise = 2
copy_file_range = 2
"""

Outcomes = Mapping[str, str]
"""By test: OK, SKIPPED, or how it failed."""


@dataclass(frozen=True, slots=True)
class Tried:
    """In one place by one way. mounted: the file system that the container's kernel says it is."""

    way: str
    place: str
    mounted: str
    outcomes: Outcomes


def files(programs: list[Path]) -> dict[str, tuple[bytes, int]]:
    """What the image must hold: by path, contents and mode."""
    held = {f"usr/local/bin/{path.name}": (path.read_bytes(), 0o755) for path in programs}
    held |= {"etc/pjdfstest.toml": (PJDFSTEST_CONFIG.encode(), 0o644)}
    return held | {"etc/fsx.toml": (FSX_CONFIG.encode(), 0o644)}


def try_all(runner: Runner, place: Place) -> Tried:
    """Raises CtrFailed if a program does not come to its end."""
    with TemporaryDirectory(dir=runner.instance.work) as work, place.given(Path(work)) as (options, before):
        Path(work).chmod(0o755)
        with runner.sleeping(options) as name:
            if before:
                runner.execute(name, *before)
            mounts = runner.execute(name, "cat", "/proc/mounts")
            outcomes = dict(_pjdfstest(runner, name, place.path))
            outcomes |= dict(_fsx(runner, name, place.path))
            outcomes |= dict(_linux(runner, name, place.path))
            if place.shared:
                outcomes |= dict(_beside(runner, name, Path(work, place.shared), place.path))
    return Tried(runner.way.name, place.name, mounted_at(mounts, place.path), outcomes)


def mounted_at(mounts: str, path: str) -> str:
    """The type of the file system that a path is on: /proc/mounts."""
    types = {fields[1]: fields[2] for fields in map(str.split, mounts.splitlines())}
    return types.get(path) or types["/"]


def _execute(runner: Runner, name: str, *command: str) -> tuple[int, str]:
    """Exit code, and both outputs."""
    exec_id = runner.ctr.new_id("e")
    done = runner.ctr("task", "exec", "--exec-id", exec_id, name, *command, timeout_s=TRY_S)
    return done.code, done.out + done.err


def _pjdfstest(runner: Runner, name: str, path: str) -> Iterator[tuple[str, str]]:
    command = ("pjdfstest", "-c", "/etc/pjdfstest.toml", "-p", path, "-s", "/dev/shm")
    return read_pjdfstest(_execute(runner, name, *command)[1])


def read_pjdfstest(output: str) -> Iterator[tuple[str, str]]:
    """Raises DataLoss if it ended early."""
    found: dict[str, str] = {}
    last = ""
    for line in output.splitlines():
        if match := re.fullmatch(r"(\S+::\S+) +(ok|FAILED|skipped)", line.strip()):
            last, word = f"pjdfstest {match[1]}", match[2]
            found[last] = word if word in (OK, SKIPPED) else ""
        elif last and found[last] == "" and line.strip():
            found[last] = line.strip()
    total = re.search(r"(\d+) total", output)
    if total is None or int(total[1]) != len(found):
        raise DataLoss("pjdfstest did not come to its end", output[-2000:])
    yield from found.items()


def _fsx(runner: Runner, name: str, path: str) -> Iterator[tuple[str, str]]:
    for seed in FSX_SEEDS:
        options = ("-f", "/etc/fsx.toml", "-N", str(FSX_OPERATIONS), "-S", str(seed), "-P", "/tmp")
        code, output = _execute(runner, name, "fsx", *options, f"{path}/fsx{seed}")
        failed = output.strip().splitlines()[:1] or [f"exit code {code}"]
        yield f"fsx seed {seed}", OK if code == 0 else failed[0]


def _linux(runner: Runner, name: str, path: str) -> Iterator[tuple[str, str]]:
    return read_linux(_execute(runner, name, "python3", "-c", LINUX.read_text(), f"{path}/linux")[1])


def _beside(runner: Runner, name: str, directory: Path, path: str) -> Iterator[tuple[str, str]]:
    for test, seen in beside.try_all(runner, name, directory, path):
        yield f"beside {test}", OK if seen else "not so"


def read_linux(output: str) -> Iterator[tuple[str, str]]:
    """Raises DataLoss if it ended early."""
    *lines, last = output.splitlines()
    for line in lines:
        name, _, outcome = line.partition(": ")
        yield f"linux {name}", outcome
    if last != f"{len(lines)} tried":
        raise DataLoss("linux.py did not come to its end", output[-2000:])
