"""docs/shimtest.md, made of what came out: one row a test, and why where it does not pass. It computes."""

import textwrap
from collections.abc import Mapping, Sequence

from tests.shimtest.changes import WHYS
from tests.shimtest.outcomes import FAILS, PASSES, Outcome
from tests.shimtest.reasons import REASONS, known

HEAD = """\
# containerd's own tests of shims

[containerd/shimtest](https://github.com/containerd/shimtest) is a suite for any shim: it starts one as
containerd would, and is its client. `sudo make shimtest SUITE=/path/to/its/checkout` builds it with Go, runs
it on this checkout's shim and writes this page, in {minutes} minutes ({accel}). It fails if a test does not
pass for which tests/shimtest/reasons.py has no reason, if a reason is left over, or if a process, a mount, a
cgroup or a file is.

The suite is {commit}, run on {date}. {numbers}

Root file systems are images that the shim mounts (`format_mounts`), and the tests of networks bring one
(`provide_network`, with slirp4netns). Each of Stress runs for {stress_s} s. What fails, but for a reason that
is always so, is run once more, alone; its row says if it passes then. Where something only stands for what a
client gives, the suite is built with what a client does give (tests/shimtest/changes.py):

{changes}

| test | | why |
|---|---|---|
"""
WIDTH = 110
EMULATED = "TCG"
PLURAL = {PASSES: "pass", FAILS: "fail"}
NAMESAKE = "\n`#01` is Go's: the second test of that name, here the one of sandboxes.\n"


def numbers(found: Mapping[str, Outcome]) -> str:
    """How many there are of each result."""
    results = [one.result for one in found.values()]
    counted = [f"{results.count(result)} {PLURAL.get(result, result)}" for result in dict.fromkeys(results)]
    return f"Of {len(results)} tests: {', '.join(counted)}."


def page(found: Mapping[str, Outcome], facts: Mapping[str, str]) -> str:
    """facts: what HEAD names."""
    reasons = known(emulated=facts["accel"] == EMULATED)
    changes = "\n".join(textwrap.fill(f"- {why}", WIDTH, subsequent_indent="  ") for why in WHYS)
    text = HEAD.format(numbers=numbers(found), changes=changes, **facts)
    for row, one in found.items():
        why = one.words if one.result == PASSES else reasons.get(row) or f"NOT EXPLAINED: {one.words}"
        text += f"| {row} | {one.result} | {why.replace('|', '/')} |\n"
    return text + (NAMESAKE if any(row.endswith("#01") for row in found) else "")


def unexplained(found: Mapping[str, Outcome], accel: str) -> Sequence[str]:
    """Rows that do not pass, with no reason. accel: of the guests, KVM or TCG."""
    reasons = known(emulated=accel == EMULATED)
    return [row for row, one in found.items() if one.result != PASSES and row not in reasons]


def left_over(found: Mapping[str, Outcome]) -> Sequence[str]:
    """Rows with a reason that pass, or are not there."""
    return [row for row in REASONS if row not in found or found[row].result == PASSES]
