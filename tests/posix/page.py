"""docs/filesystems.md, made of what was tried: what differs from runc, and why. It computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rpc.errors import DataLoss
from tests.posix.reasons import known
from tests.posix.trying import FSX_OPERATIONS, FSX_SEEDS, OK, SKIPPED, Tried

RUNC = "runc"
HEAD = """\
# What files are like in a container

Two public tests of file systems and two of ours, run as root in a container of the demo's image, under runc
and casemate, in each place where a container can have files. `sudo make posix` runs them and writes this
page, in a quarter of an hour where guests are emulated. It builds the two with cargo, and fails if something
differs for which tests/posix/reasons.py has no reason.

- {pjdfstest}: what every system call does to names, owners, modes and times, and its errors.
- {fsx}: what is read is what was written, by all ways to read and write, in {seeds} random orders of
  {operations} operations.
- tests/posix/linux.py, here `linux`: O_DIRECT, sparse files, locks of every kind, extended attributes, access
  lists, mmap between processes, and what else of Linux' own programs use.
- tests/posix/beside.py, here `beside`: a volume that somebody on the host uses at the same time.

*As runc*: what passes with both. *Neither*: what passes with neither, or is left out (tests that mount).
Guests had Linux {kernel}, and the host {virtiofsd}.
"""
HEADINGS = "| place | by | with runc | tests | as runc | neither | differ |"
FOOT = """\
## Neither

- Tests that mount: read-only file systems (`erofs`), busy mount points (`ebusy`).
- Root file system: a character device 0:0, which pjdfstest makes, stands for a removed file on overlayfs, and
  nobody may make one (41 tests that end in `::char`).
- Where pathconf(3) does not know how many links a file may have: `link_count_max`.
- tmpfs: FALLOC_FL_ZERO_RANGE, which Linux' has not.
"""
SHOWN = 6
"""Of the names of tests that one reason explains."""


@dataclass(frozen=True, slots=True)
class Difference:
    """ours: what casemate's outcome was. better: it failed with runc only."""

    way: str
    place: str
    test: str
    ours: str
    better: bool


@dataclass(frozen=True, slots=True)
class Compared:
    place: str
    way: str
    runc: str
    mounted: str
    same: int
    neither: int
    differences: tuple[Difference, ...]

    @property
    def total(self) -> int:
        return self.same + self.neither + len(self.differences)


def compare(runc: Tried, ours: Tried) -> Compared:
    """Raises DataLoss if they did not try the same."""
    if runc.outcomes.keys() != ours.outcomes.keys():
        raise DataLoss(
            f"{ours.way} tried other things than runc: {runc.outcomes.keys() ^ ours.outcomes.keys()}"
        )
    both = [(name, runc.outcomes[name], ours.outcomes[name]) for name in ours.outcomes]
    differences = [
        Difference(ours.way, ours.place, name, mine, better=mine == OK)
        for name, theirs, mine in both
        if (theirs == OK) != (mine == OK)
    ]
    same = sum(theirs == mine == OK for _, theirs, mine in both)
    neither = len(both) - same - len(differences)
    return Compared(ours.place, ours.way, runc.mounted, ours.mounted, same, neither, tuple(differences))


def why(difference: Difference) -> str:
    """The reason that is known, or ''."""
    return known(difference.way, difference.place, difference.test)


def pairs(found: Sequence[Tried]) -> Iterator[Compared]:
    """Each place of each way that is not runc, beside runc's."""
    beside = {tried.place: tried for tried in found if tried.way == RUNC}
    for tried in found:
        if tried.way != RUNC:
            yield compare(beside[tried.place], tried)


def page(found: Sequence[Tried], left_out: Mapping[str, str], facts: Mapping[str, str]) -> str:
    """left_out: ways that this machine cannot run, and its reason. facts: what HEAD names."""
    compared = list(pairs(found))
    text = HEAD.format(operations=FSX_OPERATIONS, seeds=len(FSX_SEEDS), **facts)
    text += (
        "\n| place | by | with runc | tests | as runc | neither | differ |\n|---|---|---|---|---|---|---|\n"
    )
    for one in compared:
        numbers = (one.total, one.same, one.neither, len(one.differences))
        text += f"| {one.place} | {one.mounted} | {one.runc} | {' | '.join(map(str, numbers))} |\n"
    for name, reason in left_out.items():
        text += f"\n{name} was left out, as this machine cannot run it: {reason}.\n"
    for one in compared:
        if one.differences:
            text += f"\n## {one.place}, {one.mounted}\n\n| test | here | why |\n|---|---|---|\n"
            text += "".join(_rows(one.differences))
    return text + "\n" + FOOT


def _rows(differences: Sequence[Difference]) -> Iterator[str]:
    """One for each reason; of one reason, the outcome is the first test's."""
    by_reason: dict[str, list[Difference]] = {}
    for one in differences:
        by_reason.setdefault(why(one) or f"NOT EXPLAINED: {one.ours}", []).append(one)
    for reason, some in by_reason.items():
        names = [f"`{one.test}`" for one in some]
        shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        here = "passes" if some[0].better else "left out" if some[0].ours == SKIPPED else "fails"
        yield f"| {shown} | {here} | {reason} |\n"


def unexplained(found: Sequence[Tried]) -> list[Difference]:
    return [one for compared in pairs(found) for one in compared.differences if not why(one)]
