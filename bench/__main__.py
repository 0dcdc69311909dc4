"""What make runs: `python -m bench performance` for docs/performance.md, `compare` for two checkouts.

Everything is measured as `casemate bench` does it, on one stand.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import document, page, report, suite, targets
from bench.instance import CHECKOUT
from config.load import load
from images import builder
from images.store import ImageStore
from rpc.errors import CasemateError

PAGE = CHECKOUT / "docs/performance.md"
COMPARED = ("boot", "exec", "delete")


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(required=True)
    performance = commands.add_parser("performance")
    performance.add_argument(
        "--output", type=Path, default=PAGE, help="the page (default: docs/performance.md)"
    )
    performance.add_argument("--runtime", action="append", help="instead of all that are known and installed")
    performance.add_argument("--pods", type=int, default=10, help="how many idle pods (default: 10)")
    performance.add_argument(
        "--at-once",
        type=int,
        default=targets.CROWD,
        help=f"how many start at once, after those that start alone (default: {targets.CROWD})",
    )
    performance.set_defaults(run=write_performance)
    compare = commands.add_parser("compare")
    compare.add_argument("--base", type=Path, required=True, help="the other checkout")
    compare.add_argument("--output", type=Path, help="a directory for the samples and report.html")
    compare.set_defaults(run=compare_checkouts)
    for command in (performance, compare):
        command.add_argument("--rounds", type=int, default=10, help="turns of each runtime (default: 10)")
    arguments = parser.parse_args()
    try:
        ensure_image()
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
    """The page, its pictures, the samples beside them, and report.html."""
    ways = tuple(arguments.runtime or suite.default_ways(all_of_them=True))
    options = suite.Options(ways, rounds=arguments.rounds, pods=arguments.pods, crowd=arguments.at_once)
    measured = suite.run(document.KINDS, options, say)
    written = report.write_page(measured, arguments.output)
    written += write_samples(measured, arguments.output.with_suffix(""))
    for path in written:
        say(f"wrote {path}")


def compare_checkouts(arguments: argparse.Namespace) -> None:
    """base first, so that every ratio says what this checkout changed."""
    ways = (f"base=casemate@{arguments.base}", "this=casemate", "runc")
    measured = suite.run(COMPARED, suite.Options(ways, rounds=arguments.rounds), say)
    for one in measured:
        print(page.plain(page.conditions(one)))
        print_table(page.table(one))
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        for path in write_samples(measured, arguments.output):
            say(f"wrote {path}")


def write_samples(measured: Sequence[document.Document], directory: Path) -> list[Path]:
    written = []
    for one in measured:
        written.append(directory / f"{one.kind}.json")
        document.write(one, written[-1])
    written.append(directory / "report.html")
    written[-1].write_text(report.html(measured))
    return written


def print_table(table: page.Table) -> None:
    rows = [[page.plain(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
