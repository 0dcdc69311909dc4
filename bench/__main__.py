"""What make runs: `python -m bench performance` for docs/performance.md, `compare` for two checkouts.

    measure        into files of samples, one for each kind of run; also in the test bed
    page           docs/performance.md of all the files that are kept below docs/performance/
    performance    both, for this machine

Everything is measured as `casemate bench` does it, on one stand.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import document, page, report, suite, targets
from bench.instance import CHECKOUT
from config.load import load
from images import builder
from images.store import ImageStore
from rpc.errors import CasemateError

PAGE = CHECKOUT / "docs/performance.md"
HOST = "host"
"""What the page calls the machine of `make bench`, and the directory of its samples."""
COMPARED = ("boot", "exec", "delete")


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    measure = commands.add_parser("measure")
    measure.add_argument("--output", type=Path, required=True, help="a directory for the samples")
    measure.add_argument("--machine", required=True, help="what a report calls this machine")
    measure.add_argument("--commit", default="", help="that this casemate was installed from")
    measure.add_argument("--archive", type=Path, help="an OCI archive instead of the demo's image")
    measure.set_defaults(run=write_samples)
    performance = commands.add_parser("performance")
    performance.set_defaults(
        run=write_performance,
        output=PAGE.with_suffix("") / HOST,
        machine=HOST,
        commit="",
        archive=None,
    )
    for command in (measure, performance):
        command.add_argument("--runtime", action="append", help="instead of all that are known and installed")
        command.add_argument("--kind", action="append", choices=document.KINDS, help="instead of all")
        command.add_argument("--pods", type=int, default=10, help="how many idle pods (default: 10)")
        command.add_argument(
            "--at-once",
            type=int,
            default=targets.CROWD,
            help=f"how many start at once, after those that start alone (default: {targets.CROWD})",
        )
        command.add_argument(
            "--crowds",
            type=int,
            default=suite.CROWDS,
            help=f"how often they do, of each runtime (default: {suite.CROWDS})",
        )
    commands.add_parser("page").set_defaults(run=write_page)
    compare = commands.add_parser("compare")
    compare.add_argument("--base", type=Path, required=True, help="the other checkout")
    compare.add_argument("--output", type=Path, help="a directory for the samples and report.html")
    compare.set_defaults(run=compare_checkouts)
    for command in (measure, performance, compare):
        command.add_argument("--rounds", type=int, default=10, help="turns of each runtime (default: 10)")
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except CasemateError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


def ensure_image() -> None:
    """The guest image of this very checkout."""
    store = ImageStore(Path(load().image_dir))
    if builder.current(store, builder.Options()) is None:
        builder.build(store, builder.Options(), progress=say)


def write_performance(arguments: argparse.Namespace) -> None:
    """The samples of this machine, and the page of these and of what was kept of others."""
    write_samples(arguments)
    write_page(arguments)


def write_samples(arguments: argparse.Namespace) -> None:
    """A file for each kind of run, as soon as it is measured."""
    ensure_image()
    ways = tuple(arguments.runtime or suite.default_ways(all_of_them=True))
    options = suite.Options(
        ways,
        rounds=arguments.rounds,
        pods=arguments.pods,
        crowd=arguments.at_once,
        crowds=arguments.crowds,
        archive=arguments.archive,
        machine=arguments.machine,
        commit=arguments.commit,
    )
    kinds = [kind for kind in document.KINDS if kind in (arguments.kind or document.KINDS)]
    keep(suite.run(kinds, options, say, suite.shows_something), arguments.output)


def write_page(_: argparse.Namespace) -> None:
    for path in report.renew(PAGE):
        say(f"wrote {path}")


def compare_checkouts(arguments: argparse.Namespace) -> None:
    """base first, so that every ratio says what this checkout changed."""
    ensure_image()
    ways = (f"base=casemate@{arguments.base}", "this=casemate", "runc")
    measured = list(suite.run(COMPARED, suite.Options(ways, rounds=arguments.rounds), say))
    for one in measured:
        print(page.plain(page.conditions(one)))
        print_table(page.table(one))
    if arguments.output is not None:
        keep(measured, arguments.output)
        (arguments.output / report.HTML).write_text(report.html(measured))


def keep(measured: Iterable[document.Document], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for one in measured:
        path = directory / f"{one.kind}.json"
        document.write(one, path)
        say(f"wrote {path}, which took {one.took_s:.0f} s")


def print_table(table: page.Table) -> None:
    rows = [[page.plain(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
