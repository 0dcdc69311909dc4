"""Runs containerd's shimtest on our shim and writes docs/shimtest.md: what `make shimtest` becomes.

What is asked for in part is printed.
"""

import argparse
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bench import ways
from bench.ctr import Ctr
from bench.instance import Instance
from bench.stand import Runner, Stand, demo_archive, scratch_directory
from rpc.errors import CasemateError, DataLoss
from scripts.host import CHECKOUT, install_packages, main_guard, say
from tests.shimtest import names, page, suite
from tests.shimtest.outcomes import CONFIG, FAILS, NO_END, PASSES, STRESS, Outcome, Reading, name_of
from tests.shimtest.reasons import REASONS
from tests.shimtest.suite import Suite
from tests.vm import census
from tests.vm.operator import casemate

PAGE = CHECKOUT / "docs/shimtest.md"
WAY = "casemate"
PACKAGES = ("slirp4netns",)  # of the tests of networks
EVERYTHING, EVERYTHING_S = ".", 3600
STRESSES = [f"{STRESS}{name}" for name in ("Lifecycle", "Exec", "Transfer", "Sandbox")]
STRESS_S = 60
BEFORE_ITS_LIMIT_S = 60
"""When Stress stops."""
ALONE_S = 600
LEFT_S = 30.0
END_S = 10.0


def expression(row: str) -> str:
    """As of `go test -run`, for this row alone."""
    return "/".join(f"^{re.escape(name)}$" for name in name_of(row).split("/"))


@dataclass(frozen=True, slots=True)
class Trial:
    """A suite in an installation. accel: of its guests, KVM or TCG."""

    suite: Suite
    instance: Instance
    accel: str

    def run(self, asked: str, timeout_s: int, *, short: bool = True) -> Mapping[str, Outcome]:
        """Raises DataLoss if it did not come to its end."""
        reading = Reading()
        last: deque[str] = deque(maxlen=40)
        for line in suite.lines(self.suite, self.instance, asked, timeout_s, short=short):
            last.append(line)
            if row := reading.take(line):
                one = reading.found[row]
                say(f"{row} {one.result}{one.words and ': '}{one.words}")
                if page.unexplained({row: one}, self.accel):
                    print(reading.text(row), flush=True)
        if NO_END in reading.found.values() or not reading.found:
            raise DataLoss("the suite did not come to its end, or ran nothing", "".join(last))
        return reading.found

    def run_alone(self, row: str) -> Mapping[str, Outcome]:
        stress = row in STRESSES
        timeout_s = STRESS_S + BEFORE_ITS_LIMIT_S if stress else ALONE_S
        return self.run(expression(row), timeout_s, short=not stress)

    def run_all(self) -> Mapping[str, Outcome]:
        """What fails, but for a reason that is always so, is run once more, alone."""
        found = dict(self.run(EVERYTHING, EVERYTHING_S))
        for row in STRESSES:
            found |= self.run_alone(row)
        for row in [row for row, one in found.items() if one.result == FAILS and row not in REASONS]:
            say(f"{row} once more")
            then = self.run_alone(row)[row]
            if then.result == PASSES:
                then = Outcome(PASSES, f"the second time, alone; before: {found[row].words}")
            found[row] = then
        return found

    def run_some(self, asked: str) -> Mapping[str, Outcome]:
        """asked: a row of Stress, or an expression as of `go test -run`."""
        if asked in STRESSES:
            return self.run_alone(asked)
        return self.run(f"^TestShim$/^{CONFIG}$/{asked}", EVERYTHING_S)


def prepare(instance: Instance) -> None:
    """What the suite needs, or makes once, before anything is counted."""
    names.serve(instance)
    for verb in ("add", "delete"):  # the directory and the mount of all such names
        subprocess.run(instance.inside("ip", "netns", verb, "first"), check=True, capture_output=True)


def is_containerds(left: str) -> bool:
    """Whether a line of a census is of containerd, which the suite does not speak to."""
    return left.startswith("open_files: ")


def end(pid: int) -> None:
    """Returns when it has ended, within END_S. Raises ProcessLookupError if it had."""
    descriptor = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        select.select([descriptor], [], [], END_S)
    finally:
        os.close(descriptor)


def end_left(ctr: Ctr, before: census.Census, processes: set[int]) -> list[str]:
    """What the suite left behind, and does no more: processes end, the rest is `casemate gc`'s."""
    left = census.left_after(ctr, before, LEFT_S, but=is_containerds)
    if left:
        for pid in ctr.instance.descendants() - processes:
            with suppress(ProcessLookupError):
                end(pid)
        say(casemate(ctr.instance, "gc").stderr.strip())
    return left


def acceleration(runner: Runner) -> str:
    return runner.note(runner.run("true")).accel.upper()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make shimtest", description=__doc__)
    parser.add_argument("suite", type=Path, help="a checkout of github.com/containerd/shimtest")
    parser.add_argument(
        "--run",
        default=EVERYTHING,
        help="names of tests, as of `go test -run`, or one of Stress; all unless given",
    )
    asked = parser.parse_args()
    try:
        return made(asked.suite.resolve(), asked.run)
    except CasemateError as error:
        return main_guard(error)


def made(checkout: Path, asked: str) -> int:
    install_packages(PACKAGES)
    began_s = time.monotonic()
    with scratch_directory() as scratch:
        say(f"building {suite.REPOSITORY}")
        built = suite.build(checkout, scratch)
        demo_archive(scratch / "demo.tar")
        with Stand([ways.parse(WAY)], scratch / "demo.tar", say) as stand:
            stand.warm_up()
            runner = stand.runners[WAY]
            trial = Trial(built, runner.instance, acceleration(runner))
            prepare(runner.instance)
            before, processes = census.take(runner.ctr), runner.instance.descendants()
            try:
                found = trial.run_all() if asked == EVERYTHING else trial.run_some(asked)
            finally:
                left = end_left(runner.ctr, before, processes)
    facts = {
        "commit": built.commit,
        "accel": trial.accel,
        "stress_s": str(STRESS_S),
        "minutes": f"{(time.monotonic() - began_s) / 60:.0f}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    text = page.page(found, facts)
    if asked == EVERYTHING:
        PAGE.write_text(text)
    else:
        print(text)
    complaints = [f"no reason: {row}: {found[row].words}" for row in page.unexplained(found, trial.accel)]
    if asked == EVERYTHING:
        complaints += [f"a reason, and no need of it: {row}" for row in page.left_over(found)]
    complaints += [f"left behind: {line}" for line in left]
    for line in complaints:
        say(line)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
